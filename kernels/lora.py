"""A linear layer with a low-rank adapter as one operation: y = x W^T + b + s (m x) A^T B^T, W frozen.

Written as separate layers, autograd keeps x, drop(x), its mask and drop(x) A^T for every matrix. Here it keeps x alone,
and since that is the tensor that came in, q, k and v (gate and up) share one. The mask m of dropout is drawn again from
its seed; (m x) A^T is computed again, r columns beside the layer's thousands. The order of the products never makes an
(out, in) matrix beside W: neither B A nor a gradient of W exists. Dropout's factor 1 / (1 - chance) is in s.

    forward   h = (m x) A^T           y  = x W^T + b + s h B^T
    backward  g = s dy B              dx = dy W + m (g A)         dA = g^T (m x)      dB = s dy^T h

A step of SmolLM2's shape with r = 16 (10 layers, 456 tokens, bfloat16, one thread) takes 0.52 of PEFT's time, 0.56 with
dropout, and 0.27 and 0.23 of its memory above the weights.

Legend: T rows, in and out the widths of W (out, in), r the rank, A (r, in), B (out, r), s the scale, m (T, in).
"""

import torch
import torch.nn.functional as F

from kernels.choice import INTERPRETED, jit, tl, triton, use_triton


def lora_linear(x, dense, bias, A, B, scale, dropout=0.0, seed=0):
    """x (…, in) -> (…, out). bias (out,) or None.

    dense: () -> W (out, in), asked for in forward and once more in backward: a sharded W is the gathered one both
    times, a quantised W is decoded anew. dropout: the chance of each number of x to be left out on its way to A; seed:
    of this call's mask.
    """
    return _LoraLinear.apply(x, dense, bias, A, B, scale / (1 - dropout), dropout, seed)


def left_out(x, chance, seed):
    """Which numbers of x (T, in) dropout leaves out -> (T, in) bool; the same seed draws the same ones.

    16 random bits decide about a number, four numbers share a draw: on a CPU 4 times as fast as bernoulli_.
    """
    generator, count = torch.Generator(x.device).manual_seed(seed), x.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
    return (bits.view(torch.int16)[:count] < round(chance * 2**16) - 2**15).view(x.shape)


def merge(weight, A, B, scale, dtype):
    """W + s B A, computed in float32 and cast -> (out, in), and how much of the correction the cast takes: the squares
    of its error and of s B A, summed up."""
    correction = scale * B.float() @ A.float()
    merged = (weight.float() + correction).to(dtype)
    return merged, [(merged.float() - weight.float() - correction).square().sum(), correction.square().sum()]


class _LoraLinear(torch.autograd.Function):
    """The formulas at the head of this file."""

    @staticmethod
    def forward(ctx, x, dense, bias, A, B, scale, dropout, seed):
        ctx.save_for_backward(x, A, B)
        ctx.dense, ctx.scale, ctx.dropout, ctx.seed = dense, scale, dropout, seed
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        ctx.fused = use_triton("lora", rows, _obstacle(rows, A),
                               slow=not dropout or x.dtype == torch.float32)
        y = F.linear(rows, dense(), bias)  # (T, out)
        if dropout and not ctx.fused:
            rows = rows.masked_fill(left_out(rows, dropout, seed), 0)
        h = narrow(rows, A, dropout, seed) if ctx.fused else F.linear(rows, A)
        y.addmm_(h, B.t(), alpha=scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        shape, x, dy = x.shape, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (T, in), (T, out)
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        dx = dA = dB = db = None
        g = (dy @ B).mul_(ctx.scale)  # (T, r)
        gone = left_out(x, ctx.dropout, ctx.seed) if ctx.dropout and not ctx.fused else None
        if ctx.fused:
            dA = outer(g, x, ctx.dropout, ctx.seed) if need_A else None
            dB = (dy.t() @ narrow(x, A, ctx.dropout, ctx.seed)).mul_(ctx.scale) if need_B else None
        elif need_A or need_B:
            x = x if gone is None else x.masked_fill(gone, 0)
            dA = g.t() @ x if need_A else None
            dB = (dy.t() @ F.linear(x, A)).mul_(ctx.scale) if need_B else None
        if need_x:
            dx = dy @ ctx.dense()
            if ctx.fused:
                widen(dx, g, A, ctx.dropout, ctx.seed)
            else:
                dx = dx.addmm_(g, A) if gone is None else dx.add_((g @ A).masked_fill_(gone, 0))
            dx = dx.view(shape)
        if need_bias:
            db = dy.sum(0)
        return dx, None, db, dA, dB, None, None, None


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# Without dropout all products above are torch's, each one pass over x, y or dx. (y's second pass, to which s h B^T is
# added, would fall away if B stood beside W in one matrix, as sharded and coded ones cannot.) With it the reference
# moves, for each number of x in 16 bits, 12 bytes forth: random bits out and in (4), the mask (2), x in and, thinned
# out, out and in again (6). Back it moves 14 for the same and a second product with x, and 13 for g A, its thinning and
# the sum. Here the mask is drawn in registers, where a tile of x has just come from memory: 2 bytes forth, 2 + 2 and 4
# back, 10 instead of 39. For a 7B model (35,584 columns in the inputs of a layer's matrices) and 12,800 rows that is
# 13.2 GB less for each layer, 3.1 ms at an H200's 4.3 TB/s, 98 ms in a step of some 650. The draw and all else take
# `_narrow` 15 instructions a number (static, sm_90), about as long as its 2 bytes. Computed, not timed.
#
# A number's fate is decided by 16 bits of Philox (Salmon et al. 2011; 7 rounds, the fewest that pass all tests), whose
# counter is that of eight neighbours, what a thread loads at once. The mask is a function of seed, row and column
# alone, not of the kernel or its block sizes: forward and backward draw the same one. It is not the reference's.
#
# Legend: BLOCK_T rows and 8 * GROUPS columns of x, at a time; BLOCK_R: r rounded up to a power of two, or part of it.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_RANK, PROGRAMS = 256, 264


@jit
def _stays(seed, row, group, width, floor):
    """Which of eight neighbours each dropout does not leave out, (len(row), len(group), 8)."""
    draws = tl.randint4x(seed, row[:, None] * (width // 8) + group[None, :], 7)
    bits = (draws[0] & 0).to(tl.int32)
    for i in tl.static_range(4):
        bits |= ((draws[i] & 0xFFFF) >= floor).to(tl.int32) << 2 * i
        bits |= ((draws[i] >> 16) >= floor).to(tl.int32) << 2 * i + 1
    return (bits[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1) > 0


@jit
def _places(row, group, rows, width, stride):
    """Where they lie, and which there are."""
    there = (row[:, None] < rows) & (group[None, :] < width // 8)
    return row[:, None, None] * stride + (group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]), there[:, :, None]


@jit
def _part(matrix, i, rows, row_stride, j, columns, column_stride):
    """Rows i and columns j of a matrix, zero beyond its edges."""
    place = matrix + i[:, None] * row_stride + j[None, :] * column_stride
    return tl.load(place, mask=(i[:, None] < rows) & (j[None, :] < columns), other=0.0)


@jit
def _narrow(x, A, out, seed, floor, rows, width, rank, x_row, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr,
            BLOCK_R: tl.constexpr):
    """BLOCK_T rows of (m x) A^T, (T, r)."""
    row, r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(0, width // 8, GROUPS):
        group = first + tl.arange(0, GROUPS)
        place, there = _places(row, group, rows, width, x_row)
        numbers = tl.where(_stays(seed, row, group, width, floor), tl.load(x + place, mask=there, other=0.0), 0.0)
        column = first * 8 + tl.arange(0, GROUPS * 8)
        a = _part(A, column, width, 1, r, rank, width)
        sums = tl.dot(tl.reshape(numbers.to(a.dtype), (BLOCK_T, GROUPS * 8)), a, sums, input_precision="tf32x3")
    tl.store(out + row[:, None] * rank + r[None, :], sums.to(out.dtype.element_ty),
             mask=(row[:, None] < rows) & (r[None, :] < rank))


@jit
def _outer(g, x, parts, seed, floor, rows, width, rank, x_row, STEPS: tl.constexpr, BLOCK_T: tl.constexpr,
           GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """8 * GROUPS columns of g^T (m x), over STEPS blocks of rows. parts (splits, r, in)"""
    group, r = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, GROUPS * 8), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        place, there = _places(row, group, rows, width, x_row)
        numbers = tl.where(_stays(seed, row, group, width, floor), tl.load(x + place, mask=there, other=0.0), 0.0)
        some = _part(g, r, rank, 1, row, rows, rank)
        sums = tl.dot(some, tl.reshape(numbers.to(some.dtype), (BLOCK_T, GROUPS * 8)), sums, input_precision="tf32x3")
    column = tl.program_id(0) * GROUPS * 8 + tl.arange(0, GROUPS * 8)
    tl.store(parts + (tl.program_id(1) * rank + r[:, None]) * width + column[None, :], sums,
             mask=(r[:, None] < rank) & (column[None, :] < width))


@jit
def _widen(dx, g, A, seed, floor, rows, width, rank, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr,
           BLOCK_R: tl.constexpr):
    """BLOCK_T rows and 8 * GROUPS columns of dx += m (g A)."""
    row, group = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, GROUPS * 8)
    more = tl.zeros((BLOCK_T, GROUPS * 8), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        some, a = _part(g, row, rows, rank, r, rank, 1), _part(A, r, rank, width, column, width, 1)
        more = tl.dot(some, a, more, input_precision="tf32x3")
    more = tl.reshape(more, (BLOCK_T, GROUPS, 8))
    place, there = _places(row, group, rows, width, width)
    numbers = tl.load(dx + place, mask=there, other=0.0).to(tl.float32)
    numbers += tl.where(_stays(seed, row, group, width, floor), more, 0.0)
    tl.store(dx + place, numbers.to(dx.dtype.element_ty), mask=there)


def _obstacle(x, A):
    """Why the kernels cannot compute this, or None."""
    if x.dtype not in DTYPES or x.shape[1] % 8 or len(A) > LARGEST_RANK or x.numel() >= 2**31:
        return (f"x {tuple(x.shape)} {x.dtype}, rank {len(A)}, where widths of whole eights and ranks up to "
                f"{LARGEST_RANK} in 16 or 32 bits are known")


def narrow(x, A, dropout, seed):
    """(m x) A^T by `_narrow`: (T, in), (r, in) -> (T, r)"""
    dtype, (x, A) = x.dtype, _ready(x, A)
    out = x.new_empty(len(x), len(A))
    constants, options = blocks("narrow", len(A), x.dtype)
    with torch.cuda.device_of(x):
        _narrow[triton.cdiv(len(x), constants["BLOCK_T"]),](
            x, A, out, seed, round(dropout * 2**16), *x.shape, len(A), x.stride(0), **constants, **options)
    return out.to(dtype)


def outer(g, x, dropout, seed):
    """g^T (m x) by `_outer`, the parts added up in their order: (T, r), (T, in) -> (r, in)"""
    dtype, (g, x) = x.dtype, _ready(g, x)
    (rows, width), rank = x.shape, g.shape[1]
    constants, options = blocks("outer", rank, x.dtype)
    across, steps = triton.cdiv(width, 8 * constants["GROUPS"]), triton.cdiv(rows, constants["BLOCK_T"])
    steps = triton.cdiv(steps, max(1, min(PROGRAMS // across, steps // 4)))  # of each split
    splits = triton.cdiv(rows, steps * constants["BLOCK_T"])
    out = x.new_empty(splits, rank, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _outer[across, splits](g, x, out, seed, round(dropout * 2**16), rows, width, rank, x.stride(0), STEPS=steps,
                               **constants, **options)
    return out.sum(0).to(dtype)


def widen(dx, g, A, dropout, seed):
    """dx += m (g A) by `_widen`, in place: (T, in), (T, r), (r, in) -> dx"""
    wide, g, A = _ready(dx, g, A)
    (rows, width), rank = dx.shape, len(A)
    constants, options = blocks("widen", rank, wide.dtype)
    with torch.cuda.device_of(dx):
        _widen[triton.cdiv(rows, constants["BLOCK_T"]), triton.cdiv(width, 8 * constants["GROUPS"])](
            wide, g, A, seed, round(dropout * 2**16), rows, width, rank, **constants, **options)
    return dx if wide is dx else dx.copy_(wide)


def _ready(*tensors):
    """Rows that lie behind each other; in float32 for the interpreter, which computes nonsense with bfloat16."""
    return [(x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x).contiguous() for x in tensors]


def blocks(name, rank, dtype):
    """-> the constants of a kernel, and the options that it is launched with."""
    block_r, small = max(16, triton.next_power_of_2(rank)), dtype == torch.float32 and not INTERPRETED
    block_r = min(block_r, 16 if small else 64) if name == "widen" else block_r
    block_t, groups, warps, stages = (32, 4, 8, 1) if small else {
        "narrow": (64, 8, 4, 3), "outer": (64, 8, 4, 2), "widen": (64, 8, 4, 2)}[name]
    return ({"BLOCK_T": block_t, "GROUPS": groups, "BLOCK_R": block_r},
            {"num_warps": 8 if block_r > 128 else warps, "num_stages": stages})
