"""A training step, and the memory that it takes, beside transformers' LlavaForConditionalGeneration with AdamW.

A LLaMA of SmolLM2-135M's shape with a tower of ViT-B/32's, random numbers, the same on both sides. Stage 1 trains the
projector on 16 captions, stage 2 the language model, too, on 4 conversations. Lengths are drawn to look like published
data: most captions and answers short, some long, beside a picture's 49 places; one conversation has no picture. Theirs
is padded to the longest, ours is packed.

Three batches in turn, ours and theirs on each; CPU seconds of one thread per batch, the median of three rounds. All
compute in bfloat16. In `step_*` weights that learn are float32: ours as train.py does, theirs under autocast, with all
weights float32. In `*_bf16` all weights and moments are bfloat16. Nobody computes activations twice. `error` is the
difference of both losses before training.

`*_peak`: what is allocated at most during a step, above weights, gradients and AdamW's moments, all of which are there
before it begins, as in every micro-batch that is not the first of its step.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import train
from data import Batch
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlamaConfig, Llava, LlavaConfig
from training import flags
from vision import ClipVisionConfig

PEER = "transformers"
TEXT = LlamaConfig(49152, 576, 1536, 30, 9, 3, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True)
SMALL = LlamaConfig(512, 64, 96, 2, 4, 2, tie_word_embeddings=True)
SMALL_TOWER = ClipVisionConfig(48, 64, 3, 4, 3, 56, 14)
NAMES = {"vision_tower.vision_model": "model.vision_tower", "mm_projector.0": "model.multi_modal_projector.linear_1",
         "mm_projector.2": "model.multi_modal_projector.linear_2", "language_model.model": "model.language_model",
         "language_model.lm_head": "lm_head"}  # of parameters, ours and theirs
STAGES = {"pretrain": 16, "finetune": 4}  # records of a batch


def stage1(smoke):
    """The projector's step, float32 masters."""
    return race("pretrain", False, smoke)


def stage1_bf16(smoke):
    """The projector's step, all in bfloat16."""
    return race("pretrain", True, smoke)


def full(smoke):
    """The step of projector and language model, float32 masters."""
    return race("finetune", False, smoke)


def full_bf16(smoke):
    """The step of projector and language model, all in bfloat16."""
    return race("finetune", True, smoke)


def stage1_peak(smoke):
    """The most memory of the projector's step, float32 masters."""
    return race("pretrain", False, smoke, peak=True)


def full_peak(smoke):
    """The most memory of the step of both, float32 masters."""
    return race("finetune", False, smoke, peak=True)


def race(stage, pure, smoke, peak=False):
    """Both sides on the same weights and batches, in turn. -> a row"""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlavaConfig(SMALL if smoke else TEXT, SMALL_TOWER if smoke else ClipVisionConfig(), "mlp2x_gelu")
    batches = [drawn(stage, config, seed) for seed in range(1 if smoke else 3)]
    model = Llava(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    sides = theirs(stage, model, pure), ours(stage, model, pure)
    error = max(abs(other(batch).item() - mine(batch).item()) for batch in batches for other, mine in [
        [side.loss for side in sides]])
    for side in sides:
        step(side, batches[0])  # makes the moments
    if peak:
        other, mine = (max(allocated(side, batch) for batch in batches) / 1e6 for side in sides)
    else:
        rounds = [[[seconds(side, batch) for side in sides] for batch in batches] for _ in range(1 if smoke else 3)]
        means = [[statistics.mean(spent) for spent in zip(*pairs)] for pairs in rounds]
        other, mine = map(statistics.median, zip(*means))
    del sides, model
    if dist.is_initialized():
        gc.collect()  # what is sharded must be gone before the group is
        dist.destroy_process_group()
    return {"ours": mine, "peer": other, "peer_name": PEER, "unit": "MB" if peak else "s", "error": error}


def seconds_per_record(smoke):
    """CPU seconds of our stage-1 step, for each of its records."""
    torch.set_num_threads(1)
    config = LlavaConfig(SMALL if smoke else TEXT, SMALL_TOWER if smoke else ClipVisionConfig(), "mlp2x_gelu")
    side, batch = ours("pretrain", Llava(config), True), drawn("pretrain", config, 0)
    step(side, batch)
    return seconds(side, batch) / STAGES["pretrain"]


def step(side, batch):
    """A whole step."""
    side.loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(side.trained, 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad()


def seconds(side, batch):
    """CPU seconds of a step."""
    began = time.process_time()
    step(side, batch)
    return time.process_time() - began


def allocated(side, batch):
    """The most bytes allocated at a time in forward and backward, above what was there before: weights, gradients,
    moments."""
    side.loss(batch).backward()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        side.loss(batch).backward()
    side.optimizer.zero_grad()
    changes = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


# ------------------------------------------------------------------------------------------------------------ the data


def drawn(stage, config, seed):
    """A packed batch of random ids whose lengths are those of the stage."""
    draw, places, ids, labels = random.Random(seed), config.image_tokens, [], []
    for number in range(STAGES[stage]):
        if stage == "pretrain":  # BLIP's captions, of which few are long
            asked, answered = 1, min(80, max(5, round(draw.lognormvariate(2.9, 0.5))))
        else:
            asked = min(200, max(10, round(draw.lognormvariate(4.0, 0.6))))
            answered = min(600, max(3, round(draw.lognormvariate(4.2, 1.1))))
        seen = places * (stage == "pretrain" or number + seed > 0)
        words = [draw.randrange(3, config.text.vocab_size - 1) for _ in range(asked + answered)]
        ids.append([1] + [IMAGE_TOKEN_INDEX] * seen + words)
        labels.append([IGNORE_INDEX] * (1 + seen + asked) + words[asked:])
    lengths = torch.tensor([0, *map(len, ids)])
    pictures, side = sum(IMAGE_TOKEN_INDEX in row for row in ids), config.vision.image_size
    pixels = torch.randn(pictures, 3, side, side, generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(len(row)) for row in ids])
    return Batch(torch.tensor(sum(ids, [])), torch.tensor(sum(labels, [])), positions, lengths.cumsum(0).int(), pixels,
                 list(range(len(ids))), [(side, side)] * pictures)


def padded(batch, image_token):
    """The same as transformers takes it: (B, L) with a mask; a picture's places hold image_token."""
    lengths, last = batch.cu_seqlens.diff().tolist(), torch.nn.utils.rnn.pad_sequence
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_INDEX, image_token).split(lengths)
    return {"input_ids": last(ids, True), "labels": last(batch.labels.split(lengths), True, IGNORE_INDEX),
            "attention_mask": last([torch.ones_like(row) for row in ids], True), "pixel_values": batch.pixel_values}


# ----------------------------------------------------------------------------------------------------------- the sides


@dataclass
class Side:
    """loss(batch) -> scalar; trained: parameters."""

    loss: Callable
    trained: list
    optimizer: torch.optim.Optimizer


def ours(stage, model, pure):
    """What train.py does on one process: with float32 masters under FSDP's mixed precision, `pure` without it."""
    args = flags.parse(["--stage", stage, "--bf16", "--use_cpu", "--model_name_or_path", "drawn", "--data_path",
                        "drawn", "--output_dir", "none"])
    for p in train.choose_trained(model, args).parameters():
        if pure or not p.requires_grad:
            p.data = p.data.bfloat16()
    if not pure:
        train.shard(model, train.start_distributed(args)[1], args)
    return Side(model.loss, [p for p in model.parameters() if p.requires_grad], train.build_optimizer(model, args))


def peer(ours):
    """transformers' model with the weights of `ours`, and the id that it marks a picture's places with."""
    import transformers
    config, image_token = ours.config, ours.config.text.vocab_size - 1
    text = transformers.LlamaConfig(**config.text.to_dict(), use_cache=False)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**asdict(config.vision)), text_config=text,
        image_token_index=image_token, tie_word_embeddings=config.text.tie_word_embeddings))
    new = {}
    for name, tensor in ours.state_dict().items():
        for mine, other in NAMES.items():
            name = name.replace(mine, other, 1) if name.startswith(mine) else name
        new[name] = tensor
    missing, unexpected = model.load_state_dict(new, strict=False)
    assert not unexpected and all("vision_tower" in name for name in missing), (missing, unexpected)
    return model, image_token


def theirs(stage, ours, pure):
    """transformers' model, trained as its users do: what does not learn is frozen, AdamW is fused, autocast unless
    `pure`."""
    model, image_token = peer(ours)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "finetune":
        model.model.language_model.requires_grad_(True)
    if pure:
        model.bfloat16()

    def loss(batch):
        inputs = padded(batch, image_token)
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            return model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    return Side(loss, trained, torch.optim.AdamW(trained, 1e-3, fused=True))
