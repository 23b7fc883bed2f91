"""What a training step holds in memory, counted before anything is loaded: `python train.py … --plan --gpus 8x80GB`.

A step is fullest about where the forward pass ends and the backward pass begins. Then a device holds, with s
the bytes of a computed number (2 in 16 bits, else 4), W the devices that share a model (--fsdp_replicas):

    trained weight   4 (float32 master) + 4 (gradient) + 8 (AdamW's two moments), divided among W devices
    frozen weight    s, whole on each device; 0.516 in NF4's 4 bits with double quantisation, 1 in 8 bits
    gathered weight  s: of the layers at work, and all the time of what stands around the layers
    activations      what autograd keeps of the forward pass because a derivative needs it

What a layer keeps per token. A product with a matrix keeps its input only if the matrix is trained: stage 1 keeps less.

    x, 1/rms           sD + 4      twice: each RMSNorm's input, and the root
    normed             sD          twice, if trained: the input of q, k, v (of gate, up)
    q, k, v, out       4sQ + 4H    k and v are repeated where heads share them, but in Triton; 4H: softmax's sums
    gate, up           2sF         the rest of their product is computed again
    their product      sF          if trained: the input of down_proj

With activation checkpointing a layer keeps its input, sD, and one layer at a time is computed again. Only labelled rows
meet the vocabulary: 2sRD, and sRV if the head is trained. tests/test_plan.py holds all this against what a run
allocates: a change of what model.py keeps is a change here. GB are 10^9 bytes.

Legend: T tokens of a micro-batch, D width, H heads, Q = H x head dim, F the MLP's width, V vocabulary, R labelled rows.
"""

import os
from argparse import ArgumentTypeError
from dataclasses import dataclass, fields, replace

import torch

from formats import command, layouts, published
from kernels.attention import EMPTY, SHORT
from model import IGNORE_INDEX, LlavaConfig

ROOM = 0.94  # of a device's memory can be planned with: CUDA itself takes some, and there are gaps
LAYERS, HEAD = "language_model.model.layers.", "language_model.lm_head.weight"

# -------------------------------------------------------------------------------------------------------- the counting


@dataclass(frozen=True)
class Step:
    """What decides, beside the model, how many bytes a step takes; `replace` asks: what if?"""

    lengths: tuple  # tokens of each sequence of a micro-batch, places of pictures included
    learned: int  # R
    views: int  # pictures, or tiles of them, that the tower is shown
    accumulate: int = 1
    dtype: str = "float32"
    checkpointing: bool = False
    devices: int = 1
    share: float = 1  # of what is trained that a device holds: 1 / W, 1 if nothing is sharded, 0 if the CPU holds it
    keep_gathered: bool = False  # weights, between forward and backward (ZeRO-2)
    lora_r: int = 0
    bits: int = 16  # of the frozen matrices in the layers
    double_quant: bool = True
    cuda: bool = True
    shard_base: bool = False  # divide the layers' frozen weights, too

    size = property(lambda self: 4 if self.dtype == "float32" else 2)  # s
    rows = property(lambda self: sum(self.lengths))  # T
    flags = property(lambda self: f"--per_device_train_batch_size {len(self.lengths)} --gradient_accumulation_steps "
                                  f"{self.accumulate}")


def total(model, step):
    """Bytes that a device needs for a step."""
    return sum(parts(model, step).values())


def parts(model, step):
    """{part: bytes on each device} when a step is fullest. model: a Llava whose requires_grad says what is trained."""
    held, kept = weights(model, step), activations(model, step)
    shared = min(held["gradients"], sum(kept.values())) if step.accumulate == 1 else 0
    return held | kept | {"workspace": workspace(model, step), "gradients in the place of activations": -shared}


def learns(model, step, prefix=""):
    """{name: parameter} of what is trained; with LoRA, no weight of the language model is."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name.startswith(prefix)
            and not (step.lora_r and name.startswith("language_model"))}


def corrections(model, step, prefix):
    """How many numbers LoRA trains in a part: those that are there, else A (r, in) and B (out, r) for every matrix."""
    own = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    there = sum(p.numel() for name, p in own.items() if ".lora_" in name)
    return there or step.lora_r * sum(sum(p.shape) for p in own.values() if p.dim() == 2)


def weights(model, step):
    """What is held from step to step: weights by part, gathered copies, gradients, AdamW's moments."""
    rows, trained, lora = {}, learns(model, step), corrections(model, step, LAYERS)
    for name, p in model.named_parameters():
        part, matrix = name.split(".")[0], name.startswith(LAYERS) and p.dim() == 2
        if ".lora_" in name and name not in trained:
            continue
        if name in trained:
            key, size = f"{part}, trained, float32", 4 * p.numel() * step.share
        elif not p.is_floating_point():  # the codes of a model that has been loaded, their scales
            key, size = f"{part}, codes of {step.bits} bits", p.numel()
        elif matrix and step.bits < 16:
            # 8 bits: a float32 scale for a row; 4: for 64 weights, or 8 bits for these, and a float32 for 256 such
            scale = 4 / p.shape[1] if step.bits == 8 else 1 / 64 + 4 / 64 / 256 if step.double_quant else 4 / 64
            key, size = f"{part}, codes of {step.bits} bits", p.numel() * (step.bits / 8 + scale)
        else:
            key, size = f"{part}, frozen, {step.dtype}", step.size * p.numel()
        if step.shard_base and name not in trained and name.startswith(LAYERS):
            size *= step.share
        rows[key] = rows.get(key, 0) + size
    count = lora + sum(p.numel() for p in trained.values())
    around = sum(p.numel() for name, p in trained.items() if ".layers." not in name)
    return rows | {"LoRA, trained, float32": 4 * lora * step.share,
                   "gathered weights": step.size * (count if step.keep_gathered else around),
                   "gradients": 4 * count * step.share, "AdamW's two moments": 8 * count * step.share}


def activations(model, step):
    """What autograd keeps of the forward pass: the table at the head of this file."""
    text, s, trained = model.config.text, step.size, learns(model, step)
    backward = step.lora_r or trained.keys() - {HEAD}  # else nothing before the head has a gradient
    head = model.language_model.lm_head.weight.requires_grad and not step.lora_r
    layers = s * step.rows * text.hidden_size if step.checkpointing else layer(model, step)
    rest = 2 * s * step.rows * text.head_dim + norm(text, step)
    return {"projector's activations": of_pictures(model, step),
            f"activations, {text.num_hidden_layers} layers of {gigabytes(layers)}":
                text.num_hidden_layers * layers if backward else 0,
            "last norm, rotary table": rest if backward else 0,
            "logits of labelled rows": s * step.learned * (2 * text.hidden_size + head * text.vocab_size)}


def layer(model, step):
    """Bytes that one decoder layer keeps."""
    text, s, rows, trained = model.config.text, step.size, step.rows, bool(learns(model, step, LAYERS))
    width, inner = text.hidden_size, text.intermediate_size
    size = attention(step, step.lengths, text.num_attention_heads, text.num_key_value_heads, text.head_dim,
                     trained or step.lora_r > 0)
    size += 2 * norm(text, step) + s * rows * (2 * width * trained + inner * (2 + trained))
    if step.lora_r:  # an adapter keeps its input, which q, k, v share, and gate, up
        size += s * rows * (2 * width + inner)
    return size


def norm(text, step):
    """Bytes that an RMSNorm keeps."""
    return step.rows * (step.size * text.hidden_size + 4)


def attention(step, lengths, heads, kv_heads, head_dim, trained):
    """Bytes kept from q, k and v to the input of o_proj. kernels/attention.py's Triton needs no more than the rows;
    else it computes on a grid of cells, sequences x longest, or each sequence alone where much of that is empty."""
    s, rows, longest, wide, narrow = step.size, sum(lengths), max(lengths), heads * head_dim, kv_heads * head_dim
    if step.cuda and s == 2:
        return 2 * s * rows * (wide + narrow) + 4 * rows * heads
    cells, squares, own = len(lengths) * longest, len(lengths) * longest**2, sum(n * n for n in lengths)
    alone = cells > 2 * rows if step.cuda else heads * (squares - own) > EMPTY * len(lengths)
    cells, squares, padded = (rows, own, False) if alone else (cells, squares, rows < cells)
    size = s * rows * (wide + 2 * narrow) * padded  # on their way to the grid
    if not step.cuda and step.dtype == "bfloat16" and longest <= SHORT:  # by products: also softmax's weights
        return size + s * (cells * (wide + 2 * narrow) + rows * wide * trained + heads * squares)
    return size + s * (4 * cells + rows * trained * (padded or alone)) * wide + 4 * cells * heads


def of_pictures(model, step):
    """Bytes that the projector keeps, and the tower if it is trained."""
    vision, s, tower = model.config.vision, step.size, learns(model, step, "vision_tower")
    trained, size = bool(learns(model, step, "mm_projector")), 0
    if trained or tower:  # before each GELU; if trained the input, too, and behind each GELU
        linears = sum(isinstance(module, torch.nn.Linear) for module in model.mm_projector.modules())
        between = max(0, linears - 1) * model.config.text.hidden_size
        size = s * step.views * model.config.image_tokens * (between + trained * (vision.hidden_size + between))
    if tower:  # a layer: attention, two norms and what they give, 2 or 3 numbers inside the MLP
        width, heads, places = vision.hidden_size, vision.num_attention_heads, 1 + vision.num_patches
        inner = vision.intermediate_size * (3 if vision.hidden_act == "quick_gelu" else 2)
        one = attention(step, [places] * step.views, heads, heads, width // heads, True)
        one += s * step.views * places * (4 * width + inner)
        size += one * len(model.vision_tower.vision_model["encoder"]["layers"])
        size += s * step.views * (places * width + 3 * vision.image_size**2 * (s < 4))  # the first norm's input, pixels
    return size


def workspace(model, step):
    """What comes and goes: weights of two layers, a layer's gradient, one recomputed, one decoded matrix."""
    text, s = model.config.text, step.size
    trained = sum(p.numel() for p in learns(model, step, LAYERS + "0.").values())
    lora = corrections(model, step, LAYERS + "0.")
    frozen = sum(p.numel() * (s if p.is_floating_point() else 1) for name, p in model.named_parameters()
                 if name.startswith(LAYERS + "0.") and ".lora_" not in name)
    copies = (0 if step.keep_gathered else 2 * s) + s + 4 * (step.share < 1)
    return (copies * (trained + lora) + 2 * step.shard_base * frozen
            + (step.bits < 16) * s * text.hidden_size * text.intermediate_size
            + step.checkpointing * layer(model, step)
            + s * step.rows * ((1 if trained else 2) * text.intermediate_size + 2 * text.hidden_size))


# ------------------------------------------------------------------------------------------------- from a command line


def read_config(args):
    """The LlavaConfig that a command line trains, from config.json files or public_models.json alone."""
    chosen = {field.name: getattr(args, field.name, None) for field in fields(LlavaConfig)}
    chosen["image_grid_pinpoints"] = layouts.read_pinpoints(args.image_grid_pinpoints)
    chosen["vision"] = published.tower_config(args.vision_tower) if args.vision_tower else None
    return replace(published.model_config(args.model_name_or_path),
                   **{key: value for key, value in chosen.items() if value is not None})


def devices_of(args):
    """--gpus 8x80GB, or else what is here -> (devices, bytes of each that can be planned with, whether CUDA's)."""
    if args.gpus:
        count, _, size = args.gpus.lower().rpartition("x")
        try:
            if (count := int(count or 1)) < 1:
                raise ValueError
            return count, command.file_size(size), True
        except (ValueError, ArgumentTypeError):
            raise ValueError(f"--gpus {args.gpus}: expected how many of what size, like 8x80GB") from None
    world, local = int(os.environ.get("WORLD_SIZE", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and not args.use_cpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        return world or torch.cuda.device_count(), int(ROOM * memory), True
    return world or 1, int(ROOM * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local), False


def step_of(args, config):
    """The largest micro-batch that the flags allow -> (Step, bytes of a device)."""
    devices, memory, cuda = devices_of(args)
    count, length, places = args.per_device_train_batch_size, args.plan_tokens or args.model_max_length, (0, 0)
    if config.vision is not None:
        sizes = config.pinpoints if config.image_aspect_ratio == "anyres" else [[config.vision.image_size] * 2]
        places = max((config.tokens_of(size), config.views_of(size)) for size in sizes)
    share = 0 if args.offload else min(1, args.fsdp_replicas / devices)
    return Step((length,) * count, count * max(1, length - places[0]), count * places[1],
                args.gradient_accumulation_steps, args.dtype, bool(args.gradient_checkpointing), devices, share,
                args.keep_gathered, args.lora_r if args.lora_enable else 0, args.bits, args.double_quant, cuda,
                args.lora_shard_base), memory


class Checkpointing:
    """Whether activations are kept or computed again: as the flag says, or as the memory allows. line: for the user."""

    def __init__(self, args, model):
        self.model, (self.step, self.memory) = model, step_of(args, model.config)
        need = total(model, replace(self.step, checkpointing=False))
        self.always = args.gradient_checkpointing
        if self.always is None and need <= self.memory:
            self.always = False
        word = {None: "where needed", True: "on", False: "off"}[self.always]
        self.line = (f"activation checkpointing {word}: without it the largest micro-batch, {len(self.step.lengths)} x "
                     f"{self.step.lengths[0]:,} tokens, takes {gigabytes(need)} of {gigabytes(self.memory)} GB")

    def of(self, batch):
        """True if this micro-batch's activations are to be computed again."""
        if self.always is not None:
            return self.always
        learned, lengths = int((batch.labels != IGNORE_INDEX).sum()), tuple(batch.cu_seqlens.diff().tolist())
        step = replace(self.step, lengths=lengths, learned=learned, views=len(batch.pixel_values))
        return total(self.model, step) > self.memory


# -------------------------------------------------------------------------------------------------- what a person sees


def gigabytes(size):
    """12345678901 -> '12.35'."""
    return f"{size / 1e9:.2f}"


def show(args, model):
    """Print the plan of a command line. -> the exit status: 0 if it fits, 1 if not"""
    step, memory = step_of(args, model.config)
    count, why = len(step.lengths), ""
    if step.devices % args.fsdp_replicas:
        raise ValueError(f"--fsdp_replicas {args.fsdp_replicas} does not divide {step.devices} devices")
    if args.gradient_checkpointing is None and total(model, step) > memory:
        why, step = f" (without it {gigabytes(total(model, step))} GB)", replace(step, checkpointing=True)
    records, need = count * step.accumulate * step.devices, total(model, step)
    print(f"{args.model_name_or_path} in {step.dtype} on {step.devices} x {gigabytes(memory)} GB\n"
          f"{count} records x {step.accumulate} accumulated x {step.devices} devices = {records} a step, each of "
          f"{step.lengths[0]:,} tokens (--plan_tokens), {step.learned // count:,} learned\nactivation checkpointing "
          f"{'on' if step.checkpointing else 'off'}{why}\n\n{'on each device':40s} {'GB':>8s}")
    print("\n".join(f"{part:40s} {gigabytes(size):>8s}" for part, size in parts(model, step).items() if size))
    verdict = "it fits" if need <= memory else "it does not fit"
    print(f"{'together':40s} {gigabytes(need):>8s} of {gigabytes(memory)}: {verdict}")
    if args.offload:
        held = 16 * (corrections(model, step, LAYERS) + sum(p.numel() for p in learns(model, step).values()))
        print(f"beside these, the machine's own memory holds {gigabytes(held)} GB for all devices: what is trained")
    if need > memory:
        print("\nwhat to change first, each upon the one before:\n" + "\n".join(advice(model, step, memory)))
    return int(need > memory)


def advice(model, step, memory):
    """Lines: a change upon those before, what it saves and what it leaves; until it fits."""
    wanted, rungs = step, []
    while len(step.lengths) > 1 and total(model, step) > memory:
        step = smaller(step)
        rungs = [(step.flags, step)]
    for flags, change in (("--gradient_checkpointing True", {"checkpointing": True}),
                          ("--deepspeed zero3.json", {"keep_gathered": False}),
                          ("--lora_enable True --lora_r 128", {"lora_r": 128} if learns(model, step, LAYERS) else {}),
                          ("--bits 4", {"bits": 4})):
        if replace(step, **change) != step:
            step = replace(step, **change)
            rungs.append((flags, step))
    before = wanted
    for flags, step in rungs:
        need, saved = total(model, step), total(model, before) - total(model, step)
        yield f"  {flags:64s} saves {gigabytes(saved):>7s} GB, leaves {gigabytes(need):>7s}"
        if need <= memory:
            best = replace(step, **{key: getattr(wanted, key) for key in ("lengths", "learned", "views", "accumulate")})
            while total(model, best) > memory:
                best = smaller(best)
            also = f", also with {best.flags}: {gigabytes(total(model, best))}"
            yield "it fits then" + (also if best != step else "")
            return
        before = step
    yield "that is not enough: take more devices, larger ones, or a smaller model"


def smaller(step):
    """`step` with micro-batches of half the size (or a third …) and twice as many: an update stays the same."""
    count = len(step.lengths)
    by = next(n for n in range(2, count + 1) if count % n == 0)
    return replace(step, lengths=step.lengths[:count // by], learned=step.learned // by, views=step.views // by,
                   accumulate=step.accumulate * by)
