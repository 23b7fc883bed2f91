"""The miniature's towers: a CLIP that has seen the world and a LLaMA that has read about it, neither of the other.

LLaVA starts from towers that somebody pretrained on far more than it will ever see. So does the miniature: a small CLIP
learns which caption belongs to which picture (Radford et al. 2021), a small LLaMA learns to read and answer in words, and
both are written as public checkpoints, which train.py then loads like any other. Neither meets a withheld combination.

Legend: B pictures or texts of a batch, D width of the shared space, V vocabulary.
"""

import json
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
from miniature.world import SIDE, draw, make_scene
from model import IGNORE_INDEX, LlamaConfig, LlamaModel, Llava, LlavaConfig
from tokenizer import SPACE, Tokenizer
from vision import ClipVision, ClipVisionConfig, ImageProcessor

VISION = ClipVisionConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                          image_size=SIDE, patch_size=12)
LANGUAGE = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=100.0)
PIECES = 576  # of the tokenizer: 3 special, 256 bytes, the world's words
TEXT_COUNTS = {1: 15, 2: 50, 3: 20, 4: 15}  # per cent; with one object there is nothing to look up


def write_towers(folder, seed=0, clip_steps=700, llama_steps=1500, say=print):
    """Train tokenizer, CLIP and LLaMA and write folder/vision and folder/llm."""
    folder = Path(folder)
    tokenizer = write_tokenizer(folder / "llm", seed)
    say(f"tokenizer: {len(tokenizer)} pieces")
    write_clip(folder / "vision", tokenizer, seed, clip_steps, say)
    write_llama(folder / "llm", tokenizer, seed, llama_steps, say)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder, seed):
    """A LLaMA-like tokenizer (byte-pair encoding, byte fallback, `legacy` false) of the world's texts. -> Tokenizer"""
    texts = [turn["value"].replace("<image>\n", "")
             for record in records.caption_records(f"tokenizer {seed}", 1000)[0] + records.finetune_records(f"tokenizer {seed}", 3000)[0]
             for turn in record["conversations"]]
    texts += [data.templates.TEMPLATES["v1"].system, "USER: ASSISTANT: USER: ASSISTANT:"] * 300
    special = ["<unk>", "<s>", "</s>"]
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}?[A-Za-z-]+|{SPACE}?[^A-Za-z{SPACE}]|{SPACE}"), "isolated")
    library.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=PIECES, special_tokens=pieces, show_progress=False))
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    spec["pre_tokenizer"] = None  # it kept the pieces within words; LLaMA's format has none, and the merges do without
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": LANGUAGE["max_position_embeddings"],
    }, indent=2))
    return Tokenizer.from_folder(folder)


# ---------------------------------------------------------------------------------------------------------------- CLIP


class Clip(nn.Module):
    """Both halves of CLIP: vision_model as ClipVision, a LLaMA of two layers that reads captions, and the shared space."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vision = ClipVision(VISION)
        self.post_layernorm = nn.LayerNorm(VISION.hidden_size, VISION.layer_norm_eps)
        self.text = LlamaModel(LlamaConfig(**LANGUAGE | {"num_hidden_layers": 2, "vocab_size": vocabulary}))
        self.visual_projection = nn.Linear(VISION.hidden_size, 64, bias=False)
        self.text_projection = nn.Linear(LANGUAGE["hidden_size"], 64, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))  # log of 1/0.07

    def forward(self, pixel_values, batch):
        """Contrastive loss of B pictures and their B captions: each must find the other among all."""
        pictures = self.visual_projection(self.post_layernorm(self.vision(pixel_values)[:, 0]))  # (B, D)
        hidden = self.text(self.text.embed_tokens(batch.input_ids), batch.position_ids, Packing(batch.cu_seqlens))
        captions = self.text_projection(hidden[batch.cu_seqlens[1:].long() - 1])  # (B, D), read off the last token
        scores = self.logit_scale.exp() * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T  # (B, B)
        own = torch.arange(len(scores))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def write_clip(folder, tokenizer, seed, steps, say, batch=64):
    """Train CLIP on pictures and their captions, and write its vision half as a CLIPVisionModel."""
    torch.manual_seed(seed)
    rng, process, model = random.Random(f"clip {seed}"), ImageProcessor(SIDE), Clip(len(tokenizer))

    def loss():
        scenes = [make_scene(rng) for _ in range(batch)]
        pixels = torch.cat([process(draw(scene)) for scene in scenes])
        return model(pixels, pack([text_example(tokenizer, "", words.caption(scene)) for scene in scenes]))

    fit(model, loss, steps, 2e-3, "clip", say)
    tensors = {**model.vision.state_dict(), **{f"vision_model.post_layernorm.{name}": tensor
               for name, tensor in model.post_layernorm.state_dict().items()}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = vars(VISION) | {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(process.to_dict(), indent=2))


# --------------------------------------------------------------------------------------------------------------- LLaMA


def write_llama(folder, tokenizer, seed, steps, say, batch=16):
    """Train a LLaMA on texts alone and write it as a LlamaForCausalLM."""
    torch.manual_seed(seed)
    rng = random.Random(f"llama {seed}")
    config = LlavaConfig(LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)))
    model = Llava(config)
    nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.5)  # words must be heard above the first layers
    fit(model, lambda: model.loss(pack([text(tokenizer, rng) for _ in range(batch)])), steps, 1e-3, "llama", say)
    weights.save(weights.Loaded(model, tokenizer, None, config, "v1"), folder)


def text(tokenizer, rng):
    """One text about a scene, as an Example. Where a picture will stand later, words stand now: a bare list of things.

    Mostly a conversation about the list; or the list retold as a caption, a description or in single statements.
    """
    scene = make_scene(rng, count=rng.choices(list(TEXT_COUNTS), list(TEXT_COUNTS.values()))[0])
    seen = listing(scene, rng)
    form = rng.random()
    if form < 0.35:
        return text_example(tokenizer, seen, words.caption(scene) + "\n")
    if form < 0.5:
        return text_example(tokenizer, seen, words.statements(scene, rng))
    if form < 0.9:
        turns = words.dialogue(scene, rng, records.TURNS)
    else:
        turns = rng.choice([[words.reasoning(scene, rng)], [words.general(rng)],
                            [(rng.choice(words.DETAIL_REQUESTS), words.description(scene))]])
    record = records.record("text", 0, [(f"{seen}\n{turns[0][0]}", turns[0][1]), *turns[1:]])
    return data.render_record(record, tokenizer, "v1")


def listing(scene, rng):
    """The scene in bare words, things in any order: what a picture is to a reader who cannot see."""
    return ", ".join(f"{thing.size} {thing.color} {thing.shape} {thing.place}"
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


def fit(model, loss_of_next_batch, steps, learning_rate, name, say):
    """AdamW; the rate rises for 50 steps and falls to nothing over the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began, course = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        factor = min(1, step / 50, 2 * (steps - step + 1) / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        loss = loss_of_next_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        course = loss.item() if step == 1 else 0.98 * course + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            spent = time.perf_counter() - began
            say(f"{name}: step {step}/{steps}, loss {course:.3f}, {spent:.0f} s, ETA {spent / step * (steps - step):.0f} s", flush=True)
