"""The layouts of public checkpoints: how files name their tensors and write their config.json, and what we call both.

A LLaVA is three parts, and every layout is a choice of prefixes for them (PREFIXES below). We recognise part by part,
so any mixture loads; a folder is judged by the names in it, never by its own name.

Files saved from llava-hf models in memory have `model.language_model.X`, `lm_head.X`, `model.multi_modal_projector…`
and `model.vision_tower…` instead; transformers 5 leaves the inner `vision_model.` out. A LLaMA folder is the original
layout without projector and tower, a CLIP folder a tower with the prefix `vision_model.` or none. (LLAVA.md 6.2, 6.4)
"""

import ast
import re
from dataclasses import asdict, fields

from model import LlamaConfig, LlavaConfig
from vision import ClipVisionConfig

# ------------------------------------------------------------------------------------------------------- tensor names

PREFIXES = [  # ours, the original LLaVA's, llava-hf's as it is published
    ("language_model.model.", "model.", "language_model.model."),
    ("language_model.lm_head.", "lm_head.", "language_model.lm_head."),
    ("mm_projector.0.", "model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("mm_projector.2.", "model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("mm_projector.", "model.mm_projector.", None),
    ("image_newline", "model.image_newline", "image_newline"),
    ("vision_tower.", "model.vision_tower.vision_tower.", "vision_tower."),
]
WRITE = {"llava": {ours: llava for ours, llava, _ in PREFIXES}, "llava-hf": {ours: hf for ours, _, hf in PREFIXES}}

READ = [  # a file's name -> ours; matched whole, the first pattern that fits
    (r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
    (r"(?:language_model\.)?(lm_head\..+)", r"language_model.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"mm_projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"mm_projector.2.\1"),
    (r"(?:model\.){0,2}(mm_projector\..+|image_newline)", r"\1"),
    (r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
     r"vision_tower.vision_model.\1"),
]

UNUSED = {  # what files hold and no part of LLaVA needs
    "rotary_emb.inv_freq": r".*rotary_emb\.inv_freq",  # computed from the config
    "position_ids": r".*embeddings\.position_ids",  # 0, 1, 2, …
    "CLIP's text half": r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale",
}

REFUSED = {  # what no part of LLaVA is made of -> why no file with it can be loaded
    r"transformer\.(?:wte|blocks|mm_projector|norm_f)\..+":
        "is an MPT model's, which is not supported; LLaMA and Mistral are",
    r".+\.(?:SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|qweight|qzeros|g_idx)":
        "is a quantised model's; load the one that it was made from",
}


def our_name(name):
    """A tensor's name in a file, or behind PEFT's `base_model.model.` -> in `Llava`; None: no layout that we know."""
    matches = ((re.fullmatch(pattern, name.removeprefix("base_model.model.")), ours) for pattern, ours in READ)
    return next((match.expand(ours) for match, ours in matches if match), None)


def unused(name):
    """What a tensor is that LLaVA does not need, in a word or two; None for all others."""
    return next((what for what, pattern in UNUSED.items() if re.fullmatch(pattern, name)), None)


def file_name(name, layout):
    """The reverse of `our_name` for the layouts that we write: llava-hf, llava (which holds plain LLaMA, too)."""
    ours, theirs = next(pair for pair in WRITE[layout].items() if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def projector_type(tensors):
    """What a projector's tensors, by our names, make of it -> (mm_projector_type, width that it takes, that it gives);
    for the identity, which has none, its type alone. {'mm_projector.0.weight': (32, 24)} -> 'mlp1x_gelu', 24, 32"""
    weights = sorted((int(match[1] or 0), tensor.shape) for name, tensor in tensors.items()
                     if (match := re.fullmatch(r"mm_projector\.(\d*)\.?weight", name)))
    layers = [layer for layer, _ in weights]
    if layers != [*range(0, 2 * len(layers), 2)]:
        raise ValueError(f"a projector with layers {layers} is not known; mlpNx_gelu has 0, 2, 4, …")
    if not weights:
        return ("identity",)
    kind = "linear" if "mm_projector.weight" in tensors else f"mlp{len(layers)}x_gelu"
    return kind, weights[0][1][1], weights[-1][1][0]


# --------------------------------------------------------------------------------------------------- config.json, read

LLAMA_FAMILY = {  # model_type -> what its config class assumes where a file is silent and LlamaConfig would differ
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096},
}
ORIGINAL = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width): llava_next's default
CLIP_FAMILY = ("clip", "clip_vision_model")
VIT_L_336 = ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14)
OWN_KEYS = (  # fields of LlavaConfig that the original has by the same name, and llava-hf folders of ours, too
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type",
    "image_aspect_ratio", "mm_use_im_start_end", "tokenizer_model_max_length", "conv_mode")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature -> llava-hf's words

NUMBERS = {field.name: field.type for config in (LlamaConfig, ClipVisionConfig) for field in fields(config)
           if field.type in (int, float) and field.name not in TOKEN_IDS}


def check_numbers(values, where, part=""):
    """ValueError for a number in config.json, or in its text_config or vision_config, that cannot be one."""
    for key, value in values.items():
        if key in ("text_config", "vision_config") and isinstance(value, dict):
            check_numbers(value, where, f"{key}.")
        if key in NUMBERS and value is not None and not (isinstance(value, NUMBERS[key] | int) and value > 0):
            raise ValueError(f"{where}/config.json: {part}{key} is {value!r}; expected a number above 0"
                             + ", a whole one" * (NUMBERS[key] is int))


def read_config(values, names, where):
    """config.json -> LlavaConfig; `vision` is None where it does not tell. names: our names of the folder's tensors.
    llava-hf omits transformers' defaults, the original its own (LLAVA.md 6.3, 6.4); both are filled in."""
    kind = values.get("model_type")
    check_numbers(values, where)
    if kind == "llava_next" or kind == "llava" and "text_config" in values:
        return _read_llava_hf(values, names, where)
    if kind in CLIP_FAMILY:
        raise ValueError(f"{where} is a vision tower without a language model; give it as --vision_tower")
    _check_kind(where, "model_type", kind, [*LLAMA_FAMILY, *ORIGINAL, "llava_next"])
    text = ORIGINAL.get(kind, kind)
    return LlavaConfig(
        LlamaConfig.from_dict({**LLAMA_FAMILY[text], **values, "model_type": text}),
        ClipVisionConfig.from_dict(values) if "vision_config" in values else None,
        image_grid_pinpoints=read_pinpoints(values.get("image_grid_pinpoints")), unpad_rounded=kind not in ORIGINAL,
        **given(values))


def read_pinpoints(value):
    """The original's `image_grid_pinpoints`, a list of (width, height) or its text -> [[height, width], …] or None."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return pairs and [[int(height), int(width)] for width, height in pairs]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"image_grid_pinpoints: expected pairs of width and height like [[336, 672], [672, 336]], not "
                         f"{value!r}") from None


def _read_llava_hf(values, names, where):
    text, vision = values.get("text_config") or {}, values.get("vision_config") or {}
    kind = text.get("model_type", "llama")
    _check_kind(where, "text_config.model_type", kind, LLAMA_FAMILY)
    _check_kind(where, "vision_config.model_type", vision.get("model_type", CLIP_FAMILY[1]), CLIP_FAMILY)
    for key, wanted in {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{where}/config.json: {key} is {values[key]!r}; LLaVA's projector has {wanted!r}")
    # Files of transformers 4 may say `tie_word_embeddings` at the top without meaning it: a head in the file wins.
    tied = text.get("tie_word_embeddings") or (
        values.get("tie_word_embeddings") and "language_model.lm_head.weight" not in names)
    text = {**LLAMA_FAMILY[kind], **text, "tie_word_embeddings": bool(tied)}
    text["vocab_size"] = values.get("unpadded_vocab_size", text.get("vocab_size"))  # what we wrote without its padding
    manner = {"image_aspect_ratio": "pad"} | given(values) | {"mm_patch_merge_type": "flat"}  # 1.5 is trained on pad
    if values["model_type"] == "llava_next":  # which knows no other manner
        manner |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                   "image_grid_pinpoints": values.get("image_grid_pinpoints") or NEXT_PINPOINTS}
    vision = ClipVisionConfig.from_dict(vision) if vision else VIT_L_336
    return LlavaConfig(LlamaConfig.from_dict(text), vision, **manner | {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": values.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if values.get("vision_feature_select_strategy") == "full" else "patch"})


def given(values, keys=OWN_KEYS):
    """What is there under these keys, null left out."""
    return {key: values[key] for key in keys if values.get(key) is not None}


def read_vision_config(values, where):
    """config.json of a CLIP folder (`clip` with a nested vision_config, or `clip_vision_model`) -> ClipVisionConfig."""
    check_numbers(values, where)
    if "vision_config" not in values:
        _check_kind(where, "model_type", values.get("model_type"), CLIP_FAMILY)
    older = values.get("vision_config_dict") or {}  # of files from before 2023; transformers, too, lets it win
    return ClipVisionConfig.from_dict({**values.get("vision_config", values), **older})


def vision_config_of_shapes(shapes):
    """ClipVisionConfig of a tower without config.json; shapes: {our name: tuple}, which tell neither heads nor
    activation: 64 numbers per head and quick_gelu are OpenAI's choice; 1280 wide is laion's ViT-H, 80 and gelu."""
    found = _sizes("vision_tower", shapes)
    width = found.get("hidden_size", ClipVisionConfig.hidden_size)  # without it loading says what is missing
    head, act = (80, "gelu") if width == 1280 else (64, "quick_gelu")
    return ClipVisionConfig(**found, num_attention_heads=width // head, hidden_act=act)


def _check_kind(where, key, kind, known):
    if kind not in known:
        raise ValueError(f"{where}/config.json: {key} {kind!r} is not known here; known are {', '.join(known)}")


# ------------------------------------------------------------------------------------------ config.json against tensors

SIZES = {  # part -> its prefix; a key of its config.json -> the tensor that shows it, and in which dimension
    "language_model": ("language_model.model.", {
        "vocab_size": ("embed_tokens.weight", 0), "hidden_size": ("embed_tokens.weight", 1),
        "intermediate_size": ("layers.0.mlp.gate_proj.weight", 0),
        "num_attention_heads": ("layers.0.self_attn.q_proj.weight", 0),
        "num_key_value_heads": ("layers.0.self_attn.k_proj.weight", 0)}),
    "vision_tower": ("vision_tower.vision_model.", {
        "hidden_size": ("embeddings.position_embedding.weight", 1),
        "places": ("embeddings.position_embedding.weight", 0), "patch_size": ("embeddings.patch_embedding.weight", 2),
        "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0)}),
}


def _sizes(part, shapes, head_dim=1):
    """What the shapes of a part's tensors, {our name: shape}, say of its config -> {key: number}, as far as they do."""
    prefix, keys = SIZES[part]
    found = {key: shapes[prefix + name][dim] for key, (name, dim) in keys.items() if prefix + name in shapes}
    for key in found.keys() & {"num_attention_heads", "num_key_value_heads"}:
        found[key] /= head_dim
    places = found.pop("places", None)  # a class token and the patches of a square
    if places and "patch_size" in found:
        found["image_size"] = round((places - 1) ** 0.5) * found["patch_size"]
    layers = {int(number) for name in shapes for number in re.findall(rf"{prefix}(?:encoder\.)?layers\.(\d+)", name)}
    return found | ({"num_hidden_layers": len(layers)} if layers == {*range(len(layers))} else {})


def check_config(part, config, tensors, where):
    """ValueError for the first key of a part's config.json that its tensors (by our names) contradict."""
    found = _sizes(part, {name: tensor.shape for name, tensor in tensors.items()}, getattr(config, "head_dim", 1))
    for key, number in found.items():
        says, whose = getattr(config, key), "vision tower's " if part == "vision_tower" else ""
        if number != (says - says % config.patch_size if key == "image_size" else says):
            raise ValueError(f"{where}/config.json: the {whose}{key} is {says}, but the tensors have {number:g}; "
                             "correct the key, or copy the folder again")


# -------------------------------------------------------------------------------------------------- config.json, write


def llama_config(config, dtype):
    """config.json of a plain language model."""
    return {"architectures": [f"{config.text.model_type.capitalize()}ForCausalLM"], **_text(config),
            "torch_dtype": dtype, **given(vars(config), ["conv_mode", "tokenizer_model_max_length"])}


def llava_config(config, tower, dtype):
    """config.json in the original's form. tower: name or path of the CLIP folder; vision_config is our addition."""
    kind, anyres = config.text.model_type, config.image_aspect_ratio == "anyres"
    return llama_config(config, dtype) | _multimodal(config, tower) | {
        "model_type": f"llava_{kind}", "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "image_grid_pinpoints": [canvas[::-1] for canvas in config.pinpoints] if anyres else None}


def llava_hf_lacks(config):
    """What llava-hf's two kinds (llava; llava_next for anyres) cannot express of a model, in words; None: nothing."""
    if config.mm_projector_type != "mlp2x_gelu":
        return f"a projector of type {config.mm_projector_type}, only for mlp2x_gelu"
    if (config.image_aspect_ratio == "anyres") != (config.mm_patch_merge_type == "spatial_unpad"):
        return f"{config.image_aspect_ratio} pictures merged {config.mm_patch_merge_type}"
    return None


def llava_hf_config(config, tower, dtype, image_token_index, rows):
    """config.json as llava-hf has it, with the original's keys beside it; anyres makes it a llava_next, whose pinpoints
    are (height, width). rows: of the embeddings in the file, more than the vocabulary where `<image>` needed room."""
    values = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": dtype,
        "text_config": _text(config) | {"vocab_size": rows},
        "image_token_index": image_token_index, "image_seq_length": config.image_tokens,
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": STRATEGIES[config.mm_vision_select_feature],
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        **{key: getattr(config.text, key) for key in ("tie_word_embeddings", *TOKEN_IDS)},
    }
    if config.image_aspect_ratio == "anyres":
        values |= {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"],
                   "image_grid_pinpoints": config.pinpoints}
    if rows != config.text.vocab_size:
        values["unpadded_vocab_size"] = config.text.vocab_size
    return values | _multimodal(config, tower)


def _multimodal(config, tower):
    """The original's own keys (LLAVA.md 6.3), and the tower's as llava-hf has them."""
    return {"mm_vision_tower": tower, "mm_hidden_size": config.vision.hidden_size, "use_mm_proj": True,
            "mm_use_im_patch_token": False, "vision_config": {"model_type": CLIP_FAMILY[1], **asdict(config.vision)},
            **given(vars(config))}


def _text(config):
    silent = {"sliding_window": None} if config.text.model_type == "mistral" else {}  # without the key it would be 4096
    return config.text.to_dict() | silent
