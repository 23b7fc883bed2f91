"""Attention over a packed batch: sequences lie end to end, and no row ever sees a row of another sequence.

Legend: T rows of all sequences together, B sequences, L the longest of them, H query heads, G query heads that share
one key/value head, K head dim.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.choice import INTERPRETED, jit, tl, triton, use_triton

SHORT = 700  # rows; up to them bfloat16 on a CPU runs faster as two batched products than through SDPA's flash kernel,
#              whose backward is slow there: forth and back 7 against 23 ms for 8 sequences of about 75 rows, 24
#              against 43 for one of 600; at 900 SDPA leads (9 heads, 3 of keys, one thread, EPYC Zen 4)
BLOCK = 128  # queries that are computed at a time where no gradient is wanted
EMPTY = 6000  # scores of empty cells per sequence that on a CPU cost as much as to begin with a sequence alone


class Packing:
    """How B sequences share the T rows of a packed batch; made once and used by every layer.

    cu_seqlens (B+1,): the first row of each sequence, and T. sequence, position (T,): whose row it is, and the how
    maniest. max_seqlen: L. The rows form a dense (B, L) grid if every sequence is L long; empty: the pairs of cells,
    within a sequence of the grid, that are not both rows.
    """

    def __init__(self, cu_seqlens):
        self.cu_seqlens = cu_seqlens.long()
        bounds = self.cu_seqlens.flatten().tolist()
        self.lengths = [end - begin for begin, end in pairwise(bounds)]
        if cu_seqlens.dim() != 1 or not self.lengths or bounds[0] or min(self.lengths) < 0:
            raise ValueError(f"cu_seqlens {cu_seqlens.tolist()}: expected 0, then where each sequence ends")
        lengths, self.rows, self.max_seqlen = self.cu_seqlens.diff(), bounds[-1], max(self.lengths)
        self.count = len(self.lengths)
        self.dense = self.count * self.max_seqlen == self.rows
        self.empty = self.count * self.max_seqlen**2 - sum(n * n for n in self.lengths)
        numbers = torch.arange(self.count, device=lengths.device)
        self.sequence = numbers.repeat_interleave(lengths, output_size=self.rows)
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

    def apart(self, heads, device):
        """Whether to compute each sequence alone: on a GPU if more than half of the grid is empty, on a CPU sooner."""
        if device.type == "cpu":
            return heads * self.empty > EMPTY * self.count
        return self.count * self.max_seqlen > 2 * self.rows


def attention(q, k, v, packing, causal):
    """softmax(q k^T / sqrt(K)) v within each sequence. q (T, H, K), k and v (T, H/G, K) -> (T, H, K)."""
    _check(q, k, v, packing)
    if use_triton("attention", q, _obstacle(q, k, v), slow=q.dtype == torch.float32):
        if INTERPRETED and q.dtype == torch.bfloat16:  # with which the interpreter computes nonsense
            return _TritonAttention.apply(q.float(), k.float(), v.float(), packing, causal).to(q.dtype)
        return _TritonAttention.apply(q, k, v, packing, causal)
    return attention_reference(q, k, v, packing, causal)


def attention_reference(q, k, v, packing, causal):
    """The same through torch's own dense attention.

    The sequences are laid on a (B, L) grid. Under a causal mask its empty cells need no mask of their own: they stand
    at the end, where no real row looks. Without one (the vision tower), sequences must be equally long. Where much of
    the grid would be empty, each sequence is computed alone: 14 instead of 30 ms, forth and back, for ten sequences of
    54 to 200 rows (9 heads, bfloat16, one thread, EPYC Zen 4).
    """
    if not causal and not packing.dense:
        raise ValueError("attention without a causal mask expects sequences of equal length")
    if not packing.apart(q.shape[1], q.device):
        q, k, v = (packing.to_grid(x).transpose(1, 2) for x in (q, k, v))  # (B, H, L, K)
        return packing.to_rows(_attend(q, k, v, causal).transpose(1, 2))
    alone = zip(*(x.transpose(0, 1)[None].split(packing.lengths, 2) for x in (q, k, v)))  # (1, H, L, K) each
    return torch.cat([_attend(*one, causal)[0].transpose(0, 1) for one in alone])


def _attend(q, k, v, causal):
    """Dense attention: q (B, H, L, K), k and v (B, H/G, L, K) -> (B, H, L, K)."""
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if not torch.is_grad_enabled():
            return _in_blocks(q, k, v, causal)
        if q.shape[2] <= SHORT:
            return _Products.apply(q, k, v, causal)
    if groups > 1:  # explicit copies: SDPA's own enable_gqa is slower on a CPU
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _in_blocks(q, k, v, causal):
    """The formula itself, for bfloat16 without a gradient, some queries at a time: each block meets only the keys that
    its last query sees, and its scores fit into the cache. 679 rows take 7.4 ms where SDPA takes 12.5, 1230 rows 21 and
    32 (9 heads, 3 of keys, one thread, EPYC Zen 4)."""
    shape, dim = q.shape, q.shape[3]
    q, k, v = q.reshape(-1, shape[1] // k.shape[1], *shape[2:]), k.flatten(0, 1), v.flatten(0, 1)  # (B * H/G, G, L, K)
    out = torch.empty_like(q)
    for first in range(0, shape[2], BLOCK):
        block = slice(first, min(first + BLOCK, shape[2]))
        count, seen = block.stop - first, block.stop if causal else shape[2]
        scores = torch.bmm(q[:, :, block].flatten(1, 2), k[:, :seen].transpose(1, 2)).float().mul_(dim**-0.5)
        scores = scores.view(-1, count, seen)
        if causal:
            scores[:, :, first:] += scores.new_full((count, count), float("-inf")).triu_(1)
        weights = scores.softmax(-1).to(q.dtype).view(len(q), -1, seen)
        out[:, :, block] = torch.bmm(weights, v[:, :seen]).view(len(q), -1, count, dim)
    return out.view(shape)


class _Products(torch.autograd.Function):
    """The formula itself, for bfloat16; the queries of a group stand below each other, so that keys and values are not
    copied. Keeps the weights in bfloat16. Autograd's own way through these steps takes 1.1 to 1.2 times as long: on
    a CPU a softmax of bfloat16 is slower than one of float32, and a mask of truth values than a sum."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        batch, heads, length, dim = q.shape
        q = q.reshape(batch * k.shape[1], -1, dim)  # (B * H/G, G * L, K)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(batch, heads, length, length)
        if causal:
            future = scores.new_full((length, length), float("-inf")).triu_(1)
            torch.add(future, scores, alpha=dim**-0.5, out=scores)
        else:
            scores *= dim**-0.5
        weights = scores.softmax(-1).to(q.dtype).view(len(q), -1, length)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(batch, heads, length, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(q.shape)
        slopes = torch.bmm(grad, v.transpose(1, 2))
        slopes = torch._softmax_backward_data(slopes, weights, -1, slopes.dtype).mul_(shape[-1] ** -0.5)
        grads = torch.bmm(slopes, k), torch.bmm(slopes.transpose(1, 2), q), torch.bmm(weights.transpose(1, 2), grad)
        return grads[0].view(shape), *(x.view(shape[0], -1, *x.shape[1:]) for x in grads[1:]), None


def _check(q, k, v, packing):
    """ValueError for shapes, dtypes and lengths that do not belong together."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention expects q (T, H, K), k and v (T, H/G, K); got {_said(q=q, k=k, v=v)}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"attention expects one floating dtype; got {_said(q=q, k=k, v=v)}")
    if packing.rows != len(q):
        raise ValueError(f"attention expects cu_seqlens to end at the number of rows, not at {packing.rows}; got "
                         f"{_said(q=q, k=k, v=v)}")


def _said(**tensors):
    """Names, shapes and dtypes for a sentence."""
    return ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors.items())


def attend_to_cache(q, keys, values, starts, lengths, longest=None):
    """New rows against what their sequences have read, themselves included. q (T, H, K); keys, values (cells, H/G, K):
    a pool that all sequences share; starts, lengths (T,): row t looks at cells starts[t] to starts[t] + lengths[t];
    longest: the largest of the lengths, if it is known (asking a GPU for it takes time). -> (T, H, K)

    One function for a step of decoding (a row per sequence), for rows that are guessed ahead, and for a new question in
    a chat. The G queries of a key head are taken together.
    """
    _check_cache(q, keys, values, starts, lengths)
    if use_triton("attention", q, _cache_obstacle(q, keys, values), slow=q.dtype == torch.float32):
        if INTERPRETED and q.dtype == torch.bfloat16:
            return _attend_in_parts(q.float(), keys.float(), values.float(), starts, lengths, longest).to(q.dtype)
        return _attend_in_parts(q, keys, values, starts, lengths, longest)
    return attend_to_cache_reference(q, keys, values, starts, lengths)


def attend_to_cache_reference(q, keys, values, starts, lengths):
    """The same through torch's own dense attention, each sequence alone: none is padded, and company changes no
    bit. For a bfloat16 step of many sequences on a CPU, see `_attend_in_a_grid`."""
    (rows, heads, dim), kv_heads, parts = q.shape, keys.shape[1], []
    begins, seen, first = starts.tolist(), lengths.tolist(), 0
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and rows > 3 and (
            len(set(begins)) == rows and rows * max(seen) <= 2 * sum(seen)):
        return _attend_in_a_grid(q, keys, values, starts, lengths, max(seen))
    while first < rows:  # the rows of one sequence stand side by side
        count = next((n for n in range(1, rows - first) if begins[first + n] != begins[first]), rows - first)
        cells = slice(begins[first], begins[first] + seen[first + count - 1])
        k, v = (x[cells].transpose(0, 1)[None] for x in (keys, values))  # (1, H/G, L, K)
        if count == 1:
            mine = q[first].view(1, kv_heads, -1, dim)
            if heads == kv_heads and q.dtype == torch.bfloat16:  # with a second row, 32 heads of 700 cells take 2.3 ms
                mine = F.pad(mine, (0, 0, 0, 1))  # instead of 14: one by itself is multiplied without vectors
            mixed = F.scaled_dot_product_attention(mine, k, v)[:, :, :heads // kv_heads]
            parts.append(mixed.reshape(1, heads, dim))
        else:
            mine = q[first: first + count].view(count, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
            mask = torch.arange(k.shape[2], device=q.device) < lengths[first: first + count, None]  # not those behind
            mixed = F.scaled_dot_product_attention(mine, k, v, attn_mask=mask.repeat_interleave(heads // kv_heads, 0))
            parts.append(mixed.view(kv_heads, count, -1, dim).transpose(0, 1).reshape(count, heads, dim))
        first += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_in_a_grid(q, keys, values, starts, lengths, longest):
    """The same for one row of each of several sequences, with two large products instead of many small ones: each query
    is written into the columns of its own key head, of the heads side by side, and is 0 in the others. 16 sequences of
    55 to 325 cells take 0.8 ms, alone 1.4 (9 heads, 3 of keys, bfloat16, one thread, EPYC Zen 4)."""
    (rows, heads, dim), kv_heads = q.shape, keys.shape[1]
    place = torch.arange(longest)
    cells = (starts[:, None] + torch.minimum(place, lengths[:, None] - 1)).view(-1)  # cells beyond may hold anything
    k, v = (x.flatten(1).index_select(0, cells).view(rows, longest, -1) for x in (keys, values))  # (B, L, H/G * K)
    own = torch.eye(kv_heads, dtype=q.dtype).repeat_interleave(heads // kv_heads, 0)[..., None]  # (H, H/G, 1)
    scores = torch.bmm((q[:, :, None] * own).flatten(2), k.transpose(1, 2)).float()  # (B, H, L)
    scores.mul_(dim**-0.5).masked_fill_((place >= lengths[:, None])[:, None], float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).to(q.dtype), v).view(rows, heads, kv_heads, dim)
    return (mixed * own).sum(2)


def _check_cache(q, keys, values, starts, lengths):
    """ValueError for shapes and dtypes that do not belong together."""
    if (q.dim() != 3 or keys.dim() != 3 or keys.shape != values.shape or q.shape[2] != keys.shape[2]
            or q.shape[1] % keys.shape[1] or not starts.shape == lengths.shape == q.shape[:1]):
        raise ValueError("attention to a cache expects q (T, H, K), keys and values (cells, H/G, K), starts and "
                         f"lengths (T,); got {_said(q=q, keys=keys, values=values, starts=starts, lengths=lengths)}")
    if not q.dtype == keys.dtype == values.dtype or not q.is_floating_point():
        raise ValueError("attention to a cache expects one floating dtype; got "
                         + _said(q=q, keys=keys, values=values))


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# One program computes one block of rows of one head of one sequence, and walks over the other side in blocks: the
# T x T scores never exist, a block of them lives in registers (Dao 2023, FlashAttention-2). The softmax is taken while
# walking: `top` is the largest score so far, `mass` the sum of exp(score - top), and when a larger score turns up, what
# was gathered is scaled down. Exponents are in base 2, which the hardware has: exp(x) = 2^(x log2 e).
#
# Backward computes the weights again from the scores and what forward kept of each row, lse = top + log2(mass):
#
#     p = 2^(s - lse)    dv = p^T do    dp = do v^T    delta = sum(o do) per row    ds = p (dp - delta)
#     dq = scale ds k    dk = scale ds^T q
#
# One kernel owns rows of dq, another rows of dk and dv, each with the heads that share them: nothing is added up in
# memory, so that the same inputs give the same bits, run after run.
#
# Products of float32 are made of three of TF32 each (tf32x3), nearly as exact; for 16 bits the word means nothing.
#
# Legend: BLOCK_Q, BLOCK_N rows of queries, of keys, that a program holds; BLOCK_K: K rounded up to a power of two.

LOG2E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 128
# (BLOCK_Q, BLOCK_N, warps, stages) by kernel and BLOCK_K, for numbers of 16 and of 32 bits: without register spills on
# sm_80 and sm_90, several programs to a multiprocessor where that is possible (tests/test_kernels.py compiles them).
BLOCKS = {
    "forward": {64: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
    "backward_q": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)},
    "backward_kv": {64: (32, 64, 4, 2), 128: (64, 64, 8, 2)},
}
BLOCKS32 = {
    "forward": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1)},
    "backward_q": {64: (32, 16, 4, 1), 128: (16, 16, 4, 1)},
    "backward_kv": {64: (16, 16, 4, 1), 128: (16, 16, 4, 1)},
}


@jit
def _tile(base, row, rows, stride, K: tl.constexpr, BLOCK_K: tl.constexpr, EDGE: tl.constexpr):
    """The numbers (len(row), BLOCK_K) of some rows of one head; 0 beyond the sequence's last row and beyond K."""
    column = tl.arange(0, BLOCK_K)
    place = base + row[:, None] * stride + column[None, :]
    if K < BLOCK_K:
        return tl.load(place, mask=(row[:, None] < rows) & (column[None, :] < K), other=0.0)
    elif EDGE:
        return tl.load(place, mask=row[:, None] < rows, other=0.0)
    else:
        return tl.load(place)


@jit
def _put(base, row, rows, stride, numbers, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse of `_tile`."""
    column = tl.arange(0, BLOCK_K)
    place = base + row[:, None] * stride + column[None, :]
    tl.store(place, numbers.to(base.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < K))


@jit
def _walk(out, top, mass, q, row, k, v, first, last, rows, k_row, v_row, scale2,
          K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """Take the keys first to last into account. EDGE: some of them are not to be seen by all of the queries."""
    for at in range(first, last, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        s = tl.dot(q, tl.trans(_tile(k, key, rows, k_row, K, BLOCK_K, EDGE)), input_precision="tf32x3")  # (Q, N)
        if EDGE:
            seen = key[None, :] < rows
            if CAUSAL:
                seen = seen & (key[None, :] <= row[:, None])
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale2)
        if EDGE:  # a row that has seen no key yet has a top of -inf, and -inf less itself is no number
            finite = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            finite = higher
        p = tl.exp2(s * scale2 - finite[:, None])
        shrink = tl.exp2(top - finite)
        mass = mass * shrink + tl.sum(p, 1)
        values = _tile(v, key, rows, v_row, K, BLOCK_K, EDGE)
        out = tl.dot(p.to(values.dtype), values, out * shrink[:, None], input_precision="tf32x3")
        top = higher
    return out, top, mass


@jit
def _forward(q, k, v, out, lse, cu_seqlens, q_row, k_row, v_row, out_row, total, scale2, GROUP: tl.constexpr,
             K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
             CAUSAL: tl.constexpr):
    """out and lse (H, T) of BLOCK_Q queries. Grid: blocks of the longest sequence, heads, sequences."""
    # Under a causal mask the last block has the most to do: it is the first in line.
    block, head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens + sequence)  # 64 bits, so that no place overflows
    rows = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    if block * BLOCK_Q >= rows:
        return
    q, out = q + begin * q_row + head * K, out + begin * out_row + head * K
    k, v = k + begin * k_row + head // GROUP * K, v + begin * v_row + head // GROUP * K
    row = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = _tile(q, row, rows, q_row, K, BLOCK_K, True)
    sums = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    top, mass = tl.full((BLOCK_Q,), float("-inf"), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    if CAUSAL:
        whole, last = block * BLOCK_Q // BLOCK_N * BLOCK_N, tl.minimum(rows, (block + 1) * BLOCK_Q)
    else:
        whole, last = rows // BLOCK_N * BLOCK_N, rows
    sums, top, mass = _walk(sums, top, mass, queries, row, k, v, 0, whole, rows, k_row, v_row, scale2,
                            K, BLOCK_K, BLOCK_N, CAUSAL, False)
    sums, top, mass = _walk(sums, top, mass, queries, row, k, v, whole, last, rows, k_row, v_row, scale2,
                            K, BLOCK_K, BLOCK_N, CAUSAL, True)
    empty = mass == 0  # a row that saw no key at all: its result is 0, and its weights in backward are 2^(s - inf) = 0
    mass = tl.where(empty, 1.0, mass)
    _put(out, row, rows, out_row, sums / mass[:, None], K, BLOCK_K)
    tl.store(lse + head * total + begin + row, tl.where(empty, float("inf"), top + tl.log2(mass)), mask=row < rows)


@jit
def _backward_q(q, k, v, out, grad, dq, lse, delta, cu_seqlens, q_row, k_row, v_row, out_row, total, scale, scale2,
                GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
                BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """dq of BLOCK_Q queries, and delta (H, T) for the other kernel. Grid as in `_forward`."""
    block, head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens + sequence)
    rows = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    if block * BLOCK_Q >= rows:
        return
    q, k, v = q + begin * q_row + head * K, k + begin * k_row + head // GROUP * K, v + begin * v_row + head // GROUP * K
    dense, stat = begin * out_row + head * K, head * total + begin
    row = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    do = _tile(grad + dense, row, rows, out_row, K, BLOCK_K, True)
    o = _tile(out + dense, row, rows, out_row, K, BLOCK_K, True)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + stat + row, sums, mask=row < rows)
    queries = _tile(q, row, rows, q_row, K, BLOCK_K, True)
    height = tl.load(lse + stat + row, mask=row < rows, other=float("inf"))
    gathered = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    last = rows
    if CAUSAL:
        last = tl.minimum(rows, (block + 1) * BLOCK_Q)
    for at in range(0, last, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        keys = _tile(k, key, rows, k_row, K, BLOCK_K, True)
        p = tl.exp2(tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale2 - height[:, None])
        if CAUSAL:  # which leaves out the keys beyond the last row as well
            p = tl.where(key[None, :] <= row[:, None], p, 0.0)
        else:
            p = tl.where(key[None, :] < rows, p, 0.0)
        values = _tile(v, key, rows, v_row, K, BLOCK_K, True)
        ds = p * (tl.dot(do, tl.trans(values), input_precision="tf32x3") - sums[:, None])  # (Q, N)
        gathered = tl.dot(ds.to(keys.dtype), keys, gathered, input_precision="tf32x3")
    _put(dq + dense, row, rows, out_row, gathered * scale, K, BLOCK_K)


@jit
def _backward_kv(q, k, v, grad, dk, dv, lse, delta, cu_seqlens, q_row, k_row, v_row, out_row, dk_row, total, scale,
                 scale2, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
                 BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """dk and dv of BLOCK_N keys, of all queries of the group. Grid: blocks of keys, key heads, sequences."""
    block, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens + sequence)
    rows = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    if block * BLOCK_N >= rows:
        return
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = _tile(k + begin * k_row + kv_head * K, key, rows, k_row, K, BLOCK_K, True)
    values = _tile(v + begin * v_row + kv_head * K, key, rows, v_row, K, BLOCK_K, True)
    for_k, for_v = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = 0
    if CAUSAL:
        first = block * BLOCK_N // BLOCK_Q * BLOCK_Q
    steps = (rows - first + BLOCK_Q - 1) // BLOCK_Q  # of each query head
    for step in range(0, GROUP * steps):
        head = kv_head * GROUP + step // steps
        q_head, grad_head, stat = q + begin * q_row + head * K, grad + begin * out_row + head * K, head * total + begin
        row = first + step % steps * BLOCK_Q + tl.arange(0, BLOCK_Q)
        queries = _tile(q_head, row, rows, q_row, K, BLOCK_K, True)
        height = tl.load(lse + stat + row, mask=row < rows, other=float("inf"))  # no row, no weight
        p = tl.exp2(tl.dot(keys, tl.trans(queries), input_precision="tf32x3") * scale2 - height[None, :])  # (N, Q)
        if CAUSAL:
            p = tl.where(key[:, None] <= row[None, :], p, 0.0)
        do = _tile(grad_head, row, rows, out_row, K, BLOCK_K, True)
        for_v = tl.dot(p.to(do.dtype), do, for_v, input_precision="tf32x3")
        sums = tl.load(delta + stat + row, mask=row < rows, other=0.0)
        ds = p * (tl.dot(values, tl.trans(do), input_precision="tf32x3") - sums[None, :])
        for_k = tl.dot(ds.to(queries.dtype), queries, for_k, input_precision="tf32x3")
    place = begin * dk_row + kv_head * K
    _put(dk + place, key, rows, dk_row, for_k * scale, K, BLOCK_K)
    _put(dv + place, key, rows, dk_row, for_v, K, BLOCK_K)


def _obstacle(q, k, v):
    """Why the kernels cannot compute this, or None."""
    if q.dtype not in DTYPES or q.shape[2] > LARGEST_HEAD:
        return f"q {tuple(q.shape)} {q.dtype}, where head dims up to {LARGEST_HEAD} in 16 or 32 bits are known"
    for name, x in zip("qkv", (q, k, v)):
        if x.stride()[1:] != (x.shape[2], 1):
            return f"the heads of {name} {tuple(x.shape)} do not lie side by side, its strides are {x.stride()}"


class _TritonAttention(torch.autograd.Function):
    """The three kernels above, launched."""

    @staticmethod
    def forward(ctx, q, k, v, packing, causal):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packing, ctx.causal = packing, causal
        strides = (x.stride(0) for x in (q, k, v, out))
        _launch("forward", q, k, packing, causal, (
            q, k, v, out, lse, packing.cu_seqlens, *strides, len(q), q.shape[2] ** -0.5 * LOG2E))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        grad, delta, scale = grad.contiguous(), torch.empty_like(lse), q.shape[2] ** -0.5
        strides = [x.stride(0) for x in (q, k, v, out)]
        _launch("backward_q", q, k, ctx.packing, ctx.causal, (
            q, k, v, out, grad, dq, lse, delta, ctx.packing.cu_seqlens, *strides, len(q), scale, scale * LOG2E))
        _launch("backward_kv", q, k, ctx.packing, ctx.causal, (
            q, k, v, grad, dk, dv, lse, delta, ctx.packing.cu_seqlens, *strides, dk.stride(0), len(q), scale,
            scale * LOG2E))
        return dq, dk, dv, None, None


def _launch(name, q, k, packing, causal, arguments):
    """Run a kernel with its block sizes: a program for each block of rows, each head, each sequence."""
    kernel = {"forward": _forward, "backward_q": _backward_q, "backward_kv": _backward_kv}[name]
    constants, options = blocks(name, q.shape[2], q.dtype)
    own, heads = ("BLOCK_N", k.shape[1]) if name == "backward_kv" else ("BLOCK_Q", q.shape[1])
    grid = triton.cdiv(packing.max_seqlen, constants[own]), heads, packing.count
    with torch.cuda.device_of(q):
        kernel[grid](*arguments, GROUP=q.shape[1] // k.shape[1], K=q.shape[2], CAUSAL=causal, **constants, **options)


def blocks(name, head_dim, dtype):
    """-> the constants BLOCK_K, BLOCK_Q and BLOCK_N of a kernel, and the options that it is launched with."""
    block_k = max(16, triton.next_power_of_2(head_dim))  # the tensor cores multiply 16 columns at least
    table = BLOCKS32 if dtype == torch.float32 and not INTERPRETED else BLOCKS  # the interpreter likes large blocks
    block_q, block_n, warps, stages = table[name][64 if block_k <= 64 else 128]
    return ({"BLOCK_K": block_k, "BLOCK_Q": block_q, "BLOCK_N": block_n}, {"num_warps": warps, "num_stages": stages})


# ------------------------------------------------------------------------------------------- in Triton: one query each
#
# A step of decoding reads every key and value once and computes next to nothing, so that all multiprocessors must read
# at the same time, also where there is one sequence only: its cells are cut into parts, a program each, and the results
# of the parts are weighed by their lse and added up in a second kernel, in their order.

CELLS = (512, 256, 128)  # of a part: the largest that gives every multiprocessor of a large GPU something to do
PROGRAMS = 264


@jit
def _part(q, keys, values, starts, lengths, out, lse, cell_stride, heads, scale2, GROUP: tl.constexpr,
          BLOCK_G: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One part of what one row looks at, for its queries of one key head. out (parts, T, H, K), lse (parts, T, H)."""
    part, kv_head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + at).to(tl.int32)
    past = tl.load(starts + at).to(tl.int64) * cell_stride + kv_head * K
    row = tl.arange(0, BLOCK_G)  # the queries that share this key head, and others up to the 16 that a product needs
    place = at * heads + kv_head * GROUP
    queries = _tile(q + place * K, row, GROUP, K, K, BLOCK_K, True)
    sums = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    top, mass = tl.full((BLOCK_G,), float("-inf"), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    first = part * CELLS
    sums, top, mass = _walk(sums, top, mass, queries, row, keys + past, values + past, first,
                            tl.minimum(length, first + CELLS), length, cell_stride, cell_stride, scale2,
                            K, BLOCK_K, BLOCK_N, False, True)
    empty = mass == 0  # a part that begins behind the last cell
    mass = tl.where(empty, 1.0, mass)
    place += part * tl.num_programs(2) * heads
    _put(out + place.to(tl.int64) * K, row, GROUP, K, sums / mass[:, None], K, BLOCK_K)
    tl.store(lse + place + row, tl.where(empty, float("-inf"), top + tl.log2(mass)), mask=row < GROUP)


@jit
def _join(parts, lse, out, count, rows, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """The parts (count, T * H, K) of one query of one head -> its row of out (T * H, K)."""
    at, part = tl.program_id(0), tl.arange(0, BLOCK_P)
    heights = tl.load(lse + part * rows + at, mask=part < count, other=float("-inf"))
    highest = tl.max(heights, 0)
    weights = tl.exp2(heights - tl.where(highest == float("-inf"), 0.0, highest))
    numbers = _tile(parts + at.to(tl.int64) * K, part.to(tl.int64), count, rows * K, K, BLOCK_K, True)
    mass = tl.sum(weights, 0)
    mixed = tl.sum(weights[:, None] * numbers, 0) / tl.where(mass == 0, 1.0, mass)
    column = tl.arange(0, BLOCK_K)
    tl.store(out + at.to(tl.int64) * K + column, mixed.to(out.dtype.element_ty), mask=column < K)


def _cache_obstacle(q, keys, values):
    """Why the kernels cannot compute this, or None."""
    if q.dtype not in DTYPES or q.shape[2] > LARGEST_HEAD:
        return f"q {tuple(q.shape)} {q.dtype}, where head dims up to {LARGEST_HEAD} in 16 or 32 bits are known"
    if keys.stride() != values.stride() or keys.stride()[1:] != (q.shape[2], 1) or not q.is_contiguous():
        return ("q, and the heads of a cell, do not lie side by side: the strides of q, keys and values are "
                f"{q.stride()}, {keys.stride()}, {values.stride()}")


def _attend_in_parts(q, keys, values, starts, lengths, longest):
    """Both kernels, launched."""
    (rows, heads, dim), kv_heads, group = q.shape, keys.shape[1], q.shape[1] // keys.shape[1]
    longest = int(lengths.max()) if longest is None else longest
    cells = next((c for c in CELLS if triton.cdiv(longest, c) * kv_heads * rows >= PROGRAMS), CELLS[-1])
    count, out = max(1, triton.cdiv(longest, cells)), torch.empty_like(q)
    parts, lse = (q.new_empty(count, rows, heads, *last, dtype=torch.float32) for last in ((dim,), ()))
    part, join = parts_of(dim, group, cells, count, q.dtype)
    starts, lengths = starts.contiguous(), lengths.contiguous()
    with torch.cuda.device_of(q):
        _part[count, kv_heads, rows](q, keys, values, starts, lengths, parts, lse, keys.stride(0), heads,
                                     dim**-0.5 * LOG2E, **part[0], **part[1])
        _join[rows * heads,](parts, lse, out, count, rows * heads, **join[0], **join[1])
    return out


def parts_of(head_dim, group, cells, count, dtype):
    """-> constants and options of `_part`, and of `_join`."""
    sizes = {"K": head_dim, "BLOCK_K": max(16, triton.next_power_of_2(head_dim))}
    block = {"BLOCK_N": 32 if dtype == torch.float32 else 64, "BLOCK_G": max(16, triton.next_power_of_2(group))}
    return (({"GROUP": group, "CELLS": cells, **block, **sizes}, {"num_warps": 4, "num_stages": 3}),
            ({"BLOCK_P": triton.next_power_of_2(count), **sizes}, {"num_warps": 4}))
