"""Kernels beside float64: the same comparisons for Triton's interpreter on a CPU and for a GPU."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernels import attention, cross_entropy, elementwise, nf4
from model import IMAGE_TOKEN_INDEX, LlamaConfig, Llava, LlavaConfig
from vision import ClipVisionConfig

# The largest error that is let pass, relative to the largest number of a tensor.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LENGTHS = {  # of the sequences of a batch
    "odd": [5, 1, 33], "one_token": [1], "blocks": [64, 65], "none_between": [3, 0, 70], "several": [66, 1, 2, 31]}


def numbers(*shape, dtype, device, seed):
    """Normally distributed; rounded to dtype, so that float64 starts from the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def exact_attention(q, k, v, lengths, causal):
    """The formula, sequence by sequence, in float64."""
    group, out = q.shape[1] // k.shape[1], []
    for part in zip(*(x.double().split(lengths) for x in (q, k, v))):
        q1, k1, v1 = (x.transpose(0, 1) for x in part)  # (H, L, K)
        k1, v1 = (x.repeat_interleave(group, 0) for x in (k1, v1))
        scores = q1 @ k1.transpose(1, 2) * q.shape[2] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        out.append((scores.softmax(-1) @ v1).transpose(0, 1))
    return torch.cat(out)


def attention_inputs(lengths, heads, group, dim, dtype, device="cpu", seed=0):
    """q, k, v and a gradient of the result; v is a view into a wider matrix, as a fused projection leaves it."""
    q, grad = (numbers(sum(lengths), heads, dim, dtype=dtype, device=device, seed=2 * seed + i) for i in (0, 1))
    wide = numbers(sum(lengths), 2 * heads // group, dim, dtype=dtype, device=device, seed=2 * seed + 77)
    k, v = wide[:, : heads // group].contiguous(), wide[:, heads // group:]
    return q, k, v, grad


def with_gradients(function, q, k, v, grad):
    """-> out, dq, dk, dv"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))


def check_attention(lengths, heads, group, dim, causal, dtype, device="cpu", seed=0):
    """Result and gradients are those of float64."""
    q, k, v, grad = attention_inputs(lengths, heads, group, dim, dtype, device, seed)
    packing = attention.Packing(torch.tensor([0, *lengths], device=device).cumsum(0))
    ours = with_gradients(lambda *x: attention.attention(*x, packing, causal), q, k, v, grad)
    exact = with_gradients(lambda *x: exact_attention(*x, lengths, causal), q, k, v, grad)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), ours, exact):
        assert mine.dtype == dtype
        close(mine, right, dtype, f"{name} of {lengths}, seed {seed}")


def check_decoding(lengths, heads, group, dim, dtype, device="cpu", room=9):
    """One query per sequence against a cache with more cells than are looked at, all of them full of numbers."""
    q = numbers(len(lengths), heads, dim, dtype=dtype, device=device, seed=0)
    cells = max(lengths) + room
    cache = numbers(2, len(lengths), cells, heads // group, dim, dtype=dtype, device=device, seed=1)
    keys, values = cache[:, :, : max(lengths)]
    out = attention.attend_to_cache(q, keys, values, torch.tensor(lengths, device=device))
    assert out.dtype == dtype
    for b, length in enumerate(lengths):
        queries = q[b].expand(length, heads, dim)  # the last of them sees everything
        right = exact_attention(queries, keys[b, :length], values[b, :length], [length], True)[-1]
        close(out[b], right, dtype, f"sequence {b}")


def check_loss(rows, vocabulary, dtype, device="cpu", seed=0):
    """Losses and gradients of the scores are those of float64."""
    scores = 3 * numbers(rows, vocabulary, dtype=dtype, device=device, seed=seed)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
    exact = scores.double().requires_grad_()
    right = F.cross_entropy(exact, labels, reduction="none")
    right.sum().backward()
    losses, gradient = cross_entropy.losses_and_gradient(scores.clone(), labels)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    close(losses, right, torch.float32, "losses")
    close(gradient, exact.grad, dtype, "gradient")


def exact_turn(x, cos, sin):
    """The formula of rotate for one of q and k."""
    (a, b), (c, s) = x.chunk(2, -1), (table.chunk(2, -1)[0] for table in (cos, sin))
    return torch.cat([a * c - b * s, b * c + a * s], -1)


ELEMENTWISE = {  # ours and the formula, as functions of what has gradients -> a tuple
    "rms_norm": (lambda x, w: (elementwise.rms_norm(x, w, 1e-5),),
                 lambda x, w: (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,)),
    "add_rms_norm": (lambda x, y, w: elementwise.add_rms_norm(x, y, w, 1e-5),
                     lambda x, y, w: (x + y, (x + y) / ((x + y).square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)),
    "swiglu": (lambda a, b: (elementwise.swiglu(a, b),), lambda a, b: (a * a.sigmoid() * b,)),
    "rotate": (elementwise.rotate, lambda q, k, *angles: (exact_turn(q, *angles), exact_turn(k, *angles)))}


def check_elementwise(name, rows, width, dtype, device="cpu"):
    """Results and gradients of rms_norm, rotate (width: of a head) or swiglu are those of the formula in float64; some
    inputs are views into wider matrices, as fused projections leave them."""
    def made(*shape, seed):
        return numbers(*shape, dtype=dtype, device=device, seed=seed)

    fixed = ()
    if name == "rms_norm":
        inputs = made(rows, width, seed=0), made(width, seed=1)
    elif name == "add_rms_norm":
        inputs = *made(rows, 2 * width, seed=0).split(width, 1), made(width, seed=1)
    elif name == "swiglu":
        inputs = made(rows, 2 * width, seed=0).split(width, 1)
    else:
        angle = made(rows, 1, width // 2, seed=1).repeat(1, 1, 2)
        inputs, fixed = made(rows, 5, width, seed=0).split([4, 1], 1), (angle.cos(), angle.sin())
    results = []
    for function, kind in zip(ELEMENTWISE[name], (dtype, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, *(x.to(kind) for x in fixed))
        grads = [made(*x.shape, seed=20 + i).to(kind) for i, x in enumerate(out)]
        results.append([*(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)])
    for mine, right in zip(*results):
        assert mine.dtype == dtype
        close(mine, right, dtype, f"{name} {rows} x {width}")


def check_decoding_of_4_bits(shape, kind, double_quant, dtype, device="cpu"):
    """The same bits as the reference's on a CPU."""
    weight = numbers(*shape, dtype=torch.float32, device="cpu", seed=0)
    parts = nf4.quantise_4bit(weight, kind, double_quant)
    codes, absmax, nested = parts
    scales, levels = absmax if nested is None else nf4.dequantise_scales(absmax, nested), nf4.levels(kind)
    both = torch.stack([levels[codes.int() >> 4], levels[codes.int() & 15]], 1).view(-1, 64) * scales[:, None]
    there = (part if part is None else part.to(device) for part in parts)
    found = nf4.dequantise_4bit(*there, torch.empty(shape, dtype=dtype, device=device), kind)
    assert torch.equal(found.cpu(), both.view(-1)[: weight.numel()].view(shape).to(dtype))


def check_few_rows(rows, shape, kind, double_quant, dtype, device="cpu"):
    """x W^T of the decoded matrix, in float64."""
    parts = nf4.encode(numbers(*shape, dtype=torch.float32, device=device, seed=0), kind, double_quant)
    weight = nf4.decode(kind, *parts, torch.empty(shape, device=device))
    x = numbers(rows, 1, shape[1], dtype=dtype, device=device, seed=1)
    found = nf4.few_rows(x, kind, *parts, shape)
    assert found.dtype == dtype and found.shape == (rows, 1, shape[0])
    close(found, x.double() @ weight.double().t(), dtype, f"{rows} rows of {shape}")


def close(mine, right, dtype, name):
    """AssertionError unless every number is near enough."""
    assert torch.isfinite(mine).all(), name
    error, scale = (mine.double() - right).abs().max().item(), max(right.abs().max().item(), 0.5)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


# ------------------------------------------------------------------------------------------------------ whole models


def tiny(device="cpu", hidden_size=32, intermediate_size=48, **text):
    """A LLaVA whose tower shows 4 patches, and a batch of three sequences with two pictures."""
    torch.manual_seed(0)
    config = LlamaConfig(97, hidden_size, intermediate_size, 2, 4, 2, **text)
    model = Llava(LlavaConfig(config, ClipVisionConfig(24, 48, 3, 4, 3, 14, 7), "mlp2x_gelu")).to(device)
    picture = [IMAGE_TOKEN_INDEX] * 4
    sequences = [[1, *picture, *range(5, 15)], [7], [2, 3, *picture, 40]]
    ids = torch.tensor(sum(sequences, []))
    labels = torch.where(ids > 4, ids, -100)
    labels[torch.tensor([0, 15, 16])] = -100  # nothing stands before a first token
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    return model, SimpleNamespace(
        input_ids=ids.to(device), labels=labels.to(device), position_ids=positions.to(device),
        cu_seqlens=torch.tensor([0, 15, 16, 23], device=device), pixel_values=torch.randn(2, 3, 14, 14).to(device),
        ids=list("abc"), image_sizes=[(14, 14)] * 2)


def results(model, batch):
    """The loss, and every gradient."""
    model.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
