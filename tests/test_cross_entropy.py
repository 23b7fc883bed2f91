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
