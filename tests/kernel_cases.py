"""Kernels beside float64: the same comparisons for Triton's interpreter on a CPU and for a GPU."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernels import attention, cross_entropy, elementwise, lora, nf4
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


def check_decoding(lengths, heads, group, dim, dtype, device="cpu", new=1):
    """The last `new` rows of each sequence against a pool of cells, all of them full of numbers, in which the sequences
    lie in another order and apart."""
    begins, cells = [], 3
    for length in lengths[::-1]:
        begins, cells = [cells, *begins], cells + length + 9
    q = numbers(new * len(lengths), heads, dim, dtype=dtype, device=device, seed=0)
    keys, values = numbers(2, cells, heads // group, dim, dtype=dtype, device=device, seed=1)
    seen = [length - new + 1 + i for length in lengths for i in range(new)]
    starts = torch.tensor(begins, device=device).repeat_interleave(new)
    starts = torch.stack([starts, starts], 1)[:, 0]  # a column of a table, whose numbers do not lie side by side
    out = attention.attend_to_cache(q, keys, values, starts, torch.tensor(seen, device=device))
    longer = attention.attend_to_cache(q, keys, values, starts, torch.tensor(seen, device=device), 2 * max(seen))
    assert out.dtype == dtype
    for t, (start, length) in enumerate(zip(starts.tolist(), seen)):
        queries, own = q[t].expand(length, heads, dim), slice(start, start + length)  # the last of them sees all
        right = exact_attention(queries, keys[own], values[own], [length], True)[-1]
        close(out[t], right, dtype, f"row {t}")
        close(longer[t], right, dtype, f"row {t}, made for longer ones")


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


def check_rotate_into(rows, heads, kv_heads, dim, dtype, device="cpu"):
    """q, and the cells that are written, are those of the formula; no other cell is touched. q, k and v are columns of
    one matrix, as a joined projection leaves them."""
    wide = numbers(rows, heads + 2 * kv_heads, dim, dtype=dtype, device=device, seed=0)
    q, k, v = wide.split([heads, kv_heads, kv_heads], 1)
    angle = numbers(rows, 1, dim // 2, dtype=dtype, device=device, seed=1).repeat(1, 1, 2)
    keys, values = numbers(2, 3 * rows + 2, kv_heads, dim, dtype=dtype, device=device, seed=2)
    cells = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:rows].to(device)
    before, tables = (keys.clone(), values.clone()), (angle.cos(), angle.sin())
    turned = elementwise.rotate_into(q, k, v, *tables, keys, values, cells)
    assert turned.dtype == dtype and turned.is_contiguous()
    close(turned, exact_turn(q.double(), *(x.double() for x in tables)), dtype, "q")
    close(keys[cells], exact_turn(k.double(), *(x.double() for x in tables)), dtype, "k")
    assert torch.equal(values[cells], v)
    keys[cells], values[cells] = before[0][cells], before[1][cells]
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


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


def check_few_rows(rows, shape, kind, double_quant, dtype, device="cpu", planar=False):
    """x W^T of the decoded matrix, in float64; twice the same bits. planar: its codes are laid in planes."""
    codes, *scales = nf4.encode(numbers(*shape, dtype=torch.float32, device=device, seed=0), kind, double_quant)
    weight = nf4.decode(kind, codes, *scales, torch.empty(shape, device=device))
    if planar:
        codes = nf4.planar(codes)
        assert torch.equal(weight, nf4.decode(kind, codes, *scales, torch.empty(shape, device=device)))
    x = numbers(rows, 1, shape[1], dtype=dtype, device=device, seed=1)
    found = nf4.few_rows(x, kind, codes, *scales, shape)
    assert found.dtype == dtype and found.shape == (rows, 1, shape[0])
    close(found, x.double() @ weight.double().t(), dtype, f"{rows} rows of {shape}")
    assert torch.equal(found, nf4.few_rows(x, kind, codes, *scales, shape))


def check_joined(rows, widths, kind, double_quant, dtype, device="cpu", planar=False):
    """x W^T of matrices that are joined is that of each, and each comes back bit for bit."""
    weights = [(i + 1) * numbers(width, 128, dtype=torch.float32, device=device, seed=i) + i
               for i, width in enumerate(widths)]
    parts = [nf4.encode(weight, kind, double_quant) for weight in weights]
    codes, *scales = nf4.join(parts)
    codes, shape = nf4.planar(codes) if planar else codes, (sum(widths), 128)
    weights = [nf4.decode(kind, *part, torch.empty(width, 128, device=device)) for part, width in zip(parts, widths)]
    whole = nf4.decode(kind, codes, *scales, torch.empty(shape, device=device))
    assert torch.equal(whole, torch.cat(weights))
    for i, part in enumerate(parts):
        for mine, right in zip(nf4.part_of((codes, *scales), widths, i), part):
            assert mine is right is None or torch.equal(mine, right)
    x = numbers(rows, 128, dtype=dtype, device=device, seed=9)
    if (found := nf4.few_rows(x, kind, codes, *scales, shape)) is not None:  # that is, with Triton
        close(found, x.double() @ whole.double().t(), dtype, f"{rows} rows")
    return found


def check_lora(rows, width, rank, dropout, dtype, device="cpu", out=24):
    """Result and gradients are those of the formula in float64 under the mask that the kernels draw, which is read off
    with ones and an A that is the identity; twice the same bits."""
    def made(*shape, seed):
        return numbers(*shape, dtype=dtype, device=device, seed=seed)

    def mask_of(first, last, seed=5):  # narrow takes so many columns of A at a time
        eye = torch.eye(width, dtype=dtype, device=device)[first:last]
        return lora.narrow(torch.ones(rows, width, dtype=dtype, device=device), eye, dropout, seed)

    x, A, B, weight = made(rows, width, seed=0), made(rank, width, seed=1), made(out, rank, seed=2), made(
        out, width, seed=3)
    bias, grad = made(out, seed=4), made(rows, out, seed=6)
    leaves = [[tensor.detach().clone().requires_grad_() for tensor in (x, A, B, bias)] for _ in range(2)]
    runs = []
    for x1, A1, B1, bias1 in leaves:
        y = lora.lora_linear(x1, lambda: weight, bias1, A1, B1, 0.5, dropout, 5)
        runs.append([y.detach(), *torch.autograd.grad(y, (x1, A1, B1, bias1), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    ranges = [(at, min(at + 128, width)) for at in range(0, width, 128)]
    mask = torch.cat([mask_of(*part) for part in ranges], 1).double()
    assert set(mask.unique().tolist()) <= {0, 1} and abs(mask.mean().item() - 1 + dropout) < 3 / mask.numel() ** 0.5
    exact = [tensor.double().requires_grad_() for tensor in (x, A, B, bias)]
    x2, A2, B2, bias2 = exact
    right = x2 @ weight.double().t() + bias2 + 0.5 / (1 - dropout) * (mask * x2) @ A2.t() @ B2.t()
    for name, mine, other in zip(("y", "dx", "dA", "dB", "db"), runs[0], (
            right.detach(), *torch.autograd.grad(right, exact, grad.double()))):
        assert mine.dtype == dtype
        close(mine, other, dtype, f"{name} of {rows} x {width}, rank {rank}")


def close(mine, right, dtype, name):
    """AssertionError unless every number is near enough."""
    assert torch.isfinite(mine).all(), name
    error, scale = (mine.double() - right).abs().max().item(), max(right.abs().max().item(), 0.5)
    assert error <= TOLERANCE[dtype] * scale, f"{name}: off by {error:.3g} of {scale:.3g}"


# ------------------------------------------------------------------------------------------------------ whole models


def tiny(device="cpu", hidden_size=32, intermediate_size=48, **text):
    """A LLaVA whose tower shows 4 patches, and a batch of three sequences with two pictures."""
    torch.manual_seed(0)
    config = LlamaConfig(97, hidden_size, intermediate_size, 2, 4, **{"num_key_value_heads": 2} | text)
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
