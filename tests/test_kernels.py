"""kernels/: Triton's kernels equal their references; which of them runs; what they are compiled to."""

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn import draw, run_train
from kernel_cases import (
    attention_inputs,
    check_attention,
    check_decoding,
    check_decoding_of_4_bits,
    check_elementwise,
    check_few_rows,
    check_joined,
    check_lora,
    check_loss,
    check_rotate_into,
    exact_attention,
    results,
    tiny,
    with_gradients,
)

import quant
import sample
from kernels import attention, choice, elementwise, linear, nf4

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = {"odd": [5, 1, 33], "llava": [590, 1500, 640, 31], "tower": [577] * 5}  # of sequences, on a GPU


def python(*arguments, **variables):
    """Run Python in a process of its own. -> what it printed, stderr included; AssertionError if it failed"""
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | variables, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_kernels_equal_float64_in_tritons_interpreter():
    pytest.importorskip("triton")
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py",
                 PUMICE_KERNELS="triton", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert int(re.search(r"(\d+) passed", out)[1]) > 60 and "skipped" not in out, out


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_decoding_turns_and_writes(dtype):
    check_rotate_into(3, 6, 2, 16, dtype)


def test_rules_are_read_in_order_and_checked():
    assert set(choice.rules("").values()) == {"auto"}
    assert set(choice.rules("reference").values()) == {"reference"}
    found = choice.rules("triton, attention=reference")
    assert found.pop("attention") == "reference" and set(found.values()) == {"triton"}
    found = choice.rules("reference,nf4=planar")
    assert found.pop("nf4") == "planar" and set(found.values()) == {"reference"}
    for wrong in ("fast", "planar", "attention=planar", "attentoin=triton", "attention=", "=triton,x"):
        with pytest.raises(ValueError, match=f"PUMICE_KERNELS={wrong}: expected auto, triton, reference"):
            choice.rules(wrong)


def test_a_cpu_computes_with_the_references_and_imports_no_triton():
    if torch.version.cuda:
        pytest.skip("this torch is made for CUDA and brings Triton")
    out = python("-c", "import sys, model; from kernels import choice; print('triton' in sys.modules, "
                 "choice.describe('cpu'))", PUMICE_KERNELS="")
    assert out.strip() == "False kernels on cpu: PyTorch for " + ", ".join(choice.KERNELS)


def test_the_wish_for_triton_without_its_means_is_an_error(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: dict.fromkeys(choice.KERNELS, "triton"))
    x = torch.zeros(3, 1, 16)
    monkeypatch.setattr(choice, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        attention.attention(x, x, x, attention.Packing(torch.tensor([0, 3])), True)
    monkeypatch.setattr(choice, "triton", object())
    with pytest.raises(ValueError, match="tensors are on cpu: on a CPU, set TRITON_INTERPRET=1"):
        attention.attention(x, x, x, attention.Packing(torch.tensor([0, 3])), True)


def test_the_wish_for_planes_is_one_for_triton(monkeypatch):
    rules = choice.rules("nf4=planar")
    monkeypatch.setattr(choice, "rules", lambda: rules)
    monkeypatch.setattr(choice, "triton", SimpleNamespace(__version__="3"))
    assert choice.describe("cpu").startswith("kernels on cpu: Triton 3 for nf4 in planes; PyTorch for attention,")
    parts = nf4.encode(torch.ones(4, 128), "nf4")
    with pytest.raises(ValueError, match="asks for Triton's nf4, but its tensors are on cpu"):
        nf4.few_rows(torch.ones(2, 128), "nf4", *parts, (4, 128))


@pytest.mark.parametrize("q, k, v, sentence", [
    ((9, 4, 8), (9, 3, 8), (9, 3, 8), r"got q \(9, 4, 8\) torch.float32, k \(9, 3, 8\)"),
    ((9, 4, 8), (9, 2, 8), (9, 4, 8), r"v \(9, 4, 8\)"),
    ((9, 4, 8), (8, 2, 8), (8, 2, 8), r"k \(8, 2, 8\)"),
    ((9, 4, 8), (9, 2, 16), (9, 2, 16), r"k \(9, 2, 16\)"),
    ((9, 32), (9, 32), (9, 32), r"q \(9, 32\)"),
    ((8, 4, 8), (8, 4, 8), (8, 4, 8), r"cu_seqlens to end at the number of rows, not at 9; got q \(8, 4, 8\)"),
])
def test_shapes_that_do_not_fit_are_refused(q, k, v, sentence):
    packing = attention.Packing(torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match=sentence):
        attention.attention(*(torch.zeros(shape) for shape in (q, k, v)), packing, True)


def test_dtypes_that_do_not_fit_are_refused():
    x, packing = torch.zeros(9, 2, 8), attention.Packing(torch.tensor([0, 9]))
    for q, k in ((x, x.half()), (x.int(), x.int())):
        with pytest.raises(ValueError, match=rf"floating dtype; got q \(9, 2, 8\) {q.dtype}, k \(9, 2, 8\) {k.dtype}"):
            attention.attention(q, k, k, packing, True)


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 3], [1, 5], [[0, 5]], [0], []])
def test_lengths_that_do_not_add_up_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="expected 0, then where each sequence ends"):
        attention.Packing(torch.tensor(cu_seqlens))


@pytest.mark.parametrize("q, keys, starts, lengths, sentence", [
    ((2, 4, 8), (7, 3, 8), 2, 2, r"keys \(7, 3, 8\)"), ((2, 4, 8), (7, 2, 16), 2, 2, r"keys \(7, 2, 16\)"),
    ((2, 4, 8), (7, 2, 8), 2, 3, r"lengths \(3,\)"), ((2, 4, 8), (7, 2, 8), 3, 2, r"starts \(3,\)"),
    ((2, 4, 8), (7, 16), 2, 2, r"keys \(7, 16\)")])
def test_a_cache_that_does_not_fit_is_refused(q, keys, starts, lengths, sentence):
    cells, starts, lengths = torch.zeros(keys), *(torch.ones(n, dtype=torch.int64) for n in (starts, lengths))
    with pytest.raises(ValueError, match=sentence):
        attention.attend_to_cache(torch.zeros(q), cells, cells, starts, lengths)


def test_elementwise_shapes_and_dtypes_that_do_not_fit_are_refused():
    x, heads, angles = torch.zeros(3, 8), torch.zeros(3, 2, 8), torch.zeros(3, 1, 8)
    for wrong, sentence in (
            (lambda: elementwise.rms_norm(x, torch.ones(7), 1e-5), r"\(D,\); got \(3, 8\) torch.float32, \(7,\)"),
            (lambda: elementwise.rms_norm(x.int(), torch.ones(8), 1e-5), r"got \(3, 8\) torch.int32"),
            (lambda: elementwise.add_rms_norm(x, x[:2], torch.ones(8), 1e-5), r"\(3, 8\) torch.float32, \(2, 8\)"),
            (lambda: elementwise.swiglu(x, x.half()), r"one dtype; got \(3, 8\) torch.float32, \(3, 8\) torch.float16"),
            (lambda: elementwise.swiglu(x, x[:2]), r"got .*\(2, 8\)"),
            (lambda: elementwise.rotate(heads, heads[:2], angles, angles), r"\(2, 2, 8\)"),
            (lambda: elementwise.rotate(heads, heads, angles[..., :4], angles), r"\(3, 1, 4\)"),
            (lambda: elementwise.rotate(*[heads[..., :7]] * 2, *[angles[..., :7]] * 2), r"\(3, 2, 7\)")):
        with pytest.raises(ValueError, match=sentence):
            wrong()


def test_verbose_says_which_kernels_compute(capsys, tmp_path, tiny_llava):
    assert sample.main(["--prompt", "What is it?", "--max_new_tokens", "1", "--device", "cpu", "--verbose"]) == 0
    assert choice.describe("cpu") in capsys.readouterr().err
    draw(tmp_path)
    run_train(tmp_path / "out", stage="pretrain", model_name_or_path=tiny_llava, data_path=tmp_path / "captions.json",
              image_folder=tmp_path, max_steps=1, save_strategy="no", verbose=True)
    assert choice.describe("cpu") in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- 4 bits in planes


@pytest.mark.parametrize("shape", [(3, 128), (5, 640), (2, 4096)])
def test_planes_hold_the_same_codes_and_are_undone_bit_for_bit(shape):
    codes = torch.randint(256, (shape[0] * shape[1] // 2,), dtype=torch.uint8)
    words = nf4.planar(codes)
    assert words.dtype == torch.int32 and words.numel() == codes.numel() // 4
    assert torch.equal(nf4.public(words), codes)
    absmax = torch.rand(codes.numel() // 32)
    for kind in ("nf4", "fp4"):
        assert torch.equal(*(nf4.decode(kind, laid, absmax.view(torch.uint8), None, torch.empty(shape))
                             for laid in (codes, words)))


def test_a_words_halves_of_bytes_are_the_weights_that_its_planes_say():
    """Word i = 2 p + h of a unit: byte j holds the weights 2 p (high half) and 2 p + 1 of plane 4 h + j."""
    code = torch.randint(16, (2, 384))  # of each weight
    words = nf4.planar((code[:, ::2] << 4 | code[:, 1::2]).to(torch.uint8).flatten()).view(2, 3, 16)
    for unit, p, h, j in itertools.product(range(3), range(8), range(2), range(4)):
        byte, first = words[:, unit, 2 * p + h] >> 8 * j & 255, 128 * unit + 16 * (4 * h + j) + 2 * p
        assert torch.equal(byte >> 4, code[:, first]) and torch.equal(byte & 15, code[:, first + 1])


OPERATIONS = {  # of PTX, on words of 32 bits in int64
    "and.b32": lambda a, b: a & b, "shl.b32": lambda a, n: a << n & 0xFFFFFFFF, "shr.u32": lambda a, n: a >> n,
    "prmt.b32": lambda a, b, selector: permuted(a, b, selector),
    "lop3.b32": lambda a, b, c, table: sum((table >> i & 1) * (  # bit by bit, table[a, b, c]
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & 0xFFFFFFFF) for i in range(8))}


def permuted(a, b, selector):
    """PRMT: byte k of the result is the byte of b:a that half-byte k of the selector names; if that has its highest bit
    set, the byte's sign eight times."""
    both, result = a | b << 32, 0
    for k in range(4):
        index = selector >> 4 * k & 15
        byte = both >> 8 * (index & 7) & 255
        result = result | torch.where(torch.as_tensor(index & 8 > 0), (byte >> 7) * 255, byte) << 8 * k
    return result


def run_ptx(text, registers):
    """Execute straight-line PTX on {register: (n,) int64}."""
    for line in text.strip("{}\n").splitlines():
        name, rest = line.rstrip(";").split(" ", 1)
        if name != ".reg":
            target, *sources = (word.strip() for word in rest.split(","))
            registers[target] = OPERATIONS[name](*(registers[s] if s in registers else int(s, 0) for s in sources))


@pytest.mark.parametrize("kind, dtype", [("nf4", torch.bfloat16), ("nf4", torch.float16), ("fp4", torch.bfloat16)])
def test_the_assembly_looks_every_word_up_bit_for_bit(kind, dtype):
    draw = torch.Generator().manual_seed(0)
    even, odd = (torch.cat([torch.randint(2**32, (20000,), generator=draw), torch.arange(16) * 0x11111111])
                 for _ in range(2))  # words 2 p and 2 p + 1 of some units
    table = nf4._level_bytes(kind, dtype, torch.device("cpu")).long() & 0xFFFFFFFF
    registers = {"$8": even, "$9": odd} | {f"${10 + 2 * i}": table[i].expand(len(even)) for i in range(8)}
    run_ptx(nf4.prmt_text(), registers)
    bits = nf4.levels(kind).to(dtype).view(torch.int16).long() & 0xFFFF  # of the 16 levels
    for plane in range(8):
        byte = (even, odd)[plane // 4] >> 8 * (plane % 4) & 255
        assert torch.equal(registers[f"${plane}"], bits[byte >> 4] | bits[byte & 15] << 16), plane


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("widths, kind, double_quant", [([128, 256, 128], "nf4", True), ([3, 5], "fp4", False)])
def test_joined_matrices_of_4_bits(widths, kind, double_quant, planar):
    check_joined(3, widths, kind, double_quant, torch.float32, planar=planar)
    assert nf4.joins((128, 128), torch.zeros(1)) and not nf4.joins((64, 128), torch.zeros(1))
    assert nf4.joins((3, 128), None) and not nf4.joins((64, 96), None)


@pytest.mark.parametrize("rule", ["auto", "nf4=planar"])
@pytest.mark.parametrize("bits", [16, 4])
def test_on_a_gpu_linears_of_one_input_are_joined_and_come_back(bits, rule, monkeypatch):
    monkeypatch.setattr(linear, "GPU", ("cpu",))
    monkeypatch.setattr(nf4, "rules", lambda: choice.rules(rule))
    model, batch = tiny(hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    model.bfloat16()
    for name, module in list(model.named_modules()):
        if bits == 4 and quant.Quantisation(4).wants(name, module):
            model.set_submodule(name, quant.Quantisation(4).linear(module.weight.detach(), torch.bfloat16))
    before, names = {name: p.detach().clone() for name, p in model.state_dict().items()}, model.state_dict().keys()
    with torch.no_grad():
        plain = model.logits(batch)
        assert linear.pack(model.language_model) == 2 * 5
        found, joined = model.logits(batch), model.language_model.model.layers[0].self_attn.q_proj.product
    assert joined.widths == [128] * 3 and (found - plain).abs().max() < 2**-6 * plain.abs().max()
    assert bits == 16 or (joined.codes.dtype == torch.int32) == (rule == "nf4=planar")
    linear.unpack(model.language_model)
    assert model.state_dict().keys() == names and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_planes_are_laid_only_where_they_are_asked_for_and_fit(monkeypatch):
    codes = torch.zeros(64 * 128 // 2, dtype=torch.uint8)
    assert not nf4.wants_planes(codes, "nf4", (64, 128))
    monkeypatch.setattr(nf4, "rules", lambda: choice.rules("nf4=planar"))
    assert nf4.wants_planes(codes, "nf4", (64, 128)) and nf4.wants_planes(codes, "fp4", (64, 128))
    assert not nf4.wants_planes(codes, "nf4", (128, 64)) and not nf4.wants_planes(codes, "int8", (64, 128))
    assert not nf4.wants_planes(nf4.planar(codes), "nf4", (64, 128))


# ------------------------------------------------------------------------------------------------------- the compiler


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80])
def test_kernels_compile_without_register_spills(arch, tmp_path):
    """For GPUs that are not here; the figures are printed (pytest -s)."""
    pytest.importorskip("triton")
    out = python("tests/compiled_kernels.py", str(arch), PUMICE_KERNELS="triton", TRITON_INTERPRET="0",
                 TRITON_CACHE_DIR=str(tmp_path))
    print(out)
    lines = out.splitlines()
    assert len(lines) > 30 and all(line.endswith("spills 0") for line in lines), out


# ----------------------------------------------------------------------------------------------------------- on a GPU


def has_gpu():
    return choice.triton is not None and torch.cuda.is_available() and choice.device_has_triton(torch.device("cuda"))


def on_a_gpu(function):
    """Both marks: what `make test` leaves out, and what is skipped where there is none."""
    skip = pytest.mark.skipif(not has_gpu(), reason="no CUDA GPU from sm_80 on, or no Triton")
    return pytest.mark.gpu(skip(function))


@on_a_gpu
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads, group, dim", [(4, 1, 64), (8, 4, 128), (3, 1, 40), (2, 1, 16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu(lengths, heads, group, dim, causal, dtype):
    check_attention(LENGTHS[lengths], heads, group, dim, causal, dtype, "cuda")


@on_a_gpu
def test_attention_of_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: dict.fromkeys(choice.KERNELS, "triton"))
    for dim in (64, 128):
        check_attention([131, 70], 4, 2, dim, True, torch.float32, "cuda")


@on_a_gpu
def test_attention_of_a_hundred_seeds_on_a_gpu():
    for seed in range(100):
        draw = random.Random(seed)
        lengths = [draw.randrange(1, 900) for _ in range(draw.randrange(1, 9))]
        check_attention(lengths, 8, draw.choice([1, 2, 8]), draw.choice([64, 128]), draw.random() < 0.7, torch.bfloat16,
                        "cuda", seed)


@on_a_gpu
def test_gradients_are_the_same_from_run_to_run_on_a_gpu():
    lengths = [590, 1500, 640, 31]
    inputs = attention_inputs(lengths, 32, 4, 128, torch.bfloat16, "cuda")
    packing = attention.Packing(torch.tensor([0, *lengths], device="cuda").cumsum(0))
    runs = [with_gradients(lambda *x: attention.attention(*x, packing, True), *inputs) for _ in range(10)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@on_a_gpu
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_as_exact_as_sdpa_on_a_gpu(causal):
    inputs = attention_inputs([700] * 3, 8, 2, 128, torch.bfloat16, "cuda")
    packing = attention.Packing.equal(3, 700, "cuda")
    ours = with_gradients(lambda *x: attention.attention(*x, packing, causal), *inputs)
    sdpa = with_gradients(lambda *x: attention.attention_reference(*x, packing, causal), *inputs)
    exact = with_gradients(lambda *x: exact_attention(*x, [700] * 3, causal), *inputs)
    for mine, theirs, right in zip(ours, sdpa, exact):
        assert (mine - right).abs().max() < 2 * (theirs - right).abs().max()


@on_a_gpu
@pytest.mark.parametrize("lengths", [[700], [700, 1, 2048], [1] * 16])
@pytest.mark.parametrize("heads, group, dim", [(32, 1, 128), (9, 3, 64)])
def test_decoding_on_a_gpu(lengths, heads, group, dim):
    check_decoding(lengths, heads, group, dim, torch.bfloat16, "cuda")
    check_decoding([n + 3 for n in lengths], heads, group, dim, torch.bfloat16, "cuda", new=3)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name, rows, width", [
    ("rms_norm", 1000, 4096), ("rms_norm", 3, 576), ("rms_norm", 70, 5120), ("add_rms_norm", 1000, 4096),
    ("rotate", 1000, 128), ("rotate", 3, 64), ("swiglu", 1000, 11008), ("swiglu", 3, 1536)])
def test_elementwise_on_a_gpu(name, rows, width, dtype):
    check_elementwise(name, rows, width, dtype, "cuda")


@on_a_gpu
@pytest.mark.parametrize("rows, heads, kv_heads, dim", [(1, 32, 32, 128), (33, 40, 8, 128), (7, 9, 3, 64)])
def test_a_step_of_decoding_turns_and_writes_at_once_on_a_gpu(rows, heads, kv_heads, dim):
    check_rotate_into(rows, heads, kv_heads, dim, torch.bfloat16, "cuda")


@on_a_gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (33, 7)])
@pytest.mark.parametrize("kind, double_quant, dtype", [
    ("nf4", True, torch.bfloat16), ("nf4", False, torch.float32), ("fp4", True, torch.float16)])
def test_decoding_of_4_bits_on_a_gpu(shape, kind, double_quant, dtype):
    check_decoding_of_4_bits(shape, kind, double_quant, dtype, "cuda")


@on_a_gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 128])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (22016, 4096), (576, 1536)])
def test_few_rows_of_4_bits_on_a_gpu(rows, shape):
    check_few_rows(rows, shape, "nf4", True, torch.bfloat16, "cuda")


@on_a_gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40, 128])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (22016, 4096), (577, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_rows_of_4_bits_in_planes_on_a_gpu(rows, shape, dtype):
    check_few_rows(rows, shape, "nf4", True, dtype, "cuda", planar=True)


@on_a_gpu
@pytest.mark.parametrize("rows, width, rank", [(1000, 4096, 128), (70, 11008, 64), (3, 576, 16), (129, 1536, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_on_a_gpu(rows, width, rank, dtype):
    check_lora(rows, width, rank, 0.05, dtype, "cuda")


@on_a_gpu
@pytest.mark.parametrize("planar", [False, True])
def test_joined_matrices_of_4_bits_on_a_gpu(planar):
    check_joined(3, [4096, 1024, 1024], "nf4", True, torch.bfloat16, "cuda", planar)


@on_a_gpu
def test_assembly_and_look_up_in_memory_give_the_same_bits_on_a_gpu(monkeypatch):
    """Which the order of a thread's registers, and with it the pairs that the assembly sees, must be right for."""
    x = torch.eye(128, dtype=torch.bfloat16, device="cuda")  # every product is one level times its scale
    codes, *scales = nf4.encode(torch.randn(256, 128, device="cuda"), "nf4")
    products = [nf4.few_rows(x, "nf4", laid, *scales, (256, 128)) for laid in (codes, nf4.planar(codes))]
    assert torch.equal(*products)


@on_a_gpu
def test_a_model_with_kernels_equals_one_without_on_a_gpu(monkeypatch):
    """In bfloat16; the kernels are to be as near to float32 as the references are."""
    model, batch = tiny(device="cuda", hidden_size=256, intermediate_size=512, head_dim=64)
    right = results(model.float(), batch)
    model.bfloat16()
    errors = {}
    for word in ("triton", "reference"):
        monkeypatch.setattr(choice, "rules", lambda word=word: dict.fromkeys(choice.KERNELS, word))
        errors[word] = [(mine.float() - exact).norm() / exact.norm().clamp(min=1e-3)
                        for mine, exact in zip(results(model, batch), right)]
    for mine, theirs in zip(errors["triton"], errors["reference"]):
        assert mine < 0.02 + 1.5 * theirs


@on_a_gpu
@pytest.mark.parametrize("vocabulary", [32000, 32064, 49152, 128256])
def test_loss_on_a_gpu(vocabulary):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_loss(37, vocabulary, dtype, "cuda")
