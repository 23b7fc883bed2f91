"""kernels/: Triton's kernels equal their references; which of them runs; what they are compiled to."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

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
    check_loss,
    exact_attention,
    results,
    tiny,
    with_gradients,
)

import sample
from kernels import attention, choice, elementwise

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


def test_rules_are_read_in_order_and_checked():
    assert set(choice.rules("").values()) == {"auto"}
    assert set(choice.rules("reference").values()) == {"reference"}
    found = choice.rules("triton, attention=reference")
    assert found.pop("attention") == "reference" and set(found.values()) == {"triton"}
    for wrong in ("fast", "attentoin=triton", "attention=", "=triton,x"):
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


@pytest.mark.parametrize("q, keys, lengths, sentence", [
    ((2, 4, 8), (2, 7, 3, 8), 2, r"keys \(2, 7, 3, 8\)"), ((2, 4, 8), (3, 7, 2, 8), 2, r"keys \(3, 7, 2, 8\)"),
    ((2, 4, 8), (2, 7, 2, 8), 3, r"lengths \(3,\)"), ((2, 4, 8), (2, 7, 8), 2, r"keys \(2, 7, 8\)")])
def test_a_cache_that_does_not_fit_is_refused(q, keys, lengths, sentence):
    cells = torch.zeros(keys)
    with pytest.raises(ValueError, match=sentence):
        attention.attend_to_cache(torch.zeros(q), cells, cells, torch.ones(lengths, dtype=torch.int64))


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


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name, rows, width", [
    ("rms_norm", 1000, 4096), ("rms_norm", 3, 576), ("rms_norm", 70, 5120), ("add_rms_norm", 1000, 4096),
    ("rotate", 1000, 128), ("rotate", 3, 64), ("swiglu", 1000, 11008), ("swiglu", 3, 1536)])
def test_elementwise_on_a_gpu(name, rows, width, dtype):
    check_elementwise(name, rows, width, dtype, "cuda")


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
