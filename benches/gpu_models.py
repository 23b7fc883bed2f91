"""Whole models on a GPU: LLaVA-1.5-7B with random weights, in bfloat16, beside transformers, peft and bitsandbytes.

Both sides share the weights in memory, and see the same batches: theirs padded to the longest sequence, ours packed.
Python's time to launch kernels counts. Steps are those of an optimiser, forward to AdamW, whose rate is 0, so that
every step is the first one. `error` is the difference of both losses, or of the scores of the next word, relative to
the largest. "as LLaVA" computes activations a second time, as LLaVA's scripts have it. Where less than 120 GB of memory
are there, batches are a quarter as large. Without bitsandbytes the peer of what is in 4 bits is in 16.

A step of decoding is timed at the same place again and again: the cache is taken back after each. Ours is the recorded
one (sampling/graph.py), but for decode_7b_eager.
"""

import gc
from types import SimpleNamespace

import torch

import lora
import quant
from benches.gpu import contest, device
from benches.training import NAMES, SMALL, SMALL_TOWER, padded, peer
from data import Batch
from kernels.nf4 import UNIT
from kernels.nf4 import planar as lay_in_planes
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Cache, LlamaConfig, Llava, LlavaConfig
from sampling.graph import TRIES, Decoder
from vision import ClipVisionConfig

TOWER = ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14)


def build(smoke):
    """Our model on the GPU, nothing of it trained."""
    where = device(smoke)
    gc.collect()  # the models of the row before
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    with torch.device("meta"):
        text, tower = (SMALL, SMALL_TOWER) if smoke else (LlamaConfig(), TOWER)
        model = Llava(LlavaConfig(text, tower, "mlp2x_gelu")).to(dtype)
    model.to_empty(device=where).requires_grad_(False)
    if text.tie_word_embeddings:  # which to_empty has parted
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    generator = torch.Generator(where).manual_seed(0)
    for p in model.parameters():
        p.normal_(0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1)
    return model


def peer_of(ours):
    """transformers' model around the weights of ours, and the id of a picture's places."""
    weight, kept = ours.language_model.lm_head.weight, torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            model, image_token = peer(ours)
    finally:
        torch.set_default_dtype(kept)
    same = dict(ours.named_parameters())
    for name, p in model.named_parameters():
        for mine, other in NAMES.items():
            name = name.replace(other, mine, 1) if name.startswith(other) else name
        if name in same:  # all but the tower's layers that nobody needs
            p.data = same[name].data
    return model.requires_grad_(False), image_token


def conversations(config, lengths, learned, where):
    """A packed batch: each sequence shows a picture and ends with `learned` learned words."""
    places, draw = config.image_tokens, torch.Generator().manual_seed(0)
    ids, labels = [], []
    for length in lengths:
        words = torch.randint(3, config.text.vocab_size - 1, (length - places - 1,), generator=draw)
        ids.append(torch.cat([torch.tensor([1]), torch.full((places,), IMAGE_TOKEN_INDEX), words]))
        labels.append(ids[-1].clone())
        labels[-1][: length - learned] = IGNORE_INDEX
    side = config.vision.image_size
    pixels = torch.randn(len(lengths), 3, side, side, generator=draw)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(torch.cat(ids), torch.cat(labels), positions, torch.tensor([0, *lengths]).cumsum(0).int(), pixels,
                 [str(i) for i in range(len(lengths))], [(side, side)] * len(lengths)).to(where)


def inputs_of(batch, image_token, dtype):
    """The same for transformers."""
    inputs = padded(batch, image_token)
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


# ------------------------------------------------------------------------------------------------------------- training


def step_stage1_7b(smoke):
    """The projector's step on 32 captions: 596 tokens, 19 of them learned."""
    return step(smoke, [596] * 32, 19, "projector")


def step_lora_7b(smoke):
    """LoRA's, r = 128, on 16 conversations of 640 to 960 tokens, 110 of them learned; no dropout on either side."""
    return step(smoke, list(range(640, 960, 20)), 110, "lora")


def step_qlora_7b(smoke):
    """QLoRA's, r = 64, NF4 with double quantisation, on 4 conversations of 800 tokens."""
    return step(smoke, [800] * 4, 110, "qlora")


def step(smoke, lengths, learned, kind):
    """Both sides' step. -> a row"""
    model, where = build(smoke), device(smoke)
    places = model.config.image_tokens
    if smoke:
        lengths, learned = [places + 9, places + 20], 5
    elif torch.cuda.get_device_properties(where).total_memory < 120e9 and len(lengths) > 4:
        lengths = lengths[:: 4]
    batch = conversations(model.config, lengths, learned, where)
    other, image_token = peer_of(model)
    inputs = inputs_of(batch, image_token, other.dtype)
    name = quantise_theirs(other) if kind == "qlora" else "transformers"
    if kind == "qlora":
        quantise_ours(model)
    if kind == "projector":
        trained = [p.requires_grad_() for p in model.mm_projector.parameters()]
        others = [p.requires_grad_() for p in other.model.multi_modal_projector.parameters()]
    else:
        rank = 4 if smoke else {"lora": 128, "qlora": 64}[kind]
        lora.inject(model, "language_model", lora.LoraConfig(rank, 2 * rank, 0.0), 0)
        trained = [p.requires_grad_() for p in lora.trained(model, "none")]
        for p in trained:
            p.data = p.data.to(other.dtype)  # as peft's
        others = adapt_theirs(other, rank)
    peers = {f"{name}, as LLaVA": stepping(lambda: checkpointed(other, True)(**inputs).loss, others),
             name: stepping(lambda: checkpointed(other, False)(**inputs).loss, others)}  # where memory is enough
    head, layers = model.language_model.lm_head.weight.numel(), quant.count(model, "language_model.model.layers")
    operations = 4 * (sum(lengths) * layers + learned * len(lengths) * head) + reading_pictures(model, len(lengths))
    with torch.no_grad():
        theirs = checkpointed(other, False)(**inputs).loss.float()
    return contest(smoke, stepping(lambda: model.loss(batch), trained), peers, lambda: (theirs,), operations, rounds=5,
                   head_start=0)


def stepping(loss_of, trained):
    """() -> (loss,), after a whole step"""
    optimizer = torch.optim.AdamW(trained, 0.0, weight_decay=0.0, fused=True)

    def run():
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)
    return run


def checkpointed(model, on):
    """transformers' model in training, its activations computed a second time or kept."""
    model.train()
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    return model


def adapt_theirs(model, rank):
    """Put peft's adapters into the language model's linears. -> what is trained"""
    import peft
    words = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=words)
    peft.inject_adapter_in_model(config, model.model.language_model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(model.dtype)
    return trained


def quantise_ours(model, planar=False):
    """The language model's layers as NF4; planar: laid in planes where their widths allow."""
    wanted = quant.Quantisation(4)
    for name, linear in list(model.named_modules()):
        if wanted.wants(name, linear):
            parent, _, leaf = name.rpartition(".")
            new = wanted.linear(linear.weight, linear.weight.dtype)
            if planar and linear.in_features % UNIT == 0:
                new.codes = torch.nn.Parameter(lay_in_planes(new.codes), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, new)


def quantise_theirs(model):
    """The same by bitsandbytes, where that is installed. -> what the model is to be called"""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return "transformers in 16 bits"
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in name and "language_model" in name:
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                                    compute_dtype=linear.weight.dtype, compress_statistics=True)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                           compress_statistics=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to(linear.weight.device))
    return "transformers + bitsandbytes"


def reading_pictures(model, count):
    """Operations of the tower's matrices on so many pictures."""
    layers = model.vision_tower.vision_model["encoder"].parameters()
    return 2 * count * (model.config.image_tokens + 1) * sum(p.numel() for p in layers if p.dim() == 2)


# ------------------------------------------------------------------------------------------------------------ answering


def prefill_7b(smoke):
    """A picture and 24 words are read, up to the scores of the first word of the answer."""
    return answer(smoke, 1, reading=True)


def prefill_7b_16(smoke):
    """The same, 16 at a time."""
    return answer(smoke, 16, reading=True)


def decode_7b(smoke):
    """One more word behind 640."""
    return answer(smoke, 1)


def decode_7b_16(smoke):
    """The same for 16 sequences."""
    return answer(smoke, 16)


def decode_7b_nf4(smoke):
    """One more word behind 640, the layers in NF4 with double quantisation."""
    return answer(smoke, 1, nf4=True)


def decode_7b_nf4_16(smoke):
    """The same for 16 sequences."""
    return answer(smoke, 16, nf4=True)


def decode_7b_eager(smoke):
    """decode_7b without the recorded step: each kernel is launched by Python."""
    return answer(smoke, 1, recorded=False)


def decode_7b_nf4_planar(smoke):
    """decode_7b_nf4 with the codes in planes (kernels/nf4.py): to become the default if it leads."""
    return answer(smoke, 1, nf4=True, planar=True)


@torch.no_grad()
def answer(smoke, count, reading=False, nf4=False, recorded=True, planar=False):
    """Reading or decoding on both sides. -> a row"""
    model, where = build(smoke), device(smoke)
    places, text = model.config.image_tokens, model.config.text
    length = places + 25 if reading or smoke else 640
    batch = conversations(model.config, [length] * count, 1, where)
    other, image_token = peer_of(model)
    inputs = inputs_of(batch, image_token, other.dtype)
    del inputs["labels"]
    other.eval()
    name = quantise_theirs(other) if nf4 else "transformers"
    if nf4:
        quantise_ours(model, planar)

    def read():
        cache = Cache(text, other.dtype, where, count * (length + 8))
        stretches = [cache.open(length + 8) for _ in range(count)]
        return model.last_logits(batch, cache, stretches), cache, stretches

    def read_theirs():
        out = other(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    layers = model.language_model.model.layers
    traffic = sum(p.nbytes for p in (*layers.parameters(), model.language_model.lm_head.weight))
    if reading:
        operations = 2 * count * length * quant.count(model, "language_model.model.layers")
        operations += reading_pictures(model, count)
        return contest(smoke, lambda: read()[:1], {name: lambda: read_theirs()[:1]},
                       lambda: (read_theirs()[0].float(),), operations, traffic, rounds=10, head_start=0)
    (_, cache, stretches), (_, past) = read(), read_theirs()
    word, decoder = torch.full((count,), 5, device=where), Decoder(model, cache)
    step = SimpleNamespace(input_ids=word, position_ids=torch.full_like(word, length), image_sizes=[], ids=[],
                           cu_seqlens=torch.arange(count + 1, device=where), pixel_values=batch.pixel_values[:0])

    def back(logits):
        for stretch in stretches:
            stretch.length = length
        return (logits,)

    def ours():
        return back(decoder([5] * count, stretches) if recorded else model.logits(step, cache, stretches))

    def theirs():
        logits = other(input_ids=word[:, None], past_key_values=past, use_cache=True).logits[:, -1]
        past.crop(-1)
        return (logits,)

    traffic += 2 * count * length * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    for _ in range(TRIES):  # the next one is recorded
        ours()
    return contest(smoke, ours, {name: theirs}, lambda: (theirs()[0].float(),), traffic=traffic, head_start=0)


ROWS = {row.__name__: row for row in (
    step_stage1_7b, step_lora_7b, step_qlora_7b, prefill_7b, prefill_7b_16, decode_7b, decode_7b_16, decode_7b_nf4,
    decode_7b_nf4_16, decode_7b_eager, decode_7b_nf4_planar)}
