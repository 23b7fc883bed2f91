"""Placement: which device holds which decoder layer, settled before a number is read.

    python sample.py --model_name_or_path M --max_memory 4GB --plan                     what would lie where
    python sample.py --model_name_or_path M --max_memory cuda:0=4GB,cpu=8GB --prompt "…"

The first device holds what stands around the layers: tower, projector, embeddings, head. The layers follow in their
order, on the devices in theirs; the last ones, for which there is no room, rest in main memory, then in their files,
and take turns on the last device (sampling/turns.py). Without a GPU main memory is the device. What Python and torch
take without a model is not counted. GB are 10^9 bytes.
"""

import os
import re
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby

import torch

from formats import adapter as adapters
from formats import command, published
from formats.bitsandbytes import Folded
from formats.files import gigabytes
from kernels.attention import SHORT
from model import Llava
from quant import Quantisation
from sampling.turns import ALIGN, Buffer, Following, size_of
from weights import Blank, pick_device, pick_dtype

MAPS, DISK = ("auto", "cpu", "cuda", "balanced"), "disk"
LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.(.+)")
ROOM = 0.94  # of what is free can be planned with
LIBRARIES = int(3e7)  # bytes that torch, its BLAS and the tokenizer take when they are first used

# -------------------------------------------------------------------------------------------------------- what it takes


@dataclass(frozen=True)
class Needs:
    """Bytes. layers: of each decoder layer's weights; beside: what each keeps on its device even if these come and go,
    cells of the cache and adapters; around: all other weights; work: what comes and goes while a prompt is read."""

    layers: tuple
    beside: int
    around: int
    work: int

    buffers = property(lambda self: 2 * max(self.layers))

    def least(self, away):
        """For all of it on one device, with `away` layers taking turns."""
        here = sum(self.layers[: len(self.layers) - away])
        return self.around + self.work + here + self.buffers * (away > 0) + len(self.layers) * self.beside


def count(model, tensors, quantisation, tokens, adapter=0, cpu=True):
    """A Llava on the meta device -> Needs. tensors: {our name: LazyTensor} of its files, or {} if only its config is
    known; tokens: cells of the cache, rows of the longest prompt; adapter: numbers in a LoRA's matrices; cpu: whether
    it computes there."""
    text, vision, layers, around, largest = model.config.text, model.config.vision, Counter(), 0, 0
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        if isinstance(tensors.get(name), Folded):
            size = tensors[name].size
        elif name.endswith(".weight") and quantisation.wants(module, model.get_submodule(module)):
            size = coded(quantisation, *p.shape)
        else:
            size = p.nbytes
        if match := LAYER.match(name):
            layers[int(match[1])] += size + 3 * ALIGN  # codes, two kinds of scales
            largest = max(largest, p.nbytes)
        else:
            around += size
    s, seeing = p.itemsize, 0  # what a layer makes of all rows at once, in the language model and in the tower
    reading = s * tokens * (8 * text.hidden_size + 3 * text.intermediate_size) + 8 * text.vocab_size
    if cpu:  # the pages of a matrix that is read; scores of attention
        reading += largest + 10 * text.num_attention_heads * min(tokens, SHORT) ** 2 * (s == 2)
    if vision:
        sizes = model.config.pinpoints if model.config.image_aspect_ratio == "anyres" else [[vision.image_size] * 2]
        rows = max(map(model.config.views_of, sizes)) * (1 + vision.num_patches)
        seeing = s * rows * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    cells = 2 * s * tokens * text.num_key_value_heads * text.head_dim
    return Needs(tuple(layers[i] for i in sorted(layers)), cells + s * adapter // len(layers), around,
                 max(reading, seeing) + largest + LIBRARIES)  # largest: a matrix that is decoded, or read


@cache
def coded(quantisation, rows, width):
    """Bytes of a matrix (rows, width) in codes, from some of its rows."""
    part = quantisation.linear(torch.zeros(min(rows, 64), width), torch.float32)
    return sum(p.nbytes for p in part.parameters()) * rows // part.out_features


def free_memory(device):
    """Bytes of a device that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:  # what Linux can give up at once, copies of files, counts as available
        with open("/proc/meminfo", encoding="utf-8") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------------------------------- the plan


class Placing:
    """What --device_map, --max_memory and --plan_tokens ask for; weights.load calls it to learn what goes where.
    max_memory: '4GB' of each device that computes, or 'cuda:0=4GB,cpu=8GB'; None: what is free. ValueError: neither."""

    def __init__(self, device_map=None, max_memory=None, tokens=2048):
        self.device_map, self.tokens = device_map or "auto", tokens
        self.limits = {}  # {device, its kind, or '' for all: bytes}
        if self.device_map not in MAPS or tokens < 1:
            raise ValueError(f"--device_map {device_map} --plan_tokens {tokens}: expected {', '.join(MAPS)}, 1 or more")
        for word in filter(None, (max_memory or "").replace(" ", "").split(",")):
            device, _, size = word.rpartition("=")
            try:
                self.limits[device] = command.file_size(size if re.fullmatch(r"(cuda(:\d+)?|cpu|mps)?", device) else "")
            except ArgumentTypeError:
                raise ValueError(f"--max_memory {word}: expected a size like 4GB, or cuda:0=4GB,cpu=8GB") from None

    def rooms(self, device):
        """Where a model can compute -> {device: bytes}, and bytes of main memory where layers can rest beside that."""
        several = device.type == "cuda" and device.index is None
        named = sorted(name for name in self.limits if ":" in name)  # of a machine that is only planned for
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or named if several else [str(device)]
        if self.device_map == "balanced" and len(names) < 2:
            raise ValueError(f"--device_map balanced spreads a model over several GPUs, and here is {names[0]} alone; "
                             "use auto")
        if lost := self.limits.keys() - {"", "cpu", device.type, *names}:
            raise ValueError(f"--max_memory {', '.join(lost)}: here are {', '.join({*names, 'cpu'})}")

        def room(*keys):
            given = next((self.limits[key] for key in keys if key in self.limits), None)
            return given or int(ROOM * free_memory(torch.device(keys[0])))

        memory = 0 if device.type == "cpu" or self.device_map == "cuda" else room("cpu")
        return {name: room(name, device.type, "") for name in names}, memory

    def __call__(self, model, tensors, quantisation, device, adapter=None, coding=None):
        """-> Plan. model, tensors, quantisation: as `count` takes them; device: where it computes, without a number on
        all GPUs; adapter: a LoRA folder; coding: as in `make`. ValueError: no room, with the least that would do."""
        modules = adapters.open_adapter(adapter)[0].adapter.modules if adapter else {}
        numbers = sum(matrix.numel() for pair in modules.values() for matrix in pair.values())
        if coding is None:
            coding = quantisation.kind and not any(isinstance(tensor, Folded) for tensor in tensors.values())
        needs = count(model, tensors, quantisation, self.tokens, numbers, device.type == "cpu")
        return make(needs, *self.rooms(device), self.device_map, coding)


def make(needs, rooms, memory, device_map="auto", coding=False):
    """As few layers take turns as the rooms allow -> Plan. memory: bytes beside the rooms, where layers can rest;
    coding: matrices are quantised while they are loaded, so that none rests in its file. ValueError: nothing fits."""
    total, wanted = len(needs.layers), rooms
    if device_map == "balanced":  # the smallest equal rooms that do
        equal = ({name: min(room, size) for name, room in rooms.items()}
                 for size in range(needs.least(0) // len(rooms), sum(rooms.values()), max(needs.layers) // 8 + 1))
        wanted = next((part for part in equal if fit(needs, part, 0)), rooms)
    for away in (0, *range(3, total + 1 if device_map != "cuda" else 0)):  # one or two would not need turns
        if devices := fit(needs, wanted, away):
            homes, left = devices[: total - away], memory
            for size in needs.layers[total - away:]:
                homes.append("cpu" if size <= left else DISK)
                left -= size * (size <= left)
            if not coding or DISK not in homes:
                return Plan(needs, rooms, devices, homes)
            raise ValueError(
                f"{homes.count(DISK)} of {total} layers find no room, and cannot rest in their files, since --bits "
                f"quantises them while they are loaded: all of it takes {gigabytes(needs.least(0))}; give more, or "
                "quantise the files first: python weights.py convert SRC OUT --bits 4")
    have = ", ".join(f"{name} {gigabytes(room)}" for name, room in rooms.items())
    least = needs.least(total if total > 2 and device_map != "cuda" else 0)
    raise ValueError(f"the model does not fit into {have}: {gigabytes(least)} are the least that would do, less with "
                     "fewer --plan_tokens or --bits 4" + ", or with --device_map auto" * (device_map == "cuda"))


def fit(needs, rooms, away):
    """The device of each layer if the last `away` of them take turns on the last device -> [name], None: no room."""
    left, names = {name: room - needs.work for name, room in rooms.items()}, list(rooms)
    first, last, devices = names[0], names[-1], []
    left[first] -= needs.around
    left[last] -= away * needs.beside + needs.buffers * (away > 0)
    if left[first] < 0 or away and left[last] < 0:
        return None
    for size in needs.layers[: len(needs.layers) - away]:
        while names and left[names[0]] < size + needs.beside:
            names.pop(0)
        if not names:
            return None
        left[names[0]] -= size + needs.beside
        devices.append(names[0])
    return devices + [last] * away


@dataclass(frozen=True)
class Plan:
    """devices: where each layer computes; homes: where its weights rest: there, in 'cpu', main memory, or on 'disk'."""

    needs: Needs
    rooms: dict
    devices: list
    homes: list

    def device_of(self, name):
        """Where weights.fill puts the tensor of this name; what comes to the meta device is not read yet."""
        match = LAYER.match(name)
        home = self.homes[int(match[1])] if match else next(iter(self.rooms))
        return torch.device("meta" if home == DISK else home)

    def settle(self, model, tensors):
        """Have the layers of a filled model take turns, and what flows between devices follow."""
        inner, files_of = model.language_model.model, {}
        for name, tensor in tensors.items():
            if match := LAYER.match(name):
                files_of.setdefault(int(match[1]), {})[match[2]] = tensor
        away = [i for i, (device, home) in enumerate(zip(self.devices, self.homes)) if device != home]
        if away:
            size, device = max(size_of(inner.layers[i]) for i in away), torch.device(self.devices[-1])
            buffers = [Buffer(size, device, DISK in self.homes) for _ in range(2)]
            for number, i in enumerate(away):
                buffers[number % 2].adopt(inner.layers[i], files_of[i] if self.homes[i] == DISK else None)
            model.register_state_dict_pre_hook(refuse)
        if len(self.rooms) > 1:
            follow = Following()
            for module, device in zip((*inner.layers, inner.norm), (*self.devices, next(iter(self.rooms)))):
                module.register_forward_pre_hook(partial(follow, torch.device(device)))
        words = {"cpu": "in main memory", DISK: "on disk"}
        command.say("  layers " + ", ".join(
            f"{first}-{last} {words.get(home) or f'on {home}'}" + f" take turns on {device}" * (home != device)
            for first, last, device, home, _ in self.groups()))

    def groups(self):
        """Neighbours that live alike -> (first, last, device, home, bytes of their weights)"""
        for (device, home), group in groupby(range(len(self.homes)), lambda i: (self.devices[i], self.homes[i])):
            layers = [*group]
            yield layers[0], layers[-1], device, home, sum(self.needs.layers[i] for i in layers)

    def lines(self, tokens):
        """What lies where, as a table."""
        needs, first, last, used = self.needs, next(iter(self.rooms)), self.devices[-1], {}
        rows = [("embeddings, head, tower, projector", first, needs.around)]
        rows += [(f"layers {begin}-{end}", home, size) for begin, end, _, home, size in self.groups()]
        for device in (there := dict.fromkeys((first, *self.devices))):
            rows += [(f"cache of {tokens:,} tokens, adapters", device, needs.beside * self.devices.count(device)),
                     ("workspace", device, needs.work)]
        turning = sum(size for *_, device, home, size in self.groups() if device != home)
        rows += [("room for two layers that take turns", last, needs.buffers)] if turning else []
        yield f"{'part':40s} {'where':8s} {'GB':>8s}"
        for part, where, size in rows:
            used[where] = used.get(where, 0) + size
            yield f"{part:40s} {where:8s} {size / 1e9:8.3f}"
        for device in there:
            yield f"{'together':40s} {device:8s} {used[device] / 1e9:8.3f} of {gigabytes(self.rooms[device])}"
        if turning:
            yield f"each pass, one for every word of an answer, brings in {gigabytes(turning)}"


def refuse(*_):
    """Of a model whose layers take turns, a state dict would hold what is in the buffers."""
    raise ValueError("layers of this model take turns (--device_map, --max_memory); to save it, load it without")


def show(args):
    """sample.py's --plan: print what would lie where, from config.json files alone; GPUs that --max_memory names need
    not be here. -> 0"""
    name, placing = args.model_name_or_path, Placing(args.device_map, args.max_memory, args.plan_tokens)
    quantisation = Quantisation(args.bits, args.quant_type, args.double_quant, args.quant_also)
    if not torch.cuda.is_available() and any(":" in limit for limit in placing.limits):
        device, dtype = torch.device("cuda"), args.dtype.replace("auto", "bfloat16")
    else:
        device, dtype = pick_device(args.device), args.dtype
    config = published.model_config(name)
    stored = published.values_of(args.model_base or name).get("quantization_config")
    if args.model_base:
        config = replace(config, text=published.model_config(args.model_base).text)
    if args.vision_tower:
        config = replace(config, vision=published.tower_config(args.vision_tower))
    if stored:  # its files hold codes already
        quantisation = Quantisation(8 if stored.get("load_in_8bit") else 4, stored.get("bnb_4bit_quant_type", "nf4"),
                                    bool(stored.get("bnb_4bit_use_double_quant")))
    dtype = pick_dtype(dtype, device)
    with torch.device("meta"), Blank():
        model = Llava(config).to(dtype)
    adapter = args.adapter[-1] if args.adapter else None  # which is loaded first
    plan = placing(model, {}, quantisation, device, adapter, bool(quantisation.kind and not stored))
    bits = f", {quantisation.bits} bits" * (quantisation.bits < 16)
    print(f"{name} in {str(dtype).removeprefix('torch.')}{bits}", *plan.lines(placing.tokens), sep="\n")
    return 0
