"""Attention over a packed batch: sequences lie end to end, and no row ever sees a row of another sequence.

Legend: T rows of all sequences together, B sequences, L the longest of them, H query heads, G query heads that share
one key/value head, K head dim.
"""

import torch
import torch.nn.functional as F

SHORT = 400  # rows; below it bfloat16 on a CPU runs faster as two batched products than through SDPA's flash kernel,
#              whose backward is slow there: 4.2 against 13.8 ms at 114 rows, equal at 616 (one thread, EPYC Zen 5)


class Packing:
    """How B sequences share the T rows of a packed batch; made once and used by every layer.

    cu_seqlens (B+1,): the first row of each sequence, and T. sequence, position (T,): whose row it is, and the how
    maniest. max_seqlen: L. The rows form a dense (B, L) grid if every sequence is L long.
    """

    def __init__(self, cu_seqlens):
        self.cu_seqlens = cu_seqlens.long()
        lengths = self.cu_seqlens.diff()
        self.count, self.rows = len(lengths), int(self.cu_seqlens[-1])
        self.max_seqlen = int(lengths.max())
        self.dense = self.count * self.max_seqlen == self.rows
        self.sequence = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)
        self.position = torch.arange(self.rows, device=lengths.device) - self.cu_seqlens[self.sequence]
        self.cells = self.sequence * self.max_seqlen + self.position  # (T,) each row's place in the (B, L) grid

    @classmethod
    def equal(cls, count, length, device):
        """`count` sequences of the same length: the pictures of a batch."""
        return cls(torch.arange(0, (count + 1) * length, length, device=device))

    def to_grid(self, x):
        """(T, H, K) -> (B, L, H, K), zeros where a sequence is shorter than the longest."""
        if not self.dense:
            x = x.new_zeros(self.count * self.max_seqlen, *x.shape[1:]).index_copy(0, self.cells, x)
        return x.view(self.count, self.max_seqlen, *x.shape[1:])

    def to_rows(self, grid):
        """(B, L, H, K) -> (T, H, K): the inverse of `to_grid`."""
        flat = grid.flatten(0, 1)
        return flat if self.dense else flat.index_select(0, self.cells)


def attention(q, k, v, packing, causal):
    """softmax(q k^T / sqrt(K)) v within each sequence. q (T, H, K), k and v (T, H/G, K) -> (T, H, K).

    The sequences are laid on a (B, L) grid. Under a causal mask its empty cells need no mask of their own: they stand
    at the end, where no real row looks. Without one (the vision tower), sequences must be equally long. When more than
    half of the grid would be empty, each sequence is computed alone.
    """
    if not causal and not packing.dense:
        raise ValueError("attention without a causal mask expects sequences of equal length")
    if packing.count * packing.max_seqlen <= 2 * packing.rows:
        q, k, v = (packing.to_grid(x).transpose(1, 2) for x in (q, k, v))  # (B, H, L, K)
        return packing.to_rows(_attend(q, k, v, causal).transpose(1, 2))
    bounds = packing.cu_seqlens.tolist()
    alone = [_attend(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), causal)[0].transpose(0, 1)  # (L, H, K)
             for a, b in zip(bounds, bounds[1:])]
    return torch.cat(alone)


def _attend(q, k, v, causal):
    """Dense attention: q (B, H, L, K), k and v (B, H/G, L, K) -> (B, H, L, K)."""
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT:
        return _attend_by_products(q, k, v, causal, groups)
    if groups > 1:  # explicit copies: SDPA's own enable_gqa is slower on a CPU
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _attend_by_products(q, k, v, causal, groups):
    """The formula itself, queries of a group stacked along L so that keys and values are never copied."""
    batch, heads, length, dim = q.shape
    q = q.reshape(batch * heads // groups, groups * length, dim) * dim**-0.5
    scores = torch.bmm(q, k.flatten(0, 1).transpose(1, 2)).view(batch, heads, length, length)
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = scores.softmax(-1, torch.float32).to(q.dtype)
    return torch.bmm(weights.view(len(q), groups * length, length), v.flatten(0, 1)).view(batch, heads, length, dim)


def attend_to_cache(q, keys, values, lengths):
    """One new row per sequence against its past. q (B, H, K); keys, values (B, L, H/G, K); lengths (B,) -> (B, H, K).

    Only the first `lengths[b]` cells of sequence b are looked at. The G queries of a key head are taken together.
    """
    batch, heads, dim = q.shape
    q = q.view(batch, keys.shape[2], -1, dim)  # (B, H/G, G, K)
    mask = None
    if batch > 1:
        mask = (torch.arange(keys.shape[1], device=q.device) < lengths[:, None])[:, None, None]  # (B, 1, 1, L)
    out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
    return out.reshape(batch, heads, dim)
