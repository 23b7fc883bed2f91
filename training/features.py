"""Features on the disk: a frozen tower says of a picture in every epoch the same (`--cache_features DIR`).

    DIR/<key>/<checksum>.safetensors   key: a hash of the tower's weights and dtype, what is kept of its output, and how
        <picture>: (views, N, D)       pictures become pixels; a picture's name: of its path, size and time of change

What is not there is computed before training, by every rank a share, and read by the loaders in place of pixels. A file
is named by the checksum of its content, which is looked at when a run begins. Features have the dtype of the run, so
that its course is the same with and without them, but for the rounding of products of another size.
"""

import json
import os
import time
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader

from data import Example
from formats import files
from formats.command import Progress, say
from training.checkpoint import on_first_rank

FILE_BYTES = 2**28  # of one file, about


def stored(folder):
    """What a folder holds -> {picture: (file, its [height, width])}. What is damaged or half is said and removed."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in folder.iterdir():
        if not path.suffix and time.time() - path.stat().st_mtime > 60:  # or another run is writing it
            say(f"{path} was never completed: it is removed")
            path.unlink()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            whole = file_digest(file, sha256).hexdigest() == path.stem
        if whole:
            with safe_open(path, "pt") as file:
                found |= {key: (path, json.loads(size)) for key, size in file.metadata().items()}
        else:
            say(f"{path} is damaged: it is removed, and its features are computed again")
            path.unlink()
    return found


def check_room(folder, size, count):
    """ValueError if the disk has too little room for the features of `count` more pictures of about `size` bytes."""
    need, free = size * count, files.free_bytes(folder)
    if need > free:
        raise ValueError(f"--cache_features {folder.parent}: {count:,} pictures of {files.gigabytes(size)} need about "
                         f"{files.gigabytes(need)}, and {files.gigabytes(free)} are free; make room, or go elsewhere")


class Features:
    """What the tower says of the pictures of `records` (data.Records); what is not stored yet is computed."""

    def __init__(self, args, loaded, records):
        tower, config, kind = loaded.model.vision_tower, loaded.config, sha256()
        if tower is None or any(p.requires_grad for p in tower.parameters()):
            raise ValueError("--cache_features stores what a frozen vision tower says of pictures, and this run "
                             f"{'trains it' if tower else 'has none'}; leave the flag out")
        for p in tower.parameters():  # of the layers up to the selected one
            kind.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        kind.update(repr([config.vision, config.mm_vision_select_feature, config.image_aspect_ratio,
                          records.image_processor, args.dtype]).encode())
        folder = Path(args.cache_features, kind.hexdigest()[:16])
        self.load, self.root = records.load, records.image_folder
        images = (record.get("image") or [] for record in records.records)
        names = {name for image in images for name in ([image] if isinstance(image, str) else image)}
        self.keys, self.where = {name: self.key(name) for name in names}, on_first_rank(stored, folder)
        missing = sorted(name for name in names if self.keys[name] not in self.where)
        if missing:
            self.compute(missing[dist.get_rank()::dist.get_world_size()], folder, loaded.model, args)
            dist.barrier()
            self.where = on_first_rank(stored, folder)
        say(f"features of {len(names):,} pictures are in {folder}, of which {len(missing):,} are new")

    def key(self, name):
        path = os.path.abspath(os.path.join(self.root, name))
        state = os.stat(path) if os.path.exists(path) else None
        return sha256(f"{path}|{state and (state.st_size, state.st_mtime_ns)}".encode()).hexdigest()

    def open(self, name):
        """A picture -> an Example with its pixels; None if it cannot be read, as training will find, too."""
        with suppress(ValueError):
            return self.load(Example(name, [], [], pictures=[name]))

    @torch.no_grad()
    def compute(self, names, folder, model, args):
        """Store what the tower says of pictures, one at a time: others beside it would change how bits are rounded."""
        device, tensors, sizes = next(model.vision_tower.parameters()).device, {}, {}
        line = Progress("storing features", len(names), of_bytes=False)
        pictures = DataLoader(names, None, num_workers=args.dataloader_num_workers, collate_fn=self.open,
                              generator=torch.Generator())
        for number, example in enumerate(pictures, 1):
            line.advance(1)
            if example:
                key = self.keys[example.id]
                tensors[key] = model.tower_features(example.pixel_values.to(device)).cpu().contiguous()
                sizes[key] = json.dumps(example.image_sizes[0])
                if len(tensors) == 1:  # the first of each file stands for all to come
                    check_room(folder, tensors[key].nbytes, (len(names) - number + 1) * dist.get_world_size())
            if tensors and (number == len(names) or sum(x.nbytes for x in tensors.values()) > FILE_BYTES):
                content = save(tensors, sizes)
                path = folder / sha256(content).hexdigest()
                try:
                    path.write_bytes(content)
                    path.rename(path.with_suffix(".safetensors"))  # complete, or not there
                except OSError as error:
                    path.unlink(missing_ok=True)
                    raise OSError(f"{path} could not be written: {error}") from None
                tensors, sizes = {}, {}

    def put(self, example):
        """What `load` does, with features in the place of pixels."""
        found = []
        for name in example.pictures:
            if self.keys[name] not in self.where:
                self.load(example)  # says why it cannot be read
                raise ValueError(f"picture {name} could not be read when features were stored; start anew")
            path, size = self.where[self.keys[name]]
            with safe_open(path, "pt") as file:
                found.append((file.get_tensor(self.keys[name]), tuple(size)))
        if found:
            example.pixel_values, example.image_sizes = torch.cat([x for x, _ in found]), [size for _, size in found]
        return example
