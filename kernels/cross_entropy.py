"""lm_head and cross-entropy as one operation: the loss over a large vocabulary without holding its scores.

With V = 49,152 words the float32 scores of 360 rows are 71 MB, and the plain way makes them four times: scores, their
logarithmic softmax, and the gradients of both. Here a few rows at a time go all the way to their gradient, which is
known at once (softmax minus one-hot). Only that is kept, in the weight's dtype, and only if the weight is trained.

Legend: R rows (those that carry a label), C rows of a chunk, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

from kernels.choice import INTERPRETED, jit, tl, triton, use_triton

SCORES = {"cpu": 2**23, "cuda": 2**27}  # V * C at most: 32 and 512 MB. Each chunk reads the weight once more, so on a
#                                         CPU 2**21 is 1.2x slower


def linear_cross_entropy(hidden, weight, labels):
    """Mean of -log softmax(hidden weight^T)[label]. hidden (R, D), weight (V, D), labels (R,) -> float32 scalar.

    The numbers of F.cross_entropy(F.linear(hidden, weight).float(), labels), NaN if R is 0. Head and loss of 360 rows
    in bfloat16 take 0.32 instead of 0.44 s, a whole stage-1 step of SmolLM2-135M 1.13x less (one thread, EPYC Zen 4).
    """
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"the loss expects hidden (R, D), weight (V, D) and labels (R,); got {shapes}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or labels.dtype != torch.int64:
        raise ValueError("the loss expects hidden and weight of one floating dtype and int64 labels; got "
                         f"{hidden.dtype}, {weight.dtype} and {labels.dtype} with {shapes}")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels)
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        rows, chunk = len(hidden), max(1, SCORES.get(hidden.device.type, SCORES["cuda"]) // len(weight))
        loss, grad_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        kept = hidden.new_empty(rows, len(weight)) if ctx.needs_input_grad[1] else None  # (R, V)
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            losses, grad = losses_and_gradient(F.linear(hidden[part], weight), labels[part])
            loss += losses.sum()
            grad_hidden[part] = grad @ weight
            if kept is not None:
                kept[part] = grad
        ctx.save_for_backward(grad_hidden, hidden, kept)
        ctx.rows = rows
        return loss / rows

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, hidden, kept = ctx.saved_tensors
        scale = scale / max(ctx.rows, 1)  # float32, and only now: float16 holds neither 2^16 nor 1e-8
        grad_weight = None if kept is None else kept.t() @ hidden * scale  # (V, D)
        return grad_hidden * scale, grad_weight, None


def losses_and_gradient(scores, labels):
    """scores (C, V), which may be overwritten, labels (C,) -> losses (C,) float32, -log softmax(scores)[label], and
    their gradient (C, V) in the scores' dtype, softmax(scores) - one-hot."""
    fits = scores.is_contiguous() and scores.dtype in DTYPES
    if not use_triton("cross_entropy", scores, None if fits else f"scores {tuple(scores.shape)} of {scores.dtype}"):
        return losses_and_gradient_reference(scores, labels)
    if INTERPRETED and scores.dtype == torch.bfloat16:  # with which the interpreter computes nonsense
        losses, gradient = losses_and_gradient(scores.float(), labels)
        return losses, gradient.to(scores.dtype)
    losses = scores.new_empty(len(scores), dtype=torch.float32)
    constants, options = block_of(scores.shape[1])
    with torch.cuda.device_of(scores):
        _row[len(scores),](scores, labels, losses, **constants, **options)
    return losses, scores


def losses_and_gradient_reference(scores, labels):
    """The same, step by step."""
    dtype, scores, label = scores.dtype, scores.float(), labels[:, None]
    scores -= scores.amax(-1, keepdim=True)
    right = scores.gather(1, label)
    total = scores.exp_().sum(-1, keepdim=True)
    losses = total.log() - right
    scores /= total
    return losses.squeeze(1), scores.scatter_add_(1, label, -torch.ones_like(right)).to(dtype)


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# A program takes one row. The reference reads and writes the row eight times, in float32; here a row of up to 32,768
# scores is read once, stays in registers and is overwritten by its gradient: 4 bytes of traffic per score in bfloat16.
# Longer rows are walked over twice, the second time mostly out of the cache.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WHOLE, BLOCK = 32768, 8192  # the longest row that 1024 threads hold, 32 numbers each; what they hold of a longer one


@jit
def _row(scores, labels, losses, V: tl.constexpr, BLOCK: tl.constexpr):
    """losses[row], and the row's scores turned into softmax - one-hot."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * V
    label = tl.load(labels + row)
    right = tl.load(scores + label, mask=(label >= 0) & (label < V), other=float("-inf")).to(tl.float32)
    column = tl.arange(0, BLOCK)
    if V <= BLOCK:
        s = tl.load(scores + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top = tl.max(s, 0)
        p = tl.exp(s - top)
        mass = tl.sum(p, 0)
        gradient = tl.where(column == label, p / mass - 1, p / mass)
        tl.store(scores + column, gradient.to(scores.dtype.element_ty), mask=column < V)
    else:
        highest, sums = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):  # each lane has a softmax of its own, and they are joined at the end
            s = tl.load(scores + first + column, mask=first + column < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, s)
            sums = sums * tl.exp(highest - higher) + tl.exp(s - higher)
            highest = higher
        top = tl.max(highest, 0)
        mass = tl.sum(sums * tl.exp(highest - top), 0)
        for first in range(0, V, BLOCK):
            s = tl.load(scores + first + column, mask=first + column < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(s - top) / mass
            gradient = tl.where(first + column == label, p - 1, p)
            tl.store(scores + first + column, gradient.to(scores.dtype.element_ty), mask=first + column < V)
    tl.store(losses + row, tl.log(mass) + top - right)


def block_of(vocabulary):
    """-> the constants of `_row`, and the options that it is launched with."""
    block = triton.next_power_of_2(vocabulary) if vocabulary <= WHOLE else BLOCK
    return {"V": vocabulary, "BLOCK": block}, {"num_warps": min(max(block // 512, 4), 32)}
