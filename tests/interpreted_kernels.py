"""Every Triton kernel in Triton's interpreter, on a CPU. tests/test_kernels.py runs this file in a process of its own,
with PUMICE_KERNELS=triton TRITON_INTERPRET=1, since kernels are what they are from the moment they are imported."""

import random
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    LENGTHS,
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
    results,
    tiny,
)
from triton.runtime import interpreter

from kernels import attention, choice, cross_entropy, elementwise, lora, nf4
from model import Cache
from sampling.graph import Decoder

patch_tensor = interpreter._patch_lang_tensor


def patch_tensor_for_numpy(tensor, scope):
    """Triton 3.6 makes an int of an array of one element, which numpy does no longer from 2.4 on."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_tensor_for_numpy

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads, group, dim, causal, dtype", [
    (1, 1, 64, True, F32), (2, 2, 16, False, F32), (3, 3, 40, True, F16), (1, 1, 128, True, F16), (2, 1, 8, True, BF16)
])
def test_attention(lengths, heads, group, dim, causal, dtype):
    check_attention(LENGTHS[lengths], heads, group, dim, causal, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_attention_of_random_lengths(seed):
    draw = random.Random(seed)
    lengths = [draw.randrange(0, 90) for _ in range(draw.randrange(1, 6))] + [1]
    check_attention(lengths, 4, draw.choice([1, 2, 4]), draw.choice([16, 32, 64]), draw.random() < 0.5, F32, seed=seed)


def test_attention_of_a_towers_pictures(monkeypatch):
    large = {name: {64: (128, 128, 4, 1)} for name in attention.BLOCKS}  # the interpreter is slow by the block
    monkeypatch.setattr(attention, "BLOCKS", large)
    check_attention([577, 577], 1, 1, 64, False, F32)


def test_sequences_are_cut_into_blocks_of_any_size(monkeypatch):
    for sizes in ((16, 32), (32, 16)):
        monkeypatch.setattr(attention, "BLOCKS", {name: {64: (*sizes, 4, 1)} for name in attention.BLOCKS})
        check_attention([50, 17], 2, 2, 16, sizes[0] == 16, F32)


def test_the_same_inputs_give_the_same_gradients():
    q, k, v, grad = attention_inputs([40, 9], 4, 2, 16, F32)
    packing = attention.Packing(torch.tensor([0, 40, 49]))
    runs = [torch.autograd.grad(attention.attention(*leaves, packing, True), leaves, grad)
            for leaves in [[x.detach().requires_grad_() for x in (q, k, v)] for _ in range(2)]]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("lengths, heads, group, dim, dtype, new", [
    ([300], 2, 1, 64, F32, 1), ([150, 1, 77], 4, 2, 16, F32, 1), ([129, 128], 8, 8, 128, F16, 1),
    ([3, 40], 6, 3, 40, BF16, 1), ([130, 4], 2, 2, 16, F32, 4)])
def test_decoding(lengths, heads, group, dim, dtype, new):
    check_decoding(lengths, heads, group, dim, dtype, new=new)


def test_a_sequence_without_a_past_gets_zeros(monkeypatch):
    monkeypatch.setattr(attention, "CELLS", (16,))  # several parts, all of them empty
    q, cells = torch.ones(2, 2, 16), torch.ones(80, 2, 16)
    out = attention.attend_to_cache(q, cells, cells, torch.tensor([0, 40]), torch.tensor([0, 1]), 40)
    assert not out[0].any() and out[1].eq(1).all()


@pytest.mark.parametrize("rows, vocabulary, dtype", [(3, 50, F32), (1, 64, F32), (2, 32000, F16), (4, 1000, BF16)])
def test_loss(rows, vocabulary, dtype):
    check_loss(rows, vocabulary, dtype)


def test_loss_of_a_vocabulary_that_does_not_fit_into_registers(monkeypatch):
    monkeypatch.setattr(cross_entropy, "WHOLE", 64)
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)
    check_loss(3, 150, F32)
    check_loss(3, 128, F16)


def test_a_label_outside_of_the_vocabulary_is_no_number_of_a_neighbour():
    losses, _ = cross_entropy.losses_and_gradient(torch.zeros(3, 8), torch.tensor([0, 8, -100]))
    assert losses.tolist() == [pytest.approx(2.0794415), float("inf"), float("inf")]


@pytest.mark.parametrize("name, rows, width, dtype", [
    ("rms_norm", 7, 40, F32), ("rms_norm", 3, 64, F16), ("rms_norm", 5, 48, BF16), ("rms_norm", 1, 1, F32),
    ("add_rms_norm", 7, 40, F32), ("add_rms_norm", 2, 64, F16), ("add_rms_norm", 5, 48, BF16),
    ("rotate", 7, 64, F32), ("rotate", 5, 24, F16), ("rotate", 3, 16, BF16), ("rotate", 1, 2, F32),
    ("swiglu", 5, 40, F32), ("swiglu", 2, 2100, F16), ("swiglu", 3, 7, BF16)])
def test_elementwise(name, rows, width, dtype):
    check_elementwise(name, rows, width, dtype)


@pytest.mark.parametrize("rows, heads, kv_heads, dim, dtype", [
    (3, 4, 2, 16, F32), (1, 1, 1, 2, F32), (5, 6, 3, 40, F16), (4, 2, 2, 64, BF16)])
def test_a_step_of_decoding_turns_and_writes_at_once(rows, heads, kv_heads, dim, dtype):
    check_rotate_into(rows, heads, kv_heads, dim, dtype)


def test_the_rows_of_a_norms_backward_are_shared(monkeypatch):
    monkeypatch.setattr(elementwise, "PROGRAMS", 3)
    check_elementwise("rms_norm", 8, 16, F32)
    check_elementwise("add_rms_norm", 8, 16, F32)


def test_no_rows_are_no_work():
    x = torch.empty(0, 16, requires_grad=True)
    for out in (elementwise.rms_norm(x, torch.ones(16, requires_grad=True), 1e-5), elementwise.swiglu(x, x)):
        out.sum().backward()
        assert out.shape == x.grad.shape == (0, 16)


@pytest.mark.parametrize("shape, kind, double_quant, dtype", [
    ((40, 64), "nf4", True, F32), ((300, 64), "nf4", True, BF16), ((33, 7), "fp4", False, F16),
    ((1, 1), "nf4", True, F32)
])
def test_decoding_of_4_bits(shape, kind, double_quant, dtype):
    check_decoding_of_4_bits(shape, kind, double_quant, dtype)


@pytest.mark.parametrize("rows, shape, kind, double_quant, dtype", [
    (1, (70, 128), "nf4", True, F32), (3, (64, 64), "fp4", False, F32), (20, (65, 192), "nf4", False, F16),
    (2, (40, 1088), "nf4", True, F32), (128, (5, 64), "nf4", True, BF16)])
def test_few_rows_of_4_bits(rows, shape, kind, double_quant, dtype):
    check_few_rows(rows, shape, kind, double_quant, dtype)


@pytest.mark.parametrize("rows, shape, kind, double_quant, dtype", [
    (1, (70, 128), "nf4", True, F32), (3, (64, 256), "fp4", False, F32), (20, (65, 384), "nf4", False, F16),
    (2, (5, 1152), "nf4", True, F32), (70, (5, 128), "nf4", True, BF16)])
def test_few_rows_of_4_bits_in_planes(rows, shape, kind, double_quant, dtype):
    check_few_rows(rows, shape, kind, double_quant, dtype, planar=True)


@pytest.mark.parametrize("widths, kind, double_quant, planar", [
    ([128, 256], "nf4", True, False), ([128, 256], "nf4", True, True), ([3, 5, 9], "fp4", False, True)])
def test_joined_matrices_of_4_bits(widths, kind, double_quant, planar):
    assert check_joined(3, widths, kind, double_quant, F32, planar=planar) is not None


def test_rows_for_which_the_whole_matrix_is_decoded():
    parts = nf4.encode(torch.ones(4, 64), "nf4")
    assert nf4.few_rows(torch.ones(129, 64), "nf4", *parts, (4, 64)) is None
    assert nf4.few_rows(torch.ones(2, 64, requires_grad=True), "nf4", *parts, (4, 64)) is None
    assert nf4.few_rows(torch.ones(2, 64), "int8", *nf4.encode(torch.ones(4, 64), "int8"), (4, 64)) is None
    with pytest.raises(ValueError, match=r"x \(2, 32\) does not fit a matrix \(4, 64\)"):
        nf4.few_rows(torch.ones(2, 32), "nf4", *parts, (4, 64))


@pytest.mark.parametrize("rows, width, rank, dropout, dtype", [
    (70, 136, 5, 0.3, F32), (1, 8, 1, 0.5, F32), (130, 64, 40, 0.05, F16), (9, 264, 16, 0.9, BF16), (5, 40, 3, 0, F32)])
def test_lora(rows, width, rank, dropout, dtype):
    check_lora(rows, width, rank, dropout, dtype)


def test_loras_mask_is_that_of_its_seed_and_has_no_pattern():
    x, eye = torch.ones(400, 128), torch.eye(128)
    mask = lora.narrow(x, eye, 0.25, 2**61 + 7)
    assert torch.equal(mask, lora.narrow(x, eye, 0.25, 2**61 + 7))
    assert torch.equal(mask[:50], lora.narrow(x[:50], eye, 0.25, 2**61 + 7))  # whatever else is in the batch
    for other in (lora.narrow(x, eye, 0.25, 2**61 + 8), lora.narrow(x, eye, 0.25, 7), mask.roll(1, 0), mask.roll(1, 1),
                  mask.roll(8, 1)):
        assert abs((mask * other).mean().item() - 0.75**2) < 0.01
    for rate in (*mask.mean(0)[:16], *mask.view(400, 16, 8).mean((0, 1))):  # of columns, of each of eight neighbours
        assert abs(rate - 0.75) < 0.09


def test_a_width_of_no_whole_eights_is_refused():
    with pytest.raises(ValueError, match=r"lora, which cannot compute this: x \(3, 12\) torch.float32, rank 2"):
        lora.lora_linear(torch.ones(3, 12), lambda: torch.ones(4, 12), None, torch.ones(2, 12), torch.ones(4, 2), 1.0)


@pytest.mark.parametrize("make, sentence", [
    (lambda x: x.double(), r"\(9, 2, 16\) torch.float64"),
    (lambda x: x.repeat(1, 1, 16), r"\(9, 2, 256\)"),
    (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), r"\(9, 2, 16\) do not lie side by side.*\(16, 144, 1\)"),
])
def test_what_the_kernels_cannot_take_is_refused_before_any_launch(monkeypatch, make, sentence):
    monkeypatch.setattr(attention, "_launch", lambda *_: pytest.fail("launched"))
    x = make(torch.ones(9, 2, 16))
    with pytest.raises(ValueError, match=sentence):
        attention.attention(x, x, x, attention.Packing(torch.tensor([0, 9])), True)


def test_a_cache_whose_heads_lie_apart_is_refused():
    cells, numbers = torch.ones(10, 2, 16), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="do not lie side by side"):
        attention.attend_to_cache(torch.ones(2, 2, 16), cells, torch.ones(2, 10, 16).transpose(0, 1), numbers, numbers)


# ------------------------------------------------------------------------------------------------------ in the model


def both(monkeypatch, compute):
    """What `compute` gives with Triton's kernels, and with the references."""
    for word in ("triton", "reference"):
        monkeypatch.setattr(choice, "rules", lambda word=word: dict.fromkeys(choice.KERNELS, word))
        yield compute()


def test_a_models_loss_and_gradients_with_kernels_equal_those_without(monkeypatch):
    model, batch = tiny()
    ours, plain = both(monkeypatch, lambda: results(model, batch))
    assert len(ours) == len(plain) > 60
    for mine, other in zip(ours, plain):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8 + 1e-5 * other.abs().max().item())


def test_a_models_answers_with_kernels_equal_those_without(monkeypatch):
    model, batch = tiny()

    @torch.no_grad()
    def answer():
        cache = Cache(model.config.text, torch.float32, "cpu")
        stretches = [cache.open(cells) for cells in (18, 2, 40)]
        logits, decoder = [model.last_logits(batch, cache, stretches)], Decoder(model, cache)
        for token in (11, 12):
            step = SimpleNamespace(
                input_ids=torch.full((3,), token), position_ids=torch.tensor([s.length for s in stretches]),
                cu_seqlens=torch.arange(4), pixel_values=torch.empty(0, 3, 14, 14), image_sizes=[])
            logits.append(model.last_logits(step, cache, stretches))
        return torch.stack([*logits, decoder([14] * 3, stretches)])

    ours, plain = both(monkeypatch, answer)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)
