"""The work between the matrix products, each as one operation: RMSNorm, rotary positions, and SwiGLU's product.

Written out, each of their steps is a pass over memory and leaves a tensor behind for the backward pass, in float32 at
that. Here a few rows at a time go through all steps while they lie in a core's cache, and only what cannot be computed
again is kept: the norm's input in its own dtype, the two factors of SwiGLU.

Legend: T rows, D width, F inner width of the MLP, H heads, G query heads that share a key head, K head dim.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.choice import INTERPRETED, jit, tl, triton, use_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that Triton's kernels take
CHUNK = 2**16  # numbers that go through all steps together on a CPU: 256 KB in float32. The backward of 1115 x 576 in
#                bfloat16 takes 1.0 ms so, and 4.7 ms in whole passes (one thread, EPYC Zen 4)


def _chunks(*tensors):
    """Tensors of T rows -> tuples of the same few rows of each; on a GPU all at once."""
    rows, width = tensors[0].shape
    return zip(*(x.split(max(1, CHUNK // width) if x.device.type == "cpu" else rows) for x in tensors))


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, the quotient computed in float32 and rounded to x's dtype (Zhang and Sennrich
    2019). x (T, D), weight (D,) -> (T, D)."""
    _check("rms_norm expects x (T, D) and weight (D,)", (x, weight), x.dim() == 2 and weight.shape == x.shape[1:])
    if not use_triton("elementwise", x, _obstacle(x)):
        if torch.is_grad_enabled() or x.numel() > 16 * CHUNK:
            return _RmsNorm.apply(x, weight, eps)
        if len(x) == 1 and x.device.type == "cpu" and eps:  # a token of an answer, where each operation counts: 8 us
            length = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
            return x * (length**2 / x.shape[1] + eps) ** -0.5 * weight
        return F.rms_norm(x, weight.shape, eps=eps) * weight  # 14 us; with what a gradient needs, 57
    if INTERPRETED and x.dtype == torch.bfloat16:  # with which the interpreter computes nonsense
        return _TritonRmsNorm.apply(x.float(), weight.float(), eps).to(torch.promote_types(x.dtype, weight.dtype))
    return _TritonRmsNorm.apply(x, weight, eps)


def add_rms_norm(x, more, weight, eps):
    """A residual and the norm behind it: x + more, and rms_norm of that. x, more (T, D) -> (T, D), (T, D)"""
    _check("add_rms_norm expects x and more (T, D) and weight (D,)", (x, more, weight), (
        x.dim() == 2 and x.shape == more.shape and weight.shape == x.shape[1:]))
    apart = x.dtype != more.dtype or INTERPRETED and x.dtype == torch.bfloat16
    if apart or not use_triton("elementwise", x, _obstacle(x, more)):
        total = x + more
        return total, rms_norm(total, weight, eps)
    return _TritonAddRmsNorm.apply(x, more, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and 1 / sqrt(mean(x^2) + eps), (T, 1) float32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, inverse = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), x.new_empty(
            len(x), 1, dtype=torch.float32)
        for some, result, scale in _chunks(x, out, inverse):
            wide = some.float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps, out=scale)
            torch.mul((wide * scale).to(x.dtype), weight, out=result)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad):
        """dx = (h - y mean(h y)) / rms, where y = x / rms and h = grad * weight."""
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32)
        for some, come, scale, result in _chunks(x, grad, inverse, grad_x):
            y = some.float() * scale
            if grad_weight is not None:
                grad_weight += (come * y.to(x.dtype)).sum(0, dtype=torch.float32)
            h = (come * weight).float()
            result.copy_(h.addcmul_(y, (h * y).mean(-1, keepdim=True), value=-1).mul_(scale))
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020). (T, F), (T, F) -> (T, F)"""
    _check("swiglu expects gate and up (T, F) of one dtype", (gate, up), (
        gate.dim() == 2 and gate.shape == up.shape and gate.dtype == up.dtype))
    if not use_triton("elementwise", gate, _obstacle(gate, up)):
        return _SwiGlu.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
    if INTERPRETED and gate.dtype == torch.bfloat16:
        return _TritonSwiGlu.apply(gate.float(), up.float()).to(gate.dtype)
    return _TritonSwiGlu.apply(gate, up)


class _SwiGlu(torch.autograd.Function):
    """Keeps both factors; autograd's own way keeps silu(gate), too."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for a, b, come, to_gate, to_up in _chunks(gate, up, grad, grad_gate, grad_up):
            torch.mul(F.silu(a), come, out=to_up)
            torch.ops.aten.silu_backward.grad_input(come * b, a, grad_input=to_gate)
        return grad_gate, grad_up


def rotate(q, k, cos, sin):
    """Turn each pair (i, i + K/2) of every head by its angle (Su et al. 2021). q (T, H, K), k (T, H/G, K), cos and sin
    (T, 1, K), both halves of which are the same -> q and k, turned."""
    _check("rotate expects q (T, H, K), k (T, H/G, K), cos and sin (T, 1, K)", (q, k, cos, sin), (
        q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2] and q.shape[2] % 2 == 0
        and cos.shape == sin.shape == (len(q), 1, q.shape[2])))
    if not use_triton("elementwise", q, _obstacle(q, k, cos, sin)):
        if torch.is_grad_enabled():
            return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)
        # without a gradient both at once: for one row 20 instead of 30 us
        return _rotate_reference(torch.cat([q, k], 1), cos, sin).split_with_sizes([q.shape[1], k.shape[1]], 1)
    if INTERPRETED and q.dtype == torch.bfloat16:
        return tuple(x.to(q.dtype) for x in _TritonRotate.apply(*(x.float() for x in (q, k, cos, sin))))
    return _TritonRotate.apply(q, k, cos, sin)


def rotate_into(q, k, v, cos, sin, keys, values, cells):
    """A step of decoding: q and k are turned, k and v written to a cache. k, v (T, H/G, K); keys, values (…, H/G, K);
    cells (T,) int64: of each row, which row of them it becomes. -> q, turned; without a gradient."""
    apart = keys.dtype != k.dtype or INTERPRETED and q.dtype == torch.bfloat16
    if apart or not use_triton("elementwise", q, _obstacle(q, k, v, keys, values, cos, sin)):
        q, k = rotate(q, k, cos, sin)
        keys.index_copy_(0, cells, k)
        values.index_copy_(0, cells, v)
        return q
    return _turned(q, k, cos.contiguous(), sin.contiguous(), False, v, keys, values, cells)[0]


def _rotate_reference(x, cos, sin):
    """x (T, H, K), turned."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# What counts here is how often a number crosses the memory bus: a kernel reads its inputs once and writes its results
# once. Bytes for each number of x, q and k, or gate, in bfloat16, beside the references' steps on a GPU:
#
#                        kernel    reference
#     rms_norm              4         36      to float32, square, mean, times, round, times weight
#       backward            6         66
#     add_rms_norm          8         42      the residual's sum is read once less than by two kernels (10)
#       backward            8         72      and so are both gradients (12)
#     rotate                4         20      times cos, negate half, join, times sin, add
#       backward            4         30
#     swiglu                6         10      silu, times
#       backward           10         22
#
# LLaMA-7B has two norms of D = 4096, one of them with a sum, D of q and of k, and F = 11,008: 0.35 instead of 1.65 MB
# for each token and layer, and for a step of 12,800 tokens 33 instead of 157 ms at an H200's 4.3 TB/s. To take the
# sum into the norm is 2.3 ms of it. (Computed, not measured.) The other norm stands behind another layer's sum, and is
# left alone.
#
# rotate writes beside q and k, not over them: that is as much traffic, and nobody keeps the originals.

PROGRAMS = 528  # that share the rows of a norm's backward: four to each multiprocessor of the largest GPU
COLUMNS = 2048  # of SwiGLU that a program takes


@jit
def _norm(x, more, both, weight, out, inverse, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr):
    """A row of rms_norm, and its 1 / sqrt(mean(x^2) + eps). ADDED: of x + more, which is put into both."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    numbers = tl.load(x + row * D + column, mask=column < D, other=0.0)
    if ADDED:
        other = tl.load(more + row * D + column, mask=column < D, other=0.0)
        numbers = (numbers.to(tl.float32) + other.to(tl.float32)).to(numbers.dtype)
        tl.store(both + row * D + column, numbers, mask=column < D)
    wide = numbers.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(inverse + row, scale)
    y = (wide * scale).to(numbers.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (y * factor).to(out.dtype.element_ty), mask=column < D)


@jit
def _norm_backward(x, weight, inverse, grad, past, grad_x, partial, rows, D: tl.constexpr, BLOCK: tl.constexpr,
                   TRAINED: tl.constexpr, ADDED: tl.constexpr):
    """dx of every so many-th row. TRAINED: and partial (programs, D), what these rows add to the weight's gradient.
    ADDED: past is the gradient that came past the norm, and is added."""
    column, gathered = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.cast(at, tl.int64) * D + column
        numbers = tl.load(x + place, mask=column < D, other=0.0)
        come = tl.load(grad + place, mask=column < D, other=0.0).to(tl.float32)
        scale = tl.load(inverse + at)
        y = numbers.to(tl.float32) * scale
        if TRAINED:
            gathered += come * y.to(numbers.dtype).to(tl.float32)
        h = come * factor
        dx = (h - y * (tl.sum(h * y, 0) / D)) * scale
        if ADDED:
            dx += tl.load(past + place, mask=column < D, other=0.0).to(tl.float32)
        tl.store(grad_x + place, dx.to(grad_x.dtype.element_ty), mask=column < D)
    if TRAINED:
        tl.store(partial + tl.program_id(0) * D + column, gathered, mask=column < D)


@jit
def _turn(q, k, v, out_q, out_k, out_v, cos, sin, cells, q_row, k_row, v_row, keys_row, HEADS: tl.constexpr,
          KV_HEADS: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BACK: tl.constexpr,
          STORED: tl.constexpr):
    """All heads of one row of q and of k turned, or turned back. BLOCK_K: of K/2. STORED: k and v go to other rows of
    out_k and out_v."""
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)[None, :]
    c = tl.load(cos + row * K + pair, mask=pair < K // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + row * K + pair, mask=pair < K // 2, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    _turn_heads(q + row * q_row, out_q + row * HEADS * K, c, s, pair, HEADS, K, BLOCK_H)
    place = row
    if STORED:
        place = tl.load(cells + row)
        column = tl.arange(0, BLOCK_H * BLOCK_K * 2)
        numbers = tl.load(v + row * v_row + column, mask=column < KV_HEADS * K)
        tl.store(out_v + place * keys_row + column, numbers, mask=column < KV_HEADS * K)
    _turn_heads(k + row * k_row, out_k + place * keys_row, c, s, pair, KV_HEADS, K, BLOCK_H)


@jit
def _turn_heads(x, out, c, s, pair, HEADS: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """The heads that lie from x on."""
    head = tl.arange(0, BLOCK_H)[:, None]
    inside, place = (head < HEADS) & (pair < K // 2), head * K + pair
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + K // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + K // 2, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@jit
def _gate(gate, up, out, gate_row, up_row, out_row, F, BLOCK: tl.constexpr):
    """silu(gate) * up of some columns of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + row * gate_row + column, mask=column < F, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + column, mask=column < F, other=0.0).to(tl.float32)
    product = a / (1 + tl.exp(-a)) * b
    tl.store(out + row * out_row + column, product.to(out.dtype.element_ty), mask=column < F)


@jit
def _gate_backward(gate, up, grad, grad_gate, grad_up, gate_row, up_row, out_row, F, BLOCK: tl.constexpr):
    """d silu(a) = sigmoid(a) (1 + a (1 - sigmoid(a)))"""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + row * gate_row + column, mask=column < F, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + column, mask=column < F, other=0.0).to(tl.float32)
    come = tl.load(grad + row * out_row + column, mask=column < F, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-a))
    target = row * out_row + column
    tl.store(grad_up + target, (come * a * sigmoid).to(grad_up.dtype.element_ty), mask=column < F)
    slope = sigmoid * (1 + a * (1 - sigmoid))
    tl.store(grad_gate + target, (come * b * slope).to(grad_gate.dtype.element_ty), mask=column < F)


class _TritonRmsNorm(torch.autograd.Function):
    """Keeps x and the rows' 1 / sqrt(mean(x^2) + eps), as the reference does."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        out, inverse = _launch_norm(x, None, None, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_launch_norm_backward(*ctx.saved_tensors, grad, None, ctx.needs_input_grad[1]), None


class _TritonAddRmsNorm(torch.autograd.Function):
    """The same of x + more, which is the first result."""

    @staticmethod
    def forward(ctx, x, more, weight, eps):
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        out, inverse = _launch_norm(x.contiguous(), more.contiguous(), total, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, past, grad):
        both, grad_weight = _launch_norm_backward(*ctx.saved_tensors, grad, past, ctx.needs_input_grad[2])
        return both, both, grad_weight, None


def _launch_norm(x, more, total, weight, eps):
    """-> out (T, D), inverse (T,)"""
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    inverse, (constants, options) = x.new_empty(len(x), dtype=torch.float32), norm_of(x.shape[1])
    if len(x):
        with torch.cuda.device_of(x):
            _norm[len(x),](x, x if more is None else more, x if more is None else total, weight, out, inverse, eps,
                           ADDED=more is not None, **constants, **options)
    return out, inverse


def _launch_norm_backward(x, weight, inverse, grad, past, trained):
    """-> gradients of x and, if trained, of weight"""
    programs, grad_x, grad = max(1, min(len(x), PROGRAMS)), torch.empty_like(x), grad.contiguous()
    partial = x.new_empty(programs if trained else 0, x.shape[1], dtype=torch.float32)
    added, (constants, options) = past is not None, norm_of(x.shape[1])
    with torch.cuda.device_of(x):
        _norm_backward[programs,](x, weight, inverse, grad, past.contiguous() if added else grad, grad_x, partial,
                                  len(x), TRAINED=trained, ADDED=added, **constants, **options)
    return grad_x, partial.sum(0).to(weight.dtype) if trained else None


def norm_of(width):
    """-> the constants of both norm kernels, and the options that they are launched with."""
    block = triton.next_power_of_2(width)
    return {"D": width, "BLOCK": block}, {"num_warps": min(max(block // 512, 1), 16)}


class _TritonRotate(torch.autograd.Function):
    """q and k; a turn's gradient is the turn back."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        return *_turned(grad_q.contiguous(), grad_k.contiguous(), *ctx.saved_tensors, True), None, None


def _turned(q, k, cos, sin, back, v=None, keys=None, values=None, cells=None):
    """`_turn`, launched. With v, k and v go to cells of keys and values."""
    out_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    out_k = torch.empty_like(k, memory_format=torch.contiguous_format) if v is None else keys
    constants, options = turn_of(q.shape[1], k.shape[1], q.shape[2])
    if len(q):
        with torch.cuda.device_of(q):
            _turn[len(q),](q, k, k if v is None else v, out_q, out_k, out_k if v is None else values, cos, sin,
                           k if cells is None else cells, q.stride(0), k.stride(0), 0 if v is None else v.stride(0),
                           out_k.stride(0), BACK=back, STORED=v is not None, **constants, **options)
    return out_q, out_k


def turn_of(heads, kv_heads, head_dim):
    """-> the constants of `_turn`, and the options that it is launched with."""
    return {"HEADS": heads, "KV_HEADS": kv_heads, "K": head_dim, "BLOCK_H": triton.next_power_of_2(heads),
            "BLOCK_K": triton.next_power_of_2(head_dim // 2)}, {"num_warps": 4}


class _TritonSwiGlu(torch.autograd.Function):
    """Keeps both factors, as the reference does."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launch_gate(_gate, gate, up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        _launch_gate(_gate_backward, gate, up, grad.contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


def _launch_gate(kernel, gate, up, *others):
    """Run a kernel of SwiGLU over rows and blocks of columns."""
    rows, width = gate.shape
    if rows:
        with torch.cuda.device_of(gate):
            kernel[rows, triton.cdiv(width, COLUMNS)](gate, up, *others, gate.stride(0), up.stride(0), width, width,
                                                      BLOCK=COLUMNS, num_warps=4)


def _check(name, tensors, shapes):
    """ValueError unless all tensors are of one floating dtype and `shapes` is true."""
    if not shapes or not all(x.is_floating_point() for x in tensors):
        raise ValueError(f"{name}; got " + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors))


def _obstacle(*rows):
    """Why the kernels cannot take these matrices, or heads, row by row; None if they can."""
    for x in rows if triton else ():
        inner = x.stride()[1:] if x.dim() == 2 else (x.stride(2), x.stride(1) // x.shape[2])
        if x.dtype not in DTYPES or any(step != 1 for step in inner):
            return f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}: rows of 16 or 32 bits without gaps are known"
