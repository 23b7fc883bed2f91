"""Layers that take turns: a model larger than its device computes, while its next layer is brought in.

Layers compute one after the other, so all that must be there is the one at work and the one that comes next. Those that
take turns rest in main memory or in their file, and share two buffers:

    buffer 0    20 #####| 22 is read ......|#####| 24 is read ......|#####
    buffer 1        | 21 is read ...|#####| 23 is read ......|#####             ##### computes

The parameters of such a layer are views of its buffer, always; to bring it in is to fill the buffer with its numbers.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from mmap import PAGESIZE

import torch
from torch import nn

from formats import files
from formats.bitsandbytes import Folded

ALIGN = 64  # bytes, a cache line


class Buffer:
    """Room for one layer, and the layers that take turns in it. As soon as one has computed, the next one is brought in
    by a thread; on a GPU by a stream of its own, out of page-locked memory. disk: some rest in their files."""

    def __init__(self, size, device, disk):
        self.bytes, self.stream = torch.empty(size, dtype=torch.uint8, device=device), None
        self.stage = self.bytes  # what a file is read into
        if device.type == "cuda":
            self.stream, self.arrived = torch.cuda.Stream(device), torch.cuda.Event()
            self.stage = page_locked(size) if disk else None
        self.thread, self.turns, self.holds, self.coming = ThreadPoolExecutor(1), [], None, None

    def adopt(self, layer, tensors=None):
        """Have a layer take turns. Its weights move to main memory, or with tensors, {name: LazyTensor}, are read from
        their file each time."""
        turn = len(self.turns)
        if tensors is None:
            size = size_of(layer)
            kept = page_locked(size) if self.stream else torch.empty(size, dtype=torch.uint8)
            for name, view in views(kept, layer).items():
                view.copy_(layer.get_parameter(name))
            self.turns.append(lambda: kept)
        else:
            self.turns.append(partial(self._read, tensors, views(self.stage, layer)))
        for name, view in views(self.bytes, layer).items():
            module, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(module), leaf, nn.Parameter(view, requires_grad=False))
        for module in layer.modules():
            module.takes_turns = True  # kernels/linear.py and quant.arrange leave it as it is
        layer.register_forward_pre_hook(lambda *_: self.wait(turn))
        layer.register_forward_hook(lambda *_: self.bring((turn + 1) % len(self.turns)))

    def bring(self, turn):
        """Begin to fill the buffer with a layer, unless it is there or on its way; a GPU first does what it has been
        asked for so far."""
        if turn != self.holds or self.coming.done() and self.coming.exception():
            done = self.stream and torch.cuda.current_stream(self.bytes.device).record_event()
            self.holds, self.coming = turn, self.thread.submit(self._fill, turn, done)

    def wait(self, turn):
        """Until the layer is there. In the first pass, and after one that was broken off, it is brought in only now."""
        self.bring(turn)
        self.coming.result()
        if self.stream:
            torch.cuda.current_stream(self.bytes.device).wait_event(self.arrived)

    def _fill(self, turn, done):
        if self.stream:
            self.arrived.synchronize()  # nothing is on its way from the stage any more
        kept = self.turns[turn]()
        if self.stream:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(done)
                self.bytes[: len(kept)].copy_(kept, non_blocking=True)
                self.arrived.record()
        elif kept is not self.bytes:
            self.bytes[: len(kept)].copy_(kept)

    def _read(self, tensors, parts):
        for name, tensor in parts_of(tensors):
            files.read_into(tensor, parts[name])
        return self.stage


class Following:
    """A forward pre-hook of every layer of a model on several devices: what a layer is given moves to its device, the
    tables of a batch only once."""

    def __init__(self):
        self.batch, self.there = None, {}

    def __call__(self, device, _, given):
        x, *tables = given  # (T, D)
        if not tables:  # the norm behind the layers
            return (x.to(device),)
        rotary, packing, cache = tables  # the last looks after itself
        if self.batch is not packing:
            self.batch, self.there = packing, {x.device: (rotary, packing)}
        if device not in self.there:
            moved = copy(packing)
            vars(moved).update({k: v.to(device) for k, v in vars(packing).items() if isinstance(v, torch.Tensor)})
            self.there[device] = tuple(table.to(device) for table in rotary), moved
        return x.to(device), *self.there[device], cache


def size_of(layer):
    """Bytes of a buffer that a layer takes; each of its parameters begins on a cache line."""
    return sum(-(-p.nbytes // ALIGN) * ALIGN for p in layer.parameters())


def views(flat, layer):
    """{name of a parameter: the tensor of its shape in a buffer's bytes, flat (size_of(layer),) uint8}"""
    sizes = [-(-p.nbytes // ALIGN) * ALIGN for p in layer.parameters()]
    return {name: part[: p.nbytes].view(p.dtype).view(p.shape)
            for (name, p), part in zip(layer.named_parameters(), flat[: sum(sizes)].split(sizes))}


def parts_of(tensors):
    """{name: LazyTensor} -> (name of a parameter, LazyTensor): of a matrix in codes there are several."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Folded):
            for leaf, part in zip(("codes", "absmax", "nested"), tensor.parts()):
                if part is not None:
                    yield name.removesuffix("weight") + leaf, files.lazy(part)
        else:
            yield name, tensor


def page_locked(size):
    """Bytes of main memory that a GPU fetches by itself: whole pages, of which none can be locked twice. (torch's own
    pin_memory rounds up to a power of two.)"""
    room, cuda = torch.empty(size + 2 * PAGESIZE, dtype=torch.uint8), torch.cuda.cudart()
    begin, whole = -room.data_ptr() % PAGESIZE, -(-size // PAGESIZE) * PAGESIZE
    memory = room[begin: begin + size]
    if error := int(cuda.cudaHostRegister(memory.data_ptr(), whole, 1)):  # 1: for every device
        raise ValueError(f"{size / 1e9:.3f} GB of main memory cannot be locked for the GPU (CUDA error {error}); plan "
                         "with less: --max_memory cpu=…")
    weakref.finalize(memory, cuda.cudaHostUnregister, memory.data_ptr())
    return memory
