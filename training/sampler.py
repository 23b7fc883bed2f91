"""Which records form which batch: the order of the original's data loader, reproduced draw by draw.

PyTorch's DataLoader and sampler each take one number from the global generator at the start of an epoch; HF's trainer
seeds that generator with --seed. One generator of our own, seeded alike, gives the same order and is touched by nothing
else.
"""

from heapq import heappop, heappush
from itertools import cycle, islice

import torch


class BatchOrder:
    """Batches of record indices, epoch after epoch; every rank builds the same order and takes its share. count:
    records; batch: per micro-batch and rank; lengths: words of each, to group them, or None; accumulate: micro-batches
    per step. One rank's last batch may be short; several take an epoch's first records again until all are full.
    accelerate: several ranks shuffle as the original's do, by a generator that --seed does not reach (LLAVA.md 4.6)."""

    def __init__(self, count, batch, seed, rank=0, world=1, lengths=None, accumulate=1, accelerate=False):
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.lengths, self.parts = lengths, world * accumulate
        self.generator = torch.Generator().manual_seed(seed)
        self.unseeded = torch.Generator() if accelerate and world > 1 else None

    def __len__(self):
        """Micro-batches per epoch and rank."""
        return -(-self.count // (self.batch * self.world))

    def epoch(self):
        """This rank's batches of the next epoch."""
        self._draw()  # the loader's base seed for worker processes
        if self.lengths:
            order = group_by_modality(self.lengths, self.batch, self.parts, self.generator, self.unseeded)
        else:
            generator = self.unseeded or torch.Generator().manual_seed(self._draw())
            order = torch.randperm(self.count, generator=generator).tolist()
            torch.randperm(self.count, generator=generator)  # torch's sampler does so, too
        if self.world > 1:
            order = list(islice(cycle(order), len(self) * self.batch * self.world))
        batches = [order[i: i + self.batch] for i in range(0, len(order), self.batch)]
        return batches[self.rank:: self.world]

    def _draw(self):
        return int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))


def group_by_modality(lengths, batch, parts, generator, last=None):
    """Stretches of `parts` micro-batches, alike in length, with pictures or without; rests last (LLAVA.md 4.5)."""
    last, size, stretches, rest = last or generator, batch * parts, [], []
    kinds = [i for i, n in enumerate(lengths) if n > 0], [i for i, n in enumerate(lengths) if n <= 0]
    if not all(kinds):
        return group_by_length(lengths, size, parts, last)
    for kind in kinds:
        order = [kind[i] for i in group_by_length([abs(lengths[i]) for i in kind], size, parts, generator)]
        *whole, end = [order[i: i + size] for i in range(0, len(order), size)]
        stretches, rest = stretches + whole, rest + end
    return [i for k in torch.randperm(len(stretches), generator=last) for i in stretches[k]] + sorted(rest)


def group_by_length(lengths, size, parts, generator):
    """Shuffled, then each stretch of `size` sorted, the longest first, and dealt into `parts` of about equal length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretches = (sorted(order[i: i + size], key=lambda i: -lengths[i]) for i in range(0, len(order), size))
    return [i for stretch in stretches for part in split_evenly(stretch, lengths, parts) for i in part]


def split_evenly(indices, lengths, parts):
    """Deal indices into `parts` lists: each goes to the one with the fewest words so far that has a place left."""
    if len(indices) % parts:
        return [indices[k::parts] for k in range(parts)]
    lists, loads = [[] for _ in range(parts)], [(0, k) for k in range(parts)]
    for i in indices:
        load, k = heappop(loads)
        lists[k].append(i)
        if len(lists[k]) < len(indices) // parts:
            heappush(loads, (load + lengths[i], k))
    return lists
