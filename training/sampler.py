"""Which records form which batch: the order of the original's data loader, reproduced draw by draw.

PyTorch's DataLoader and sampler each take one number from the global generator at the start of an epoch; HF's trainer
seeds that generator with --seed. One generator of our own, seeded alike, gives the same order and is touched by nothing
else.
"""

from itertools import cycle, islice

import torch


class BatchOrder:
    """Batches of record indices, epoch after epoch; every rank builds the same order and takes its share.

    count: records; batch: records per micro-batch and rank. On one rank, an epoch's last batch may be short; on
    several, the epoch's first records come once more until all ranks have equally many full batches (LLAVA.md 4.6).
    """

    def __init__(self, count, batch, seed, rank=0, world=1):
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        """Micro-batches per epoch and rank."""
        return -(-self.count // (self.batch * self.world))

    def epoch(self):
        """This rank's batches of the next epoch."""
        self._draw()  # the loader's base seed for worker processes
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self._draw())).tolist()
        if self.world > 1:
            order = list(islice(cycle(order), len(self) * self.batch * self.world))
        batches = [order[i: i + self.batch] for i in range(0, len(order), self.batch)]
        return batches[self.rank:: self.world]

    def _draw(self):
        return int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
