"""training/sampler.py: the order of the original's data loader, on one rank and dealt to several."""

import pytest
import torch
from torch.utils.data import DataLoader

from training.sampler import BatchOrder


@pytest.mark.parametrize("count, batch, seed", [(10, 4, 42), (12, 4, 0), (7, 1, 7), (3, 8, 42)])
def test_order_is_that_of_torchs_loader_epoch_after_epoch(count, batch, seed):
    torch.manual_seed(seed)
    loader, order = DataLoader(range(count), batch, shuffle=True, collate_fn=list), BatchOrder(count, batch, seed)
    for _ in range(3):
        assert order.epoch() == list(loader)
        assert len(order) == len(loader)


def test_order_neither_disturbs_nor_hears_the_global_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = BatchOrder(10, 2, 42).epoch()
    assert torch.equal(torch.rand(3), expected) and BatchOrder(10, 2, 42).epoch() == first


@pytest.mark.parametrize("count, batch, world", [
    (16, 2, 4), (17, 2, 4), (23, 4, 3), (5, 2, 2), (3, 4, 2), (1, 2, 5), (9, 1, 4)])
def test_ranks_are_dealt_full_batches_as_accelerate_deals_them(count, batch, world):
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    whole = BatchOrder(count, batch, 42).epoch()
    sampler = torch.utils.data.BatchSampler(sum(whole, []), batch, drop_last=False)
    for rank in range(world):
        order = BatchOrder(count, batch, 42, rank, world)
        dealt = order.epoch()
        assert dealt == list(shard(sampler, world, rank))
        assert len(dealt) == len(order)


def test_the_ranks_together_show_what_one_rank_shows():
    ranks = [BatchOrder(12, 2, 42, rank, 3) for rank in range(3)]
    for expected in (order := BatchOrder(12, 2, 42)).epoch(), order.epoch():
        dealt = [rank.epoch() for rank in ranks]
        assert [batch for together in zip(*dealt) for batch in together] == expected
