"""Each kernel beside its peers on a GPU, on LLaVA-1.5-7B's shapes; with --smoke, at toy size, on a CPU as well.

All sides run in turn, round after round, between CUDA events, and before each run 256 MB are written, so that nothing
is found in the cache, and the GPU is kept busy for a millisecond, in which Python launches the kernels: their time
alone is measured. `ours` and `peer` are medians, the peer the fastest of all that run here; those that do not are
named. Besides what every row has:

    error, peer_error   largest difference to the same in float32, relative to the largest number; of results and, where
                        a row goes backward, of gradients
    floor, share        the least time, ours as a share of it: operations at the rate of this GPU's best matrix product,
                        or bytes at the rate of its best copy, both measured first; whichever takes longer
    peers               the median of every peer
    gb, peer_gb         the most memory that was allocated above the inputs
"""

import random
import statistics
import sys
import time
from functools import cache
from importlib import metadata

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, choice, cross_entropy, elementwise, lora, nf4

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
OPEN = 2**30  # bytes
HEAD_START = 2**21  # the GPU's clock cycles, about a millisecond


def device(smoke):
    """Where rows run: the GPU, or with smoke the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not smoke:
        raise ValueError("there is no CUDA GPU here; --smoke shows on a CPU that the rows run")
    return torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------- a contest


def contest(smoke, ours, peers, exact=None, operations=0, traffic=0, rounds=20, seen=None, head_start=HEAD_START):
    """Run all sides in turn. ours and the values of peers: () -> tuple of tensors, of which `exact` gives the float32
    values. operations, traffic (bytes): what nobody can do without. seen: what a peer's results are in our order, which
    is not in its time. head_start: cycles; 0 where Python's time to launch kernels counts. -> a row, of ours alone if
    no peer runs"""
    where, sides, errors, peaks = device(smoke), {"ours": ours, **peers}, {}, {}
    right = exact() if exact else None
    for name, side in list(sides.items()):
        try:
            results, peaks[name] = peak_of(side, where)
        except Exception as error:  # whatever a peer's compiler, its package or the GPU's memory may say
            if name == "ours":
                raise
            print(f"  {name} does not run here: {type(error).__name__} {str(error)[:100]!r}", file=sys.stderr)
            del sides[name]
            continue
        results = seen(results) if seen and name != "ours" else results
        errors[name] = max((difference(a, b) for a, b in zip(results, right)), default=0.0) if exact else 0.0
        results = None
    spent = {name: [] for name in sides}
    for _ in range(1 if smoke else rounds):
        for name, side in sides.items():
            spent[name].append(milliseconds(side, where, head_start))
    medians = {name: statistics.median(times) for name, times in spent.items()}
    mine = medians.pop("ours")
    best = min(medians, key=medians.get, default=None)
    row = {"ours": mine, "peer": medians.get(best), "peer_name": best, "unit": "ms", "error": errors["ours"],
           "peer_error": errors.get(best), "peers": medians, "gb": peaks["ours"], "peer_gb": peaks.get(best)}
    if operations or traffic:
        rate, bandwidth = ceilings(where)
        row["floor"] = 1000 * max(operations / rate, traffic / bandwidth)
        row["share"] = row["floor"] / mine
    return row


def difference(mine, right):
    """The largest difference, relative to the largest number."""
    return ((mine.float() - right).abs().max() / right.abs().max().clamp(min=1e-9)).item()


def milliseconds(side, where, head_start=HEAD_START):
    """Of one run, with a cold cache."""
    if where.type == "cpu":
        began = time.perf_counter()
        side()
        return 1000 * (time.perf_counter() - began)
    cold_cache().zero_()
    torch.cuda._sleep(head_start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    side()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@cache
def cold_cache():
    """What is written between runs: five times the largest cache."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def peak_of(side, where):
    """-> results of a run, after one to warm up, and the GB that it allocated at most; 0 on a CPU"""
    if where.type == "cpu":
        return side(), 0.0
    torch.cuda.empty_cache()
    side()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = side()
    return results, (torch.cuda.max_memory_allocated() - before) / OPEN


@cache
def ceilings(where):
    """-> operations a second of the best matrix product, bytes a second of the best copy"""
    size, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = min(milliseconds(lambda: torch.mm(a, b, out=out), where) for _ in range(10))
    wide, room = (torch.empty(2**29 if where.type == "cuda" else 2**20, device=where) for _ in range(2))
    copy = min(milliseconds(lambda: room.copy_(wide), where) for _ in range(10))
    return 2 * size**3 / product * 1000, 2 * wide.nbytes / copy * 1000


def drawn(where, *shape, seed=0, trained=True):
    """Random numbers in what the rows compute in: bfloat16, on a CPU float32."""
    x = torch.randn(shape, device=where, generator=torch.Generator(where).manual_seed(seed))
    return x.to(torch.bfloat16 if where.type == "cuda" else torch.float32).requires_grad_(trained)


def there_and_back(function, inputs, grad):
    """() -> result and gradients"""
    def run():
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)
    return run


# ----------------------------------------------------------------------------------------------------------- attention


def attention_llava(smoke):
    """Packed against padded, forward and backward: 16 conversations of 590 to 1500 tokens, 32 heads of 128."""
    draw = random.Random(0)
    lengths = [min(1500, 590 + int(draw.expovariate(1 / 210))) for _ in range(16)]
    heads, dim = (2, 16) if smoke else (32, 128)
    lengths = [length // 40 for length in lengths[:4]] if smoke else lengths
    where = device(smoke)
    packing = attention.Packing(torch.tensor([0, *lengths], device=where).cumsum(0))
    q, k, v, grad = (drawn(where, packing.rows, heads, dim, seed=i) for i in range(4))

    def padded(x):
        return packing.to_grid(x.detach()).transpose(1, 2).contiguous().requires_grad_()

    wide, wide_grad = [padded(x) for x in (q, k, v)], padded(grad).detach()
    inside = packing.to_grid(torch.ones(packing.rows, 1, 1, device=where, dtype=torch.bool))[..., 0, 0]  # (B, L)
    mask = inside[:, None, None, :] & inside.new_ones(inside.shape[1], inside.shape[1]).tril()

    def dense(backend, **options):
        def attend(q, k, v):
            with sdpa_kernel(BACKENDS[backend]):
                return F.scaled_dot_product_attention(q, k, v, **options)
        return there_and_back(attend, wide, wide_grad)

    def as_rows(results):
        return tuple(packing.to_rows(x.transpose(1, 2)) if x.dim() == 4 else x for x in results)

    def packed(way, *inputs):
        return there_and_back(lambda *x: way(*x, packing, True), inputs, grad.to(inputs[0].dtype))

    peers = {f"SDPA {name}, padded": dense(name, is_causal=True) for name in BACKENDS if name != "math"}
    peers["SDPA efficient, padded with mask"] = dense("efficient", attn_mask=mask)
    if where.type == "cuda":
        peers["FlexAttention, packed"] = flex(packing, q, k, v, grad)
    else:
        peers["SDPA math, padded"] = dense("math", is_causal=True)
    exact = packed(attention.attention_reference, *(x.detach().float().requires_grad_() for x in (q, k, v)))
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return contest(smoke, packed(attention.attention, q, k, v), peers, exact, 14 * pairs * heads * dim, seen=as_rows)


def flex(packing, q, k, v, grad):
    """The same packed rows through FlexAttention, which must be compiled."""
    sequence, made = packing.sequence, []

    def allowed(batch, head, row, column):
        return (sequence[row] == sequence[column]) & (row >= column)

    def make():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        compiled = torch.compile(flex_attention)
        mask = create_block_mask(allowed, None, None, packing.rows, packing.rows, device=q.device)
        inputs = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v)]
        return there_and_back(lambda *x: compiled(*x, block_mask=mask), inputs, grad.detach().transpose(0, 1)[None])

    def run():
        if not made:  # at the first call, where what does not run is caught
            made.append(make())
        return tuple(x[0].transpose(0, 1) for x in made[0]())
    return run


def equal_lengths(smoke, length, count, heads, dim, causal, backward):
    """Sequences of one length: nothing to gain by packing."""
    where = device(smoke)
    if smoke:
        length, count, heads = 40, 2, 2
    packing = attention.Packing.equal(count, length, where)
    q, k, v, grad = (drawn(where, count * length, heads, dim, seed=i, trained=backward) for i in range(4))
    wide = [packing.to_grid(x.detach()).transpose(1, 2).contiguous().requires_grad_(backward) for x in (q, k, v, grad)]

    def as_rows(results):
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in results)

    def side(attend, inputs, grad):
        """() -> result; or with backward the gradients alone: the forward pass is not in the time"""
        if not backward:
            return lambda: (attend(*inputs),)
        out = attend(*inputs)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def dense(backend):
        def attend(q, k, v):
            with sdpa_kernel(BACKENDS[backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        made = []  # at the first call, where what does not run is caught

        def run():
            if not made:
                made.append(side(attend, wide[:3], wide[3].detach()))
            return made[0]()
        return run

    names = ["flash", "cuDNN", "efficient"] if where.type == "cuda" else ["flash", "math"]
    floats = [x.detach().float().requires_grad_(backward) for x in (q, k, v)]
    exact = side(lambda *x: attention.attention_reference(*x, packing, causal), floats, grad.float())
    operations = (10 if backward else 4) * count * length**2 * heads * dim / (2 if causal else 1)
    return contest(smoke, side(lambda *x: attention.attention(*x, packing, causal), (q, k, v), grad.detach()),
                   {f"SDPA {name}": dense(name) for name in names}, exact, operations, seen=as_rows)


def attention_tower(smoke):
    """CLIP ViT-L/14-336's: 32 pictures of 577 rows, 16 heads of 64, forward only."""
    return equal_lengths(smoke, 577, 32, 16, 64, causal=False, backward=False)


def attention_2048(smoke):
    """8 sequences of 2048, 32 heads of 128, forward."""
    return equal_lengths(smoke, 2048, 8, 32, 128, causal=True, backward=False)


def attention_4096(smoke):
    """4 sequences of 4096."""
    return equal_lengths(smoke, 4096, 4, 32, 128, causal=True, backward=False)


def attention_2048_backward(smoke):
    """8 sequences of 2048, backward only."""
    return equal_lengths(smoke, 2048, 8, 32, 128, causal=True, backward=True)


def attention_4096_backward(smoke):
    """4 sequences of 4096, backward only."""
    return equal_lengths(smoke, 4096, 4, 32, 128, causal=True, backward=True)


def attention_cache(smoke):
    """A step of decoding: one query of 32 heads against 700 cells of one sequence."""
    return one_query(smoke, [700])


def attention_cache_16(smoke):
    """The same of 16 sequences of 400 to 1000 cells."""
    return one_query(smoke, list(range(400, 1001, 40)))


def one_query(smoke, lengths):
    """Ours looks at each sequence's own cells, SDPA at a mask, which one sequence alone does not need."""
    where, heads, dim = device(smoke), 2 if smoke else 32, 128
    lengths = [length // 20 for length in lengths] if smoke else lengths
    q = drawn(where, len(lengths), heads, dim, trained=False)
    pool = drawn(where, 2, sum(lengths), heads, dim, seed=1, trained=False)  # one sequence behind the other
    counts = torch.tensor(lengths, device=where)
    starts, mask = counts.cumsum(0) - counts, torch.arange(max(lengths), device=where) < counts[:, None]
    grid = torch.stack([torch.nn.utils.rnn.pad_sequence(x.split(lengths), True) for x in pool]).transpose(2, 3)

    def padded(q=q, grid=grid):  # (B, H, L, K)
        hidden = mask[:, None, None] if len(lengths) > 1 else None
        return (F.scaled_dot_product_attention(q[:, :, None], *grid, attn_mask=hidden)[:, :, 0],)

    return contest(smoke, lambda: (attention.attend_to_cache(q, *pool, starts, counts, max(lengths)),),
                   {"SDPA" + ", padded with mask" * (len(lengths) > 1): padded},
                   lambda: padded(q.float(), grid.float()),
                   traffic=2 * sum(lengths) * heads * dim * pool.element_size())


# ----------------------------------------------------------------------------------------------------- loss, small ones


def loss_stage1(smoke):
    """lm_head and loss of 32 captions behind 576 places of a picture, 19 of 596 rows learned; the head is frozen."""
    return loss(smoke, 32, 596, 19)


def loss_stage2(smoke):
    """The same of 16 conversations, 110 of 800 rows learned."""
    return loss(smoke, 16, 800, 110)


def loss(smoke, count, length, learned):
    """Ours computes the rows that carry a label; the peers do what they are given, all rows, or as ours."""
    where, (width, vocabulary) = device(smoke), (16, 100) if smoke else (4096, 32000)
    count, length, learned = (2, 30, 4) if smoke else (count, length, learned)
    hidden = drawn(where, count * length, width)
    weight = drawn(where, vocabulary, width, seed=1, trained=False) * width**-0.5
    labels = torch.randint(vocabulary, (count, length), device=where, generator=torch.Generator(where).manual_seed(2))
    labels[:, : length - learned] = -100
    labels = labels.flatten()

    def selected(way):
        def select(h, w, y):
            rows = (y != -100).nonzero().squeeze(1)
            return way(h.index_select(0, rows), w, y[rows])
        return select

    def liger(h, w, y):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        return LigerFusedLinearCrossEntropyLoss()(w, h, y)

    def run(way, h=hidden, w=weight):
        return there_and_back(lambda h: way(h, w, labels), (h,), None)

    def plain(h, w, y):
        return F.cross_entropy(F.linear(h, w).float(), y)

    rows = count * learned
    return contest(smoke, run(selected(cross_entropy.linear_cross_entropy)), {
        "PyTorch, all rows": run(plain), "PyTorch, learned rows": run(selected(plain)), "Liger, all rows": run(liger)},
                   run(plain, hidden.detach().float().requires_grad_(), weight.float()),
                   operations=4 * rows * width * vocabulary, traffic=2 * weight.nbytes)


def rms_norm(smoke):
    """12,800 x 4096, forward and backward, the weight trained."""
    where, (rows, width) = device(smoke), (9, 32) if smoke else (12800, 4096)
    x, weight, grad = drawn(where, rows, width), drawn(where, width, seed=1), drawn(where, rows, width, seed=2)

    def liger(x, w):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        return LigerRMSNormFunction.apply(x, w, 1e-5)

    return small(smoke, (x, weight), grad, lambda x, w: elementwise.rms_norm(x, w, 1e-5), {
        "F.rms_norm": lambda x, w: F.rms_norm(x, x.shape[1:], w, 1e-5), "Liger": liger}, 5 * x.nbytes)


def add_rms_norm(smoke):
    """A residual and the norm behind it, 12,800 x 4096, forward and backward."""
    where, (rows, width) = device(smoke), (9, 32) if smoke else (12800, 4096)
    x, more = (drawn(where, rows, width, seed=i) for i in range(2))
    weight, grad = drawn(where, width, seed=2), drawn(where, 2, rows, width, seed=3)

    def plain(x, more, weight):
        total = x + more
        return total, F.rms_norm(total, total.shape[1:], weight, 1e-5)

    def there(function):
        def run(x, more, weight):
            total, normed = function(x, more, weight)
            return torch.autograd.grad([total, normed], [x, more, weight], [grad[0].to(x.dtype), grad[1].to(x.dtype)])
        return run

    inputs = x, more, weight
    floats = [x.detach().float().requires_grad_() for x in inputs]
    return contest(smoke, lambda: there(lambda *x: elementwise.add_rms_norm(*x, 1e-5))(*inputs), {
        "PyTorch": lambda: there(plain)(*inputs)}, lambda: there(plain)(*floats), traffic=8 * x.nbytes)


def swiglu(smoke):
    """12,800 x 11,008, forward and backward."""
    where, (rows, width) = device(smoke), (9, 40) if smoke else (12800, 11008)
    gate, up, grad = (drawn(where, rows, width, seed=i) for i in range(3))

    def liger(gate, up):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        return LigerSiLUMulFunction.apply(gate.clone(), up.clone())  # which it overwrites

    return small(smoke, (gate, up), grad, elementwise.swiglu, {
        "PyTorch": lambda gate, up: F.silu(gate) * up, "Liger": liger}, 8 * gate.nbytes)


def rotate(smoke):
    """q and k of 12,800 rows with 32 heads of 128, forward and backward."""
    where, (rows, heads, dim) = device(smoke), (9, 2, 16) if smoke else (12800, 32, 128)
    q, k, grad = (drawn(where, rows, heads, dim, seed=i) for i in range(3))
    angle = torch.rand(rows, 1, dim // 2, device=where).repeat(1, 1, 2) * 6
    angles = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def plain(q, k):
        return torch.stack([elementwise._rotate_reference(x, *(a.to(q.dtype) for a in angles)) for x in (q, k)])

    return small(smoke, (q, k), torch.stack([grad, grad]).detach(), lambda q, k: torch.stack(
        elementwise.rotate(q, k, *angles)), {"PyTorch": plain}, 8 * q.nbytes)  # both are stacked in the same way


def small(smoke, inputs, grad, ours, peers, traffic):
    """A row of one elementwise operation; the first peer in float32 is the truth."""
    floats = [x.detach().float().requires_grad_() for x in inputs]
    exact = there_and_back(next(iter(peers.values())), floats, grad.detach().float())
    return contest(smoke, there_and_back(ours, inputs, grad.detach()), {
        name: there_and_back(peer, inputs, grad.detach()) for name, peer in peers.items()}, exact, traffic=traffic)


# ------------------------------------------------------------------------------------------------------------- 4 bits

SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # of a layer: q, k and v; o; gate and up; down


def nf4_dequantise(smoke):
    """All matrices of a layer, doubly quantised, to bfloat16."""
    return four_bits(smoke, 0)


def nf4_1_row(smoke):
    """All matrices of a layer times one row: a step of decoding."""
    return four_bits(smoke, 1)


def nf4_16_rows(smoke):
    """The same for 16 rows."""
    return four_bits(smoke, 16)


def nf4_128_rows(smoke):
    """The same for 128 rows."""
    return four_bits(smoke, 128)


def nf4_1_row_planar(smoke):
    """nf4_1_row with the codes in planes (kernels/nf4.py), beside our kernel that takes them as they are: whichever
    leads is to be the default."""
    return four_bits(smoke, 1, planar=True)


def nf4_16_rows_planar(smoke):
    """The same for 16 rows."""
    return four_bits(smoke, 16, planar=True)


def nf4_128_rows_planar(smoke):
    """The same for 128 rows."""
    return four_bits(smoke, 128, planar=True)


def four_bits(smoke, rows, planar=False):
    """Ours on our codes, bitsandbytes on its own, which are the same."""
    where, shapes = device(smoke), [(64, 128), (64, 64)] if smoke else SHAPES
    weights = [drawn(where, *shape, seed=i, trained=False) * 0.02 for i, shape in enumerate(shapes)]
    layers = [nf4.encode(weight, "nf4") for weight in weights]
    laid = [(nf4.planar(codes) if planar and shape[1] % nf4.UNIT == 0 else codes, *scales)
            for shape, (codes, *scales) in zip(shapes, layers)]
    inputs = [drawn(where, max(rows, 1), inner, seed=9, trained=False) for _, inner in shapes]
    rooms = [torch.empty_like(weight) for weight in weights]
    theirs = []

    def made():
        from bitsandbytes import functional
        if not theirs:
            theirs.extend(functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weights)
        return theirs

    def decoded():
        return tuple(nf4.decode("nf4", *parts, room) for parts, room in zip(layers, rooms))

    def multiplied(layers=laid):
        products = (nf4.few_rows(x, "nf4", *parts, weight.shape) for x, parts, weight in zip(inputs, layers, weights))
        return tuple(F.linear(x, nf4.decode("nf4", *parts, room)) if y is None else y
                     for x, parts, room, y in zip(inputs, layers, rooms, products))

    def peer():
        import bitsandbytes as bnb
        if not rows:
            return tuple(bnb.functional.dequantize_4bit(*pair) for pair in made())
        return tuple(bnb.matmul_4bit(x, codes.t(), state) for x, (codes, state) in zip(inputs, made()))

    def exact():
        wide = [nf4.decode("nf4", *parts, torch.empty_like(room, dtype=torch.float32))
                for parts, room in zip(layers, rooms)]
        return tuple(F.linear(x.float(), weight) for x, weight in zip(inputs, wide)) if rows else tuple(wide)

    traffic = sum(part.nbytes for parts in layers for part in parts) + (rows == 0) * sum(room.nbytes for room in rooms)
    peers = {"bitsandbytes": peer} | ({"ours, not planar": lambda: multiplied(layers)} if planar else {})
    return contest(smoke, multiplied if rows else decoded, peers, exact,
                   2 * rows * sum(weight.numel() for weight in weights), traffic)


def lora_dropout(smoke):
    """A linear with an adapter, 4096 x 4096, r = 128, dropout 0.05, 12,800 rows, forth and back. Each side draws a mask
    of its own, so that their numbers are not compared."""
    where, (rows, width, rank) = device(smoke), (16, 32, 4) if smoke else (12800, 4096, 128)
    x, grad = (drawn(where, rows, width, seed=i) for i in range(2))
    weight = drawn(where, width, width, seed=2, trained=False) * width**-0.5
    A, B = drawn(where, rank, width, seed=3), drawn(where, width, rank, seed=4)

    def ours(x, A, B):
        return lora.lora_linear(x, lambda: weight, None, A, B, 2.0, 0.05, 7)

    def layers(x, A, B):
        return F.linear(x, weight) + F.linear(F.linear(F.dropout(x, 0.05), A), B) * 2.0

    def reference(*inputs):
        kept, choice.rules = choice.rules, lambda: dict.fromkeys(choice.KERNELS, "reference")
        try:
            return ours(*inputs)
        finally:
            choice.rules = kept

    sides = [there_and_back(side, (x, A, B), grad.detach()) for side in (ours, layers, reference)]
    return contest(smoke, sides[0], {"layers, as PEFT": sides[1], "our reference": sides[2]}, None,
                   4 * rows * width * (width + 3 * rank))


# --------------------------------------------------------------------------------------------------------- block sizes

CANDIDATES = {  # of kernels/attention.py's BLOCKS that compile without spills for sm_90, besides those it has
    ("forward", 64): [(64, 64, 4, 4), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3)],
    ("forward", 128): [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    ("backward_q", 128): [(64, 32, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2)],
    ("backward_kv", 128): [(32, 64, 4, 2), (32, 128, 8, 2)]}


def blocks_tower(smoke):
    """attention_tower's forward with the block sizes that it has, and with others."""
    return blocks(smoke, "forward", 64, lambda: equal_lengths(smoke, 577, 32, 16, 64, False, False)["ours"])


def blocks_forward(smoke):
    """16 sequences of 800, heads of 128: the forward kernel's block sizes."""
    return blocks(smoke, "forward", 128, lambda: equal_lengths(smoke, 800, 16, 32, 128, True, False)["ours"])


def blocks_backward_q(smoke):
    """The same of dq's kernel, timed with the other one."""
    return blocks(smoke, "backward_q", 128, lambda: equal_lengths(smoke, 800, 16, 32, 128, True, True)["ours"])


def blocks_backward_kv(smoke):
    """The same of dk's and dv's kernel, timed with the other one."""
    return blocks(smoke, "backward_kv", 128, lambda: equal_lengths(smoke, 800, 16, 32, 128, True, True)["ours"])


def blocks(smoke, kernel, dim, measure):
    """The block sizes of BLOCKS against CANDIDATES; on a CPU, which has no blocks, all are the same. -> a row"""
    kept, spent = attention.BLOCKS[kernel][dim], {}
    try:
        for sizes in [kept, *CANDIDATES[kernel, dim]]:
            attention.BLOCKS[kernel][dim] = sizes
            spent[sizes] = measure()
    finally:
        attention.BLOCKS[kernel][dim] = kept
    ours = spent.pop(kept)
    best = min(spent, key=spent.get)
    return {"ours": ours, "peer": spent[best], "peer_name": f"blocks {best}", "unit": "ms", "error": 0.0,
            "peers": {str(sizes): milliseconds for sizes, milliseconds in spent.items()}}


ROWS = {row.__name__: row for row in (
    attention_llava, attention_tower, attention_2048, attention_4096, attention_2048_backward, attention_4096_backward,
    attention_cache, attention_cache_16, loss_stage1, loss_stage2, rms_norm, add_rms_norm, swiglu, rotate,
    nf4_dequantise, nf4_1_row, nf4_16_rows, nf4_128_rows, nf4_1_row_planar, nf4_16_rows_planar, nf4_128_rows_planar,
    lora_dropout, blocks_tower, blocks_forward, blocks_backward_q,
    blocks_backward_kv)}


def versions():
    """The GPU, what it is driven by, and the peers that are here."""
    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cuda": torch.version.cuda}
    return found | {name: version(name) for name in ("triton", "peft", "bitsandbytes", "liger_kernel")}


def version(name):
    """Of a package, or None where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe():
    """The GPU, its measured ceilings, and the kernels in use, in one line."""
    if not torch.cuda.is_available():
        return choice.describe("cpu")
    rate, bandwidth = ceilings(torch.device("cuda"))
    return f"{rate / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s; {choice.describe('cuda')}"
