"""The layouts of public checkpoints: how files name their tensors and write their config.json, and what we call both.

A LLaVA is three parts, and every layout is a choice of prefixes for them. We recognise part by part, so any mixture
loads; a folder is judged by the names in it, never by its own name.

| ours                        | original LLaVA                                 | llava-hf, published              |
| --------------------------- | ---------------------------------------------- | -------------------------------- |
| language_model.model.X      | model.X                                        | language_model.model.X           |
| language_model.lm_head.X    | lm_head.X                                      | language_model.lm_head.X         |
| mm_projector.0.X            | model.mm_projector.0.X                         | multi_modal_projector.linear_1.X |
| mm_projector.2.X            | model.mm_projector.2.X                         | multi_modal_projector.linear_2.X |
| vision_tower.vision_model.X | model.vision_tower.vision_tower.vision_model.X | vision_tower.vision_model.X      |

Files saved from llava-hf models in memory have `model.language_model.X`, `lm_head.X`, `model.multi_modal_projector…`
and `model.vision_tower…` instead; transformers 5 leaves the inner `vision_model.` out. A LLaMA folder is the original
layout without projector and tower, a CLIP folder a tower with the prefix `vision_model.` or none. (LLAVA.md 6.2, 6.4)
"""

import re
from dataclasses import asdict

from model import LlamaConfig, LlavaConfig
from vision import ClipVisionConfig

# ------------------------------------------------------------------------------------------------------- tensor names

READ = [  # a file's name -> ours; matched whole, the first pattern that fits
    (r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
    (r"(?:language_model\.)?(lm_head\..+)", r"language_model.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"mm_projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"mm_projector.2.\1"),
    (r"(?:model\.)?(mm_projector\..+)", r"\1"),
    (r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
     r"vision_tower.vision_model.\1"),
]

UNUSED = {  # what files hold and no part of LLaVA needs
    "rotary_emb.inv_freq": r".*rotary_emb\.inv_freq",  # computed from the config
    "position_ids": r".*embeddings\.position_ids",  # 0, 1, 2, …
    "CLIP's text half": r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale",
}

WRITE = {  # our prefix -> a layout's
    "llava-hf": {
        "language_model.": "language_model.",
        "mm_projector.0.": "multi_modal_projector.linear_1.",
        "mm_projector.2.": "multi_modal_projector.linear_2.",
        "vision_tower.": "vision_tower.",
    },
    "llava": {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "mm_projector.": "model.mm_projector.",
        "vision_tower.": "model.vision_tower.vision_tower.",
    },
}


def our_name(name):
    """A tensor's name in a file -> its name in `Llava`, or None if no layout that we know has it."""
    matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in READ)
    return next((match.expand(ours) for match, ours in matches if match), None)


def unused(name):
    """What a tensor is that LLaVA does not need, in a word or two; None for all others."""
    return next((what for what, pattern in UNUSED.items() if re.fullmatch(pattern, name)), None)


def file_name(name, layout):
    """The reverse of `our_name` for the layouts that we write: llava-hf, llava (which holds plain LLaMA, too)."""
    prefix = next(ours for ours in WRITE[layout] if name.startswith(ours))
    return WRITE[layout][prefix] + name[len(prefix):]


def projector_type(names):
    """`mm_projector_type` from our names of a projector's tensors: {'mm_projector.0.weight', …} -> 'mlp1x_gelu'."""
    if "mm_projector.weight" in names:
        return "linear"
    layers = {int(match[1]) for name in names if (match := re.fullmatch(r"mm_projector\.(\d+)\.weight", name))}
    if layers != set(range(0, 2 * len(layers), 2)):
        raise ValueError(f"a projector with layers {sorted(layers)} is not known; mlpNx_gelu has 0, 2, 4, …")
    return f"mlp{len(layers)}x_gelu" if layers else "identity"


# --------------------------------------------------------------------------------------------------- config.json, read

LLAMA_FAMILY = {  # model_type -> what its config class assumes where a file is silent and LlamaConfig would differ
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096},
}
ORIGINAL = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
CLIP_FAMILY = ("clip", "clip_vision_model")
VIT_L_336 = ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14)
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature -> llava-hf's words


def read_config(values, names, where):
    """config.json as a dict -> LlavaConfig; `vision` is None where the file does not describe the tower.

    values: the file; names: our names of the folder's tensors; where: the folder, for messages. llava-hf omits what
    equals transformers' defaults, the original what equals its own (LLAVA.md 6.3, 6.4); both are filled in.
    """
    kind = values.get("model_type")
    if kind == "llava" and "text_config" in values:
        return _read_llava_hf(values, names, where)
    if kind in CLIP_FAMILY:
        raise ValueError(f"{where} is a vision tower without a language model; give it as --vision_tower")
    if kind not in LLAMA_FAMILY and kind not in ORIGINAL:
        _unknown(where, kind, [*LLAMA_FAMILY, *ORIGINAL])
    kind = ORIGINAL.get(kind, kind)
    return LlavaConfig(
        text=LlamaConfig.from_dict({**LLAMA_FAMILY[kind], **values, "model_type": kind}),
        vision=ClipVisionConfig.from_dict(values) if "vision_config" in values else None,
        mm_projector_type=values.get("mm_projector_type", "linear"),
        mm_vision_select_layer=values.get("mm_vision_select_layer", -2),
        mm_vision_select_feature=values.get("mm_vision_select_feature", "patch"),
        **_common(values, "square"))


def _read_llava_hf(values, names, where):
    text, vision = values["text_config"], values.get("vision_config")
    kind = text.get("model_type", "llama")
    if kind not in LLAMA_FAMILY:
        _unknown(where, kind, LLAMA_FAMILY, "text_config.")
    if vision and vision.get("model_type", "clip_vision_model") not in CLIP_FAMILY:
        _unknown(where, vision["model_type"], CLIP_FAMILY, "vision_config.")
    expected = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, wanted in expected.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{where}/config.json: {key} is {values[key]!r}; LLaVA's projector has {wanted!r}")
    # Files of transformers 4 may say `tie_word_embeddings` at the top without meaning it: a head in the file wins.
    tied = text.get("tie_word_embeddings") or (
        values.get("tie_word_embeddings") and "language_model.lm_head.weight" not in names)
    text = {**LLAMA_FAMILY[kind], **text, "tie_word_embeddings": bool(tied)}
    text["vocab_size"] = values.get("unpadded_vocab_size", text.get("vocab_size"))  # what we wrote without its padding
    return LlavaConfig(
        text=LlamaConfig.from_dict(text),
        vision=ClipVisionConfig.from_dict(vision) if vision else VIT_L_336,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=values.get("vision_feature_layer", -2),
        mm_vision_select_feature="cls_patch" if values.get("vision_feature_select_strategy") == "full" else "patch",
        **_common(values, "pad"))  # every published llava-hf 1.5 was trained on padded pictures


def _common(values, aspect):
    """Keys that the original writes, and we into llava-hf folders, too; conv_mode is ours."""
    return {
        "image_aspect_ratio": values.get("image_aspect_ratio", aspect),
        "mm_use_im_start_end": bool(values.get("mm_use_im_start_end")),
        "tokenizer_model_max_length": values.get("tokenizer_model_max_length"),
        "conv_mode": values.get("conv_mode"),
    }


def read_vision_config(values, where):
    """config.json of a CLIP folder (`clip` with a nested vision_config, or `clip_vision_model`) -> ClipVisionConfig."""
    if values.get("model_type") not in CLIP_FAMILY and "vision_config" not in values:
        _unknown(where, values.get("model_type"), CLIP_FAMILY)
    return ClipVisionConfig.from_dict(values)


def vision_config_of_shapes(shapes):
    """ClipVisionConfig of a tower that came without config.json; shapes: {our name: tuple}. CLIP's head dim is 64."""
    of = {name.removeprefix("vision_tower.vision_model."): shape for name, shape in shapes.items()}
    width, _, _, patch = of["embeddings.patch_embedding.weight"]
    patches = of["embeddings.position_embedding.weight"][0] - 1
    layers = {name.split(".")[2] for name in of if name.startswith("encoder.layers.")}
    return ClipVisionConfig(
        hidden_size=width, intermediate_size=of["encoder.layers.0.mlp.fc1.weight"][0], num_hidden_layers=len(layers),
        num_attention_heads=width // 64, image_size=round(patches**0.5) * patch, patch_size=patch)


def _unknown(where, kind, known, key=""):
    raise ValueError(f"{where}/config.json: {key}model_type {kind!r} is not known here; known are {', '.join(known)}")


# -------------------------------------------------------------------------------------------------- config.json, write


def llama_config(config, dtype):
    """config.json of a plain language model."""
    kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config.text.model_type]
    return {"architectures": [kind], **_text(config), "torch_dtype": dtype} | _given(
        conv_mode=config.conv_mode, tokenizer_model_max_length=config.tokenizer_model_max_length)


def llava_config(config, tower, dtype):
    """config.json in the original's form. tower: name or path of the CLIP folder; vision_config is our addition."""
    values = {**llama_config(config, dtype), **_multimodal(config, tower)}
    kind = config.text.model_type
    return values | {"model_type": f"llava_{kind}", "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
                     "vision_config": _vision(config)}


def llava_hf_config(config, tower, dtype, image_token_index, rows):
    """config.json in llava-hf's published form, with the original's keys beside it, which transformers lets stand.

    rows: of the embeddings in the file; more than the vocabulary has where `<image>` needed room (weights.save).
    """
    values = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": dtype,
        "text_config": _text(config) | {"vocab_size": rows},
        "vision_config": _vision(config),
        "image_token_index": image_token_index,
        "image_seq_length": config.image_tokens,
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": STRATEGIES[config.mm_vision_select_feature],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "bos_token_id": config.text.bos_token_id, "eos_token_id": config.text.eos_token_id,
        "pad_token_id": config.text.pad_token_id,
    }
    return values | _multimodal(config, tower) | _given(
        unpadded_vocab_size=config.text.vocab_size if rows != config.text.vocab_size else None)


def _multimodal(config, tower):
    """The original's own keys (LLAVA.md 6.3)."""
    return {
        "mm_vision_tower": tower, "mm_hidden_size": config.vision.hidden_size, "use_mm_proj": True,
        "mm_projector_type": config.mm_projector_type, "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_select_feature": config.mm_vision_select_feature, "mm_patch_merge_type": "flat",
        "image_aspect_ratio": config.image_aspect_ratio, "mm_use_im_start_end": config.mm_use_im_start_end,
        "mm_use_im_patch_token": False,
    } | _given(tokenizer_model_max_length=config.tokenizer_model_max_length, conv_mode=config.conv_mode)


def _text(config):
    silent = {"sliding_window": None} if config.text.model_type == "mistral" else {}  # without the key it would be 4096
    return config.text.to_dict() | silent


def _vision(config):
    return {"model_type": "clip_vision_model", **asdict(config.vision)}


def _given(**values):
    return {key: value for key, value in values.items() if value is not None}
