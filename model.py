"""The model: a LLaMA that reads words and picture features in one sequence (Liu et al. 2023).

`Llama` is the language model, layer for layer as its checkpoint: RMSNorm, rotary positions, grouped-query attention,
SwiGLU. `Llava` joins it to a frozen CLIP tower through a projector: a picture's features take the places that the text
keeps for it, and from there on they are tokens like any other.

Batches are packed: sequences lie end to end without padding, and attention never crosses from one to the next. While
answers are written, `Cache` keeps the keys and values of all rows read so far, so that only new ones need be: a pool of
cells, one for each row, in which every sequence owns a stretch. New rows are written behind it, and look at it alone.

Legend: B sequences, T rows (tokens) of all of them together, P pictures, N tokens of a view (a picture is one view or,
with `anyres`, several), D width, H heads, K head dim, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vision
from kernels.attention import Packing, attend_to_cache, attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.elementwise import add_rms_norm, rms_norm, rotate, rotate_into, swiglu
from kernels.linear import together
from projector import build_projector
from vision import NEWLINE, ClipVision, ClipVisionConfig

IGNORE_INDEX = -100  # a label that is not learned
IMAGE_TOKEN_INDEX = -200  # an input id that is not a word but one place of a picture


# ------------------------------------------------------------------------------------------------------------- config


@dataclass
class LlamaConfig:
    """The numbers of a LLaMA-family language model, named as in its config.json; defaults are HF's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # None: as many as heads
    head_dim: int = None  # None: hidden_size / heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # {"rope_type": "linear" | "llama3", "factor": …}
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2  # or a list of ids, any of which ends an answer
    pad_token_id: int = None
    model_type: str = "llama"

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values):
        """Read config.json of LLaMA 1-3, Vicuna, Mistral, TinyLlama, SmolLM2 …, as transformers 4 or 5 writes it."""
        known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        rope = values.get("rope_parameters") or {}  # transformers 5: theta and scaling in one dict
        if rope:
            known["rope_theta"] = rope.get("rope_theta", cls.rope_theta)
            known["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if not 0 <= known.get("pad_token_id", -1) < known.get("vocab_size", cls.vocab_size):
            known["pad_token_id"] = None  # old configs hold -1, llava-hf's an id of a row that is never trained
        config = cls(**known)
        config.rope_scaling = _known_rope_scaling(config.rope_scaling)
        for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if values.get(key, wanted) != wanted:
                raise ValueError(f"config.json: {key} = {values[key]!r} is not supported; LLaMA has {wanted!r}")
        if (values.get("sliding_window") or math.inf) < config.max_position_embeddings:
            raise ValueError(f"config.json: a sliding window of {values['sliding_window']} tokens is not supported")
        return config

    def to_dict(self):
        """The fields under their published names (transformers 4's, which 5 reads too)."""
        return {key: value for key, value in asdict(self).items() if key != "head_dim" or self.has_own_head_dim}

    @property
    def has_own_head_dim(self):
        return self.head_dim * self.num_attention_heads != self.hidden_size

    @property
    def eos_token_ids(self):
        """The ids that end an answer, as a set."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return {i for i in ids if i is not None}


def _known_rope_scaling(scaling):
    """None, or a dict whose rope_type is one of those that `rotary_table` knows."""
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; linear and llama3 are")
    return {**scaling, "rope_type": kind}


@dataclass
class LlavaConfig:
    """A language model, a tower, and what joins them; names are the original's. vision None: a plain language model."""

    text: LlamaConfig = field(default_factory=LlamaConfig)
    vision: ClipVisionConfig = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"  # drops the class token; cls_patch keeps it
    image_aspect_ratio: str = "square"  # or pad, or anyres: vision.ImageProcessor.views
    image_grid_pinpoints: list = None  # anyres's canvases (height, width); None: LLaVA 1.6's
    mm_patch_merge_type: str = "flat"  # anyres's order: vision.reading_order
    unpad_rounded: bool = True  # cut the padding off as llava-hf does; False: as the original (vision.unpad)
    mm_use_im_start_end: bool = False
    tokenizer_model_max_length: int = None
    conv_mode: str = None  # the conversation template (formats/templates.py)

    @property
    def image_tokens(self):
        """N: the features of one view; 0 without a tower."""
        if self.vision is None:
            return 0
        return self.vision.num_patches + (self.mm_vision_select_feature == "cls_patch")

    @property
    def pinpoints(self):
        """The canvases (height, width) that anyres chooses from."""
        return vision.canvases(self.image_grid_pinpoints, self.vision.image_size)

    def tiles_of(self, size):
        """(rows, columns) of the tiles of a picture of (height, width); (0, 0) where its one view is all."""
        if self.vision is None or self.image_aspect_ratio != "anyres":
            return 0, 0
        return tuple(length // self.vision.image_size for length in vision.best_resolution(size, self.pinpoints))

    def views_of(self, size):
        """How many views of a picture of (height, width) the tower is shown."""
        return 1 + math.prod(self.tiles_of(size))

    def reading_order(self, size):
        """The features of a picture of (height, width) in the order in which they are read, (places,) int64."""
        return vision.reading_order(
            size, self.tiles_of(size), self.image_tokens, self.mm_patch_merge_type, self.unpad_rounded)

    def tokens_of(self, size):
        """The places that a picture of (height, width) takes in a sequence; 0 without a tower."""
        return len(self.reading_order(size))


# ----------------------------------------------------------------------------------------------------- language model


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary_table(config, position_ids):
    """cos and sin (T, 1, K) float32 of the angles by which positions turn queries and keys (Su et al. 2021).

    Pair i of a head turns by position * theta^(-2i/K). For longer contexts `linear` slows all pairs down by a factor;
    `llama3` only those that would not complete a turn within the original context, with a ramp between (LLaMA 3.1).
    """
    pairs = torch.arange(0, config.head_dim, 2, device=position_ids.device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**pairs  # (K/2,)
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down, 1: as it was
        frequency = (1 - keep) * frequency / scaling["factor"] + keep * frequency
    angles = position_ids.float()[:, None] * frequency
    angles = torch.cat([angles, angles], -1)[:, None]  # (T, 1, K): HF's layout pairs dimension i with i + K/2
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention in which a group of query heads shares one key/value head (Ainslie et al. 2023)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x, rotary, packing, cache=None):
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in together(x, self.q_proj, self.k_proj, self.v_proj))
        if cache is not None and not cache.fresh:
            return self.o_proj(cache.attend(self.layer, q, k, v, rotary).flatten(1))
        q, k = rotate(q, k, *rotary)  # (T, H, K), (T, H/G, K)
        if cache is not None:
            cache.write(self.layer, k, v)
        return self.o_proj(attention(q, k, v, packing, causal=True).flatten(1))  # (T, D)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(*together(x, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, packing, cache=None):
        attended, norm = self.self_attn(self.input_layernorm(x), rotary, packing, cache), self.post_attention_layernorm
        x, normed = add_rms_norm(x, attended, norm.weight, norm.eps)
        return x + self.mlp(normed)


class LlamaModel(nn.Module):
    """Embeddings in, hidden states out; the part of a checkpoint under `model.`"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # True: keep each layer's input only, compute the rest again in backward

    def forward(self, x, position_ids, packing, cache=None):
        """x (T, D), position_ids (T,) -> (T, D) after the final norm."""
        rotary = tuple(table.to(x.dtype) for table in rotary_table(self.config, position_ids))
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, packing, use_reentrant=False)
            else:
                x = layer(x, rotary, packing, cache)
        return self.norm(x)


class Llama(nn.Module):
    """The whole language model: `model` and the head that turns hidden states into word scores."""

    def __init__(self, config):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Stretch:
    """The cells of one sequence in a Cache: `size` of them from `start` on; the first `length` hold what it has read.
    (No dataclass: FSDP copies those when a method gets one, and the lengths would grow in the copies.)"""

    def __init__(self, start, size):
        self.start, self.size, self.length = start, size, 0


class Cache:
    """Keys and values of the rows that sequences have read, per layer one pool of cells, (cells, H/G, K), one per row.

    Each sequence owns a stretch of neighbouring cells; sequences of any lengths lie side by side, without padding. One
    that outgrows its stretch moves to one of twice the size; if the pool has no gap for that, it doubles. config: a
    LlamaConfig; device: of all layers, or a list with one of each; cells: of the pools, to begin with.
    """

    def __init__(self, config, dtype, device, cells=0):
        devices = device if isinstance(device, list) else [device] * config.num_hidden_layers
        shape = cells, config.num_key_value_heads, config.head_dim
        self.keys, self.values = ([torch.empty(shape, dtype=dtype, device=device) for device in devices]
                                  for _ in range(2))
        self.stretches = []

    def open(self, cells):
        """So many cells for a new sequence -> Stretch"""
        self.stretches.append(Stretch(self._gap(cells), cells))
        return self.stretches[-1]

    def close(self, stretch):
        """Forget a sequence."""
        self.stretches = [other for other in self.stretches if other is not stretch]

    def copy(self, stretch):
        """A second sequence that has read the same -> Stretch"""
        twin = self.open(stretch.size)
        self._carry(stretch, twin.start)
        twin.length = stretch.length
        return twin

    def _gap(self, cells):
        """Where the first gap of so many cells begins. If there is none, stretches move together, or the pool grows."""
        begin, size, stretches = 0, len(self.keys[0]), sorted(self.stretches, key=lambda stretch: stretch.start)
        for other in stretches:
            if other.start - begin >= cells:
                return begin
            begin = other.start + other.size
        if begin + cells > size >= sum(other.size for other in stretches) + cells:
            begin = 0
            for other in stretches:
                self._carry(other, begin)
                other.start, begin = begin, begin + other.size
        if begin + cells > size:
            more = max(begin + cells, 2 * size) - size
            for pool in (self.keys, self.values):
                for layer, x in enumerate(pool):
                    pool[layer] = torch.cat([x, x.new_empty(more, *x.shape[1:])])
        return begin

    def _carry(self, stretch, start):
        """Copy what a stretch holds to the cells from `start` on."""
        for x in (*self.keys, *self.values):
            x[start: start + stretch.length] = x[stretch.start: stretch.start + stretch.length].clone()

    def fit(self, stretch, length):
        """Give a stretch room for `length` cells in all."""
        if length > stretch.size:
            size = max(length, 2 * stretch.size)
            start = self._gap(size)
            self._carry(stretch, start)
            stretch.start, stretch.size = start, size

    def begin(self, packing, stretches):
        """Announce the rows that every layer will write next: sequence i of the packing continues stretches[i]."""
        for stretch, count in zip(stretches, packing.lengths, strict=True):
            self.fit(stretch, stretch.length + count)
        behind = torch.tensor([[s.start, s.length] for s in stretches], device=packing.cu_seqlens.device)
        starts, past = behind[packing.sequence].unbind(1)  # (T,) both
        lengths = past + packing.position + 1  # how many cells each new row may look at
        fresh = not any(s.length for s in stretches)  # then nothing needs to be read from here
        for stretch, count in zip(stretches, packing.lengths):
            stretch.length += count
        self.announce(starts, lengths, starts + lengths - 1, max(s.length for s in stretches), fresh)

    def announce(self, starts, lengths, cells, longest, fresh=False):
        """The rows that every layer will write next, numbers of cells (T,): where each row's sequence starts, how many
        it may look at from there, its own included, and its own. longest: at least the largest of the lengths; fresh:
        every row's sequence begins in this batch, so attention needs nothing of what is kept here."""
        self.tables = {device: tuple(x.to(device) for x in (starts, lengths, cells))
                       for device in {x.device for x in self.keys}}
        self.longest, self.fresh = longest, fresh

    def write(self, layer, k, v):
        """k, v (T, H/G, K) of the rows announced."""
        *_, cells = self.tables[k.device]
        self.keys[layer][cells], self.values[layer][cells] = k, v

    def attend(self, layer, q, k, v, rotary):
        """Turn the announced rows by their positions, keep their k and v, and let each look at its sequence so far.
        q (T, H, K), k, v (T, H/G, K) -> (T, H, K)"""
        (starts, lengths, cells), keys, values = self.tables[q.device], self.keys[layer], self.values[layer]
        q = rotate_into(q, k, v, *rotary, keys, values, cells)
        return attend_to_cache(q, keys, values, starts, lengths, self.longest)


# -------------------------------------------------------------------------------------------------------------- LLaVA


class Llava(nn.Module):
    """Tower, projector and language model. Without `config.vision` only the last: a blind LLaVA is a text model.

    A batch is any object with input_ids (T,), labels (T,), position_ids (T,), cu_seqlens (B+1,), image_sizes, a list of
    P (height, width), and pixel_values (views, 3, S, S), the views of one picture after those of another, or in their
    place what the tower has said of them (training/features.py), (views, N, width of the tower). Each picture
    owns config.tokens_of(size) consecutive places of input_ids, marked IMAGE_TOKEN_INDEX.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = self.mm_projector = self.image_newline = None
        if config.vision is not None:
            depth = vision.selected_depth(config.vision.num_hidden_layers, config.mm_vision_select_layer)
            self.vision_tower = ClipVision(config.vision, depth)
            self.mm_projector = build_projector(
                config.mm_projector_type, config.vision.hidden_size, config.text.hidden_size)
            vision.check_views(config.image_aspect_ratio, config.mm_patch_merge_type, config.mm_vision_select_feature)
            if config.mm_patch_merge_type == "spatial_unpad":
                newline = nn.Parameter(torch.empty(config.text.hidden_size))
                self.image_newline = nn.init.normal_(newline, std=config.text.hidden_size**-0.5)
        self.language_model = Llama(config.text)

    def tower_features(self, pixel_values):
        """(views, 3, S, S) -> (views, N, width of the tower): what the tower says of them."""
        frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = self.vision_tower(pixel_values)
        return x[:, 1:] if self.config.mm_vision_select_feature == "patch" else x

    def view_features(self, pixel_values):
        """Pixels, or what the tower has said of them -> (views, N, D): what the language model can read of them."""
        x = pixel_values if pixel_values.dim() == 3 else self.tower_features(pixel_values)
        return self.mm_projector(x.to(self.language_model.model.embed_tokens.weight.dtype))

    def arrange(self, features, image_sizes):
        """Features of the views of P pictures (views * N, D) -> (places, D), each picture's in its reading order."""
        orders, begin = [], 0
        for size in image_sizes:
            order = self.config.reading_order(size)
            orders.append(torch.where(order == NEWLINE, len(features), order + begin))
            begin += self.config.views_of(size) * self.config.image_tokens
        assert begin == len(features), (begin, len(features))
        if self.image_newline is not None:
            features = torch.cat([features, self.image_newline[None].to(features.dtype)])
        return F.embedding(torch.cat(orders).to(features.device), features)

    def embed(self, batch):
        """Words are looked up, places of pictures filled with features. -> (T, D)"""
        slots = batch.input_ids == IMAGE_TOKEN_INDEX
        x = self.language_model.model.embed_tokens(batch.input_ids.masked_fill(slots, 0))
        if self.vision_tower is None:
            if slots.any():
                raise ValueError("this model has no vision tower and cannot look at pictures; load one that has")
            return x
        if len(batch.pixel_values):
            features = self.view_features(batch.pixel_values).flatten(0, 1)  # (views * N, D)
            if self.config.mm_patch_merge_type != "flat":
                features = self.arrange(features, batch.image_sizes)
            assert len(features) == int(slots.sum()), (len(features), int(slots.sum()), batch.ids)
            return x.masked_scatter(slots[:, None], features.to(x.dtype))
        if torch.is_grad_enabled():  # every rank must run the same modules, so a batch without pictures sees a grey one
            side = self.config.vision.image_size
            seen = self.view_features(x.new_zeros(1, 3, side, side)).sum()
            x = x + 0 * (seen if self.image_newline is None else seen + self.image_newline.sum())
        return x

    def hidden(self, batch, cache=None, stretches=None):
        """-> (T, D) after the final norm. With a cache, sequence i of the batch continues stretches[i]."""
        packing = Packing(batch.cu_seqlens)
        if cache is not None:
            cache.begin(packing, stretches)
        return self.language_model.model(self.embed(batch), batch.position_ids, packing, cache)

    def logits(self, batch, cache=None, stretches=None):
        """Scores of every next word, (T, V) float32."""
        return self.language_model.lm_head(self.hidden(batch, cache, stretches)).float()

    def last_logits(self, batch, cache=None, stretches=None):
        """Scores after the last row of each sequence, (B, V) float32: all that generation needs of a prompt."""
        last = self.hidden(batch, cache, stretches)[batch.cu_seqlens[1:].long() - 1]
        return self.language_model.lm_head(last).float()

    def loss(self, batch):
        """Mean cross-entropy over the learned tokens of the batch, a float32 scalar; NaN if there are none.

        Row t predicts token t+1, and most rows predict a token that is not learned: pictures, questions. Only the
        others reach lm_head, which costs 1.3x less time in stage 1 and a fraction of the memory.
        """
        rows = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        hidden = self.hidden(batch).index_select(0, rows - 1)
        return linear_cross_entropy(hidden, self.language_model.lm_head.weight, batch.labels[rows])
