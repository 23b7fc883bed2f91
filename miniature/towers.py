"""The miniature's towers: a CLIP that has seen the world and a LLaMA that has read about it, neither of the other.

LLaVA starts from towers that somebody pretrained on far more than it will ever see. So does the miniature: a small CLIP
learns which caption belongs to which picture (Radford et al. 2021), a small LLaMA learns to read and to answer in
words, and both are written as public checkpoints, which train.py then loads like any other. Neither meets a withheld
combination.

Legend: B pictures or texts of a batch, D width of the shared space, V vocabulary.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import random
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

import data
import weights
from kernels.attention import Packing
from miniature import records, words
from miniature.world import SIDE, draw, make_scene, training_scene, with_other_shapes, without_names
from model import IGNORE_INDEX, LlamaConfig, LlamaModel, Llava, LlavaConfig
from tokenizer import SPACE, Tokenizer
from vision import ClipVision, ClipVisionConfig, ImageProcessor

VISION = ClipVisionConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                          image_size=SIDE, patch_size=12)
LANGUAGE = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5)
READER = LANGUAGE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)  # of captions, for CLIP
PIECES = 576  # of the tokenizer: 3 special, 256 bytes, the world's words


def write_towers(folder, seed=0, clip_steps=900, llama_steps=750, say=print):
    """Train tokenizer, CLIP and LLaMA and write folder/vision and folder/llm."""
    folder = Path(folder)
    tokenizer = write_tokenizer(folder / "llm", seed)
    say(f"tokenizer: {len(tokenizer)} pieces")
    threads = max(1, torch.get_num_threads() // 2)
    spawn = multiprocessing.get_context("spawn")  # a forked child would wait for OpenMP threads that it does not have
    with concurrent.futures.ProcessPoolExecutor(2, spawn, torch.set_num_threads, (threads,)) as processes:
        for done in [processes.submit(write_clip, folder / "vision", tokenizer, seed, clip_steps, say),
                     processes.submit(write_llama, folder / "llm", tokenizer, seed, llama_steps, say)]:
            done.result()


# ----------------------------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder, seed):
    """A LLaMA-like tokenizer (byte-pair encoding, byte fallback, `legacy` false) of the world's texts. -> Tokenizer"""
    captions, _ = records.caption_records(f"tokenizer {seed}", 1000)
    conversations, _ = records.finetune_records(f"tokenizer {seed}", 3000)
    texts = [turn["value"].replace("<image>\n", "")
             for record in captions + conversations for turn in record["conversations"]]
    texts += [data.templates.TEMPLATES["v1"].system, "USER: ASSISTANT: USER: ASSISTANT:",
              "color shape place size"] * 300
    special = ["<unk>", "<s>", "</s>"]
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    words_and_marks = tokenizers.Regex(f"{SPACE}?[A-Za-z-]+|{SPACE}?[^A-Za-z{SPACE}]|{SPACE}")
    library.pre_tokenizer = pre_tokenizers.Split(words_and_marks, "isolated")
    library.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=pieces, show_progress=False)
    library.train_from_iterator(texts, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    spec["pre_tokenizer"] = None  # it kept the pieces within words; LLaMA's format has none, and the merges do without
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": LANGUAGE["max_position_embeddings"],
    }, indent=2))
    return Tokenizer.from_folder(folder)


# ---------------------------------------------------------------------------------------------------------------- CLIP


class Clip(nn.Module):
    """Both halves of CLIP: the vision tower, a small LLaMA that reads captions, and the space they share."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vision = ClipVision(VISION)
        self.post_layernorm = nn.LayerNorm(VISION.hidden_size, VISION.layer_norm_eps)
        self.text = LlamaModel(LlamaConfig(**READER, vocab_size=vocabulary))
        self.visual_projection = nn.Linear(VISION.hidden_size, 64, bias=False)
        self.text_projection = nn.Linear(READER["hidden_size"], 64, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))  # log of 1/0.07

    def forward(self, pixel_values, batch):
        """Contrastive loss of B pictures and their B captions: each must find the other among all."""
        pictures = self.visual_projection(self.post_layernorm(self.vision(pixel_values)[:, 0]))  # (B, D)
        hidden = self.text(self.text.embed_tokens(batch.input_ids), batch.position_ids, Packing(batch.cu_seqlens))
        captions = self.text_projection(hidden[batch.cu_seqlens[1:].long() - 1])  # (B, D), read off the last token
        scores = self.logit_scale.exp() * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T  # (B, B)
        own = torch.arange(len(scores))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def write_clip(folder, tokenizer, seed, steps, say, batch=96):
    """Train CLIP on pictures and their captions, and write its vision half as a CLIPVisionModel.

    Half of each batch are the other half's scenes with other shapes, most of them in colours without a name, so that
    shape is learned, and learned apart from colour: without this the tower cannot tell the shape of a combination that
    it has never seen. No batch comes twice: seen two to four times, they taught less about such combinations.
    """
    torch.manual_seed(seed)
    rng, process, model = random.Random(f"clip {seed}"), ImageProcessor(SIDE), Clip(len(tokenizer))

    def next_batch():
        scenes = [make_scene(rng) for _ in range(batch // 2)]
        scenes = [scene if rng.random() < 0.35 else without_names(scene, rng) for scene in scenes]
        scenes += [with_other_shapes(scene, rng) for scene in scenes]
        captions = [text_example(tokenizer, "", words.glimpse(scene, rng)) for scene in scenes]
        return torch.cat([process(draw(scene)) for scene in scenes]), pack(captions)

    fit(model, lambda step: model(*next_batch()), steps, 3e-3, 0.005, "clip", say)
    tensors = {**model.vision.state_dict(), **{f"vision_model.post_layernorm.{name}": tensor
               for name, tensor in model.post_layernorm.state_dict().items()}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner only
    config = vars(VISION) | {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(process.to_dict(), indent=2))


# --------------------------------------------------------------------------------------------------------------- LLaMA


def write_llama(folder, tokenizer, seed, steps, say, batch=32):
    """Train a LLaMA on texts alone and write it as a LlamaForCausalLM.

    For the first 3/8 of the steps it only looks things up in lists (`notes`): a look-up per three words teaches its
    heads to find one thing by another, which conversations, with an answer per dozen words, do not within minutes.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"llama {seed}")
    config = LlavaConfig(LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)))
    model = Llava(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:  # a word must be heard above what the first layers add to it
            nn.init.normal_(p, std=0.5 if "embed_tokens" in name else 0.02 if "lm_head" in name else p.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data *= 0.1

    def loss(step):
        share = 1.0 if step < 0.375 * steps else 0.1
        return model.loss(pack([(notes if rng.random() < share else text)(tokenizer, rng) for _ in range(batch)]))

    fit(model, loss, steps, 8e-3, 0.01, "llama", say)
    weights.save(weights.Loaded(model, tokenizer, None, config, "v1"), folder)


def notes(tokenizer, rng, count=14):
    """A list of things, then look-ups in few words: "color circle red", "place red circle top-left"."""
    scene = training_scene(rng, count=rng.randint(2, 4))
    ids = tokenizer.encode(listing(scene, rng))
    labels = [IGNORE_INDEX] * len(ids)
    for _ in range(count):
        thing = rng.choice(scene.objects)
        keys = {"place": thing.place, "color and shape": words.name(thing)}
        keys |= {kind: getattr(thing, kind) for kind in ("color", "shape")
                 if getattr(thing, kind) and words.unique(scene, kind, thing)}
        known = rng.choice(list(keys))
        wanted = rng.choice([kind for kind in ("color", "shape", "place", "size")
                             if getattr(thing, kind) and kind not in known])
        asked, told = encode(tokenizer, f"{wanted} {keys[known]}"), encode(tokenizer, getattr(thing, wanted))
        ids += asked + told
        labels += [IGNORE_INDEX] * len(asked) + told
    return data.Example("notes", ids, labels)


@functools.cache
def encode(tokenizer, phrase):
    """The ids of one of the few phrases that look-ups are made of."""
    return tokenizer.encode(phrase, bos=False)


def text(tokenizer, rng):
    """One text about a scene, as an Example. Where a picture will stand later, words stand now: a bare list of things.

    Mostly a conversation about the list; or the list retold as a caption or a description, or reasoned about.
    """
    scene = training_scene(rng, count=rng.randint(1, 4))
    seen, form = listing(scene, rng), rng.random()
    if form < 0.15:
        return text_example(tokenizer, seen, words.caption(scene) + "\n")
    if form < 0.9:
        turns = words.dialogue(scene, rng, records.TURNS)
    else:
        turns = rng.choice([[words.reasoning(scene, rng)], [words.general(rng)],
                            [(rng.choice(words.DETAIL_REQUESTS), words.description(scene))]])
    record = records.record("text", 0, [(f"{seen}\n{turns[0][0]}", turns[0][1]), *turns[1:]])
    return data.render_record(record, tokenizer, "v1")


def listing(scene, rng):
    """The scene in bare words, things in any order: what a picture is to a reader who cannot see."""
    return ", ".join(f"{thing.size} {words.name(thing)} {thing.place}"
                     for thing in rng.sample(scene.objects, len(scene.objects))) + "."


# ------------------------------------------------------------------------------------------------------------- training


def text_example(tokenizer, given, learned):
    """`given` is read, `learned` is learned; both as texts of their own."""
    before = tokenizer.encode(given) if given else [tokenizer.bos_token_id]
    after = tokenizer.encode(learned, bos=False)
    return data.Example("text", before + after, [IGNORE_INDEX] * len(before) + after)


def pack(examples):
    """Examples without pictures -> Batch."""
    return data.pack(examples, LlavaConfig())


def fit(model, loss_of_step, steps, learning_rate, matrix_rate, name, say):
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the rest; the rates rise for 50 steps and
    fall over the last third. Within this few steps, AdamW alone does not find the heads that look things up."""
    matrices = {p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    others = [p for p in model.parameters() if p not in matrices]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
                  torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.0)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    began, course = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min(1, step / 50, 3 * (steps - step + 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
        course = loss.item() if step == 1 else 0.98 * course + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            spent = time.perf_counter() - began
            left = spent / step * (steps - step)
            say(f"{name}: step {step}/{steps}, loss {course:.3f}, {spent:.0f} s, ETA {left:.0f} s", flush=True)
