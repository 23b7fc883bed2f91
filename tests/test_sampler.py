"""training/sampler.py: the order of the original's data loader, on one rank and dealt to several."""

import pytest
import torch
from torch.utils.data import DataLoader

from training.sampler import BatchOrder, group_by_modality, split_evenly


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


LENGTHS = [10, -4, 7, 3, -9, 5, 8, -2, 6, -1, 12, -3, 4, -6, 9]


@pytest.mark.parametrize("last, expected", [
    (None, [10, 12, 0, 6, 4, 7, 1, 11, 14, 3, 8, 5, 2, 9, 13]),
    (torch.Generator(), [10, 12, 0, 6, 14, 3, 8, 5, 4, 7, 1, 11, 2, 9, 13])])
def test_groups_are_the_originals(last, expected):
    """The values of LLAVA.md 4.5, recorded from the original."""
    assert group_by_modality(LENGTHS, 2, 2, torch.Generator().manual_seed(42), last) == expected
    assert split_evenly([0, 1, 2, 3, 4, 5], [9, 8, 3, 3, 2, 1], 3) == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("lengths", [[5, 1, 4, 2, 3, 7, 6], [-5, -1, -4, -2, -3, -7, -6], LENGTHS, LENGTHS * 7])
@pytest.mark.parametrize("accumulate, world", [(1, 1), (3, 1), (2, 2)])
def test_grouped_epochs_show_every_record_and_mix_no_kinds(lengths, accumulate, world):
    orders = [BatchOrder(len(lengths), 2, 42, rank, world, lengths, accumulate) for rank in range(world)]
    for _ in range(2):
        dealt = [order.epoch() for order in orders]
        batches = [batch for together in zip(*dealt) for batch in together]
        assert set(sum(batches, [])) == set(range(len(lengths)))
        left = sum(1 for batch in batches if len({lengths[i] > 0 for i in batch}) == 2)
        assert left <= 2 * accumulate * world  # what is left over of both kinds, in the order of the file


@pytest.mark.parametrize("count, batch, world", [(16, 2, 4), (17, 2, 2), (5, 2, 3)])
def test_the_originals_order_on_several_ranks(count, batch, world):
    """--sample_order accelerate: accelerate gives torch's sampler a generator that no seed reaches."""
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    drawn = torch.utils.data.RandomSampler(range(count), generator=torch.Generator())
    batches = torch.utils.data.BatchSampler(drawn, batch, drop_last=False)
    orders = [BatchOrder(count, batch, seed, 0, world, accelerate=True) for seed in (42, 7)]
    for _ in range(3):
        expected = list(shard(batches, world, 0))
        assert [order.epoch() for order in orders] == [expected, expected]
    assert BatchOrder(count, batch, 42, accelerate=True).epoch() == BatchOrder(count, batch, 42).epoch()
