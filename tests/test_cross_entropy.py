"""kernels/cross_entropy.py against F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_the_plain_way(monkeypatch, dtype, tolerance, trained):
    monkeypatch.setitem(cross_entropy.SCORES, "cpu", 3 * 50)  # 7 rows in chunks of 3, 3 and 1
    generator = torch.Generator().manual_seed(0)
    results = []
    hidden, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 8), (50, 8)))
    labels = torch.randint(50, (7,), generator=generator)
    for way in (cross_entropy.linear_cross_entropy, lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        loss = way(h, w, labels)
        (loss / 3).backward()  # as with accumulated micro-batches
        results.append((loss.detach(), h.grad.float(), w.grad.float() if trained else torch.zeros(())))
        with torch.no_grad():
            torch.testing.assert_close(way(h, w, labels), loss.detach())
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * max(1e-6, plain.abs().max().item()))


def test_no_rows_give_no_number_and_no_gradient():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(50, 8, requires_grad=True)
    loss = cross_entropy.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert loss.isnan()
    loss.nan_to_num(0.0).backward()
    assert not weight.grad.any()


def test_float16_keeps_large_loss_scales_and_small_probabilities():
    """2^16, where loss scales begin, is no float16; nor is a probability of 1e-5 once divided by 5000 rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) / 30 for shape in ((500, 8), (20000, 8)))
    labels, grads = torch.randint(20000, (500,), generator=generator), []
    for dtype in (torch.float32, torch.float16):
        h, w = hidden.half().to(dtype).requires_grad_(), weight.half().to(dtype).requires_grad_()
        (cross_entropy.linear_cross_entropy(h, w, labels) * 2.0**16).backward()
        grads.append((h.grad.float(), w.grad.float()))
    for exact, ours in zip(*grads):
        assert (ours - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.parametrize("shapes, dtype, labels, sentence", [
    (((7, 8), (50, 9)), torch.float32, torch.zeros(7, dtype=torch.int64), r"hidden \(7, 8\), weight \(50, 9\)"),
    (((7, 8), (50, 8)), torch.float32, torch.zeros(6, dtype=torch.int64), r"labels \(6,\)"),
    (((7, 8), (50, 8)), torch.float32, torch.zeros(7, dtype=torch.int32), "int64 labels; got .* torch.int32"),
    (((7, 8), (50, 8)), torch.int32, torch.zeros(7, dtype=torch.int64), "floating dtype"),
])
def test_bad_input_is_refused_with_its_shapes(shapes, dtype, labels, sentence):
    hidden, weight = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=sentence):
        cross_entropy.linear_cross_entropy(hidden, weight, labels)
