"""The layouts of public checkpoints: how files name their tensors and write their config.json, and what we call both.

A LLaVA is three parts, and every layout is a choice of prefixes for them. We recognise part by part, so any mixture
loads; a folder is judged by the names in it, never by its own name.

| ours                        | original LLaVA                                 | llava-hf, published              |
| --------------------------- | ---------------------------------------------- | -------------------------------- |
| language_model.model.X      | model.X                                        | language_model.model.X           |
| language_model.lm_head.X    | lm_head.X                                      | language_model.lm_head.X         |
| mm_projector.0.X            | model.mm_projector.0.X                         | multi_modal_projector.linear_1.X |
| mm_projector.2.X            | model.mm_projector.2.X                         | multi_modal_projector.linear_2.X |
| image_newline               | model.image_newline                            | image_newline (llava_next)       |
| vision_tower.vision_model.X | model.vision_tower.vision_tower.vision_model.X | vision_tower.vision_model.X      |

Files saved from llava-hf models in memory have `model.language_model.X`, `lm_head.X`, `model.multi_modal_projector…`
and `model.vision_tower…` instead; transformers 5 leaves the inner `vision_model.` out. A LLaMA folder is the original
layout without projector and tower, a CLIP folder a tower with the prefix `vision_model.` or none. (LLAVA.md 6.2, 6.4)
"""

import ast
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
    (r"(?:model\.)?(mm_projector\..+|image_newline)", r"\1"),
    (r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)",
     r"vision_tower.vision_model.\1"),
]

UNUSED = {  # what files hold and no part of LLaVA needs
    "rotary_emb.inv_freq": r".*rotary_emb\.inv_freq",  # computed from the config
    "position_ids": r".*embeddings\.position_ids",  # 0, 1, 2, …
    "CLIP's text half": r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale",
}

REFUSED = {  # what no part of LLaVA is made of -> why
    r"transformer\.(?:wte|blocks|mm_projector|norm_f)\..+":
        "is an MPT model's, which is not supported; LLaMA and Mistral are",
    r".+\.(?:SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|qweight|qzeros|g_idx)":
        "is a quantised model's; load the one that it was made from",
}

WRITE = {  # our prefix -> a layout's
    "llava-hf": {
        "language_model.": "language_model.",
        "mm_projector.0.": "multi_modal_projector.linear_1.",
        "mm_projector.2.": "multi_modal_projector.linear_2.",
        "image_newline": "image_newline",
        "vision_tower.": "vision_tower.",
    },
    "llava": {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "mm_projector.": "model.mm_projector.",
        "image_newline": "model.image_newline",
        "vision_tower.": "model.vision_tower.vision_tower.",
    },
}


def our_name(name):
    """A tensor's name in a file -> its name in `Llava`, or None if no layout that we know has it.

    What PEFT wraps has its whole old name behind `base_model.model.` (LLAVA.md 6.7).
    """
    matches = ((re.fullmatch(pattern, name.removeprefix("base_model.model.")), ours) for pattern, ours in READ)
    return next((match.expand(ours) for match, ours in matches if match), None)


def unused(name):
    """What a tensor is that LLaVA does not need, in a word or two; None for all others."""
    return next((what for what, pattern in UNUSED.items() if re.fullmatch(pattern, name)), None)


def refused(name):
    """Why a file with a tensor of this name cannot be loaded at all; None for all others."""
    return next((why for pattern, why in REFUSED.items() if re.fullmatch(pattern, name)), None)


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
LLAVA_HF = ("llava", "llava_next")
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width): llava_next's default
CLIP_FAMILY = ("clip", "clip_vision_model")
VIT_L_336 = ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14)
OWN_KEYS = (  # fields of LlavaConfig that the original has by the same name, and llava-hf folders of ours, too
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type",
    "image_aspect_ratio", "mm_use_im_start_end", "tokenizer_model_max_length", "conv_mode")
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature -> llava-hf's words


def read_config(values, names, where):
    """config.json as a dict -> LlavaConfig; `vision` is None where the file does not describe the tower.

    values: the file; names: our names of the folder's tensors; where: the folder, for messages. llava-hf omits what
    equals transformers' defaults, the original what equals its own (LLAVA.md 6.3, 6.4); both are filled in.
    """
    kind = values.get("model_type")
    if kind in LLAVA_HF and "text_config" in values:
        return _read_llava_hf(values, names, where)
    if kind in CLIP_FAMILY:
        raise ValueError(f"{where} is a vision tower without a language model; give it as --vision_tower")
    if kind not in LLAMA_FAMILY and kind not in ORIGINAL:
        _unknown(where, kind, [*LLAMA_FAMILY, *ORIGINAL, "llava_next"])
    original, kind = kind in ORIGINAL, ORIGINAL.get(kind, kind)
    return LlavaConfig(
        text=LlamaConfig.from_dict({**LLAMA_FAMILY[kind], **values, "model_type": kind}),
        vision=ClipVisionConfig.from_dict(values) if "vision_config" in values else None,
        image_grid_pinpoints=read_pinpoints(values.get("image_grid_pinpoints")),
        unpad_rounded=not original,
        **_given(values))


def read_pinpoints(value):
    """The original's `image_grid_pinpoints`, a list of (width, height) or its text -> [[height, width], …] or None."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        return pairs and [[int(height), int(width)] for width, height in pairs]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"image_grid_pinpoints: expected pairs of width and height like [[336, 672], [672, 336]], not "
                         f"{value!r}") from None


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
    manner = {"image_aspect_ratio": "pad"} | _given(values) | {"mm_patch_merge_type": "flat"}  # 1.5 is trained on pad
    if values["model_type"] == "llava_next":  # which knows no other manner
        manner |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                   "image_grid_pinpoints": values.get("image_grid_pinpoints") or NEXT_PINPOINTS}
    vision = ClipVisionConfig.from_dict(vision) if vision else VIT_L_336
    return LlavaConfig(LlamaConfig.from_dict(text), vision, **manner | {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": values.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if values.get("vision_feature_select_strategy") == "full" else "patch"})


def _given(values, keys=OWN_KEYS):
    """What is there under these keys, null left out."""
    return {key: values[key] for key in keys if values.get(key) is not None}


def read_vision_config(values, where):
    """config.json of a CLIP folder (`clip` with a nested vision_config, or `clip_vision_model`) -> ClipVisionConfig."""
    if values.get("model_type") not in CLIP_FAMILY and "vision_config" not in values:
        _unknown(where, values.get("model_type"), CLIP_FAMILY)
    older = values.get("vision_config_dict") or {}  # of files from before 2023; transformers, too, lets it win
    return ClipVisionConfig.from_dict({**values.get("vision_config", values), **older})


def vision_config_of_shapes(shapes):
    """ClipVisionConfig of a tower that came without config.json; shapes: {our name: tuple}.

    Shapes do not say how many heads share the width, nor the activation: 64 numbers per head and quick_gelu are
    OpenAI's choice; 1280 wide is ViT-H, which has 80 and gelu (laion's).
    """
    of = {name.removeprefix("vision_tower.vision_model."): shape for name, shape in shapes.items()}
    width, _, _, patch = of["embeddings.patch_embedding.weight"]
    patches = of["embeddings.position_embedding.weight"][0] - 1
    huge = width == 1280
    return ClipVisionConfig(
        hidden_size=width, intermediate_size=of["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(_layers(of, "encoder.layers.")),
        num_attention_heads=width // (80 if huge else 64), image_size=round(patches**0.5) * patch, patch_size=patch,
        hidden_act="gelu" if huge else "quick_gelu")


def _unknown(where, kind, known, key=""):
    raise ValueError(f"{where}/config.json: {key}model_type {kind!r} is not known here; known are {', '.join(known)}")


# ------------------------------------------------------------------------------------------ config.json against tensors


def check_language_model(text, tensors, where):
    """ValueError for the first key of a language model's config.json that its tensors (by our names) contradict."""
    prefix = "language_model.model."
    size, layer = _sizes(tensors, prefix), "layers.0.self_attn."
    _compare(where, "", (
        ("vocab_size", text.vocab_size, size("embed_tokens.weight", 0)),
        ("hidden_size", text.hidden_size, size("embed_tokens.weight", 1)),
        ("num_hidden_layers", text.num_hidden_layers, _count(_layers(tensors, prefix + "layers."))),
        ("intermediate_size", text.intermediate_size, size("layers.0.mlp.gate_proj.weight", 0)),
        ("num_attention_heads", text.num_attention_heads, size(layer + "q_proj.weight", 0, text.head_dim)),
        ("num_key_value_heads", text.num_key_value_heads, size(layer + "k_proj.weight", 0, text.head_dim))))


def check_tower(vision, tensors, where):
    """The same for a vision tower."""
    prefix = "vision_tower.vision_model."
    size, patch = _sizes(tensors, prefix), vision.patch_size
    rows = size("embeddings.position_embedding.weight", 0)
    _compare(where, "vision tower's ", (
        ("hidden_size", vision.hidden_size, size("embeddings.class_embedding", 0)),
        ("num_hidden_layers", vision.num_hidden_layers, _count(_layers(tensors, prefix + "encoder.layers."))),
        ("intermediate_size", vision.intermediate_size, size("encoder.layers.0.mlp.fc1.weight", 0)),
        ("patch_size", patch, size("embeddings.patch_embedding.weight", 2)),
        ("image_size", vision.image_size // patch * patch, rows and round((rows - 1) ** 0.5) * patch)))


def _sizes(tensors, prefix):
    """-> function: (name behind the prefix, dimension, unit) -> the tensor's size in units; None: no such tensor."""
    return lambda name, dim, unit=1: tensors[prefix + name].shape[dim] / unit if prefix + name in tensors else None


def _layers(names, prefix):
    """The numbers of the layers that tensors of these names belong to."""
    return {int(name[len(prefix):].split(".")[0]) for name in names if name.startswith(prefix)}


def _count(numbers):
    """How many layers there are; None if some between them are not, so that their number says nothing."""
    return len(numbers) if numbers == set(range(len(numbers))) else None


def _compare(where, whose, claims):
    """claims: (key, what config.json says, what the tensors say) each."""
    for key, says, found in claims:
        if found not in (None, says):
            raise ValueError(f"{where}/config.json: the {whose}{key} is {says}, but the tensors have {found:g}; "
                             "correct the key, or copy the folder again")


# -------------------------------------------------------------------------------------------------- config.json, write


def llama_config(config, dtype):
    """config.json of a plain language model."""
    kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config.text.model_type]
    return {"architectures": [kind], **_text(config), "torch_dtype": dtype} | _given(
        vars(config), ["conv_mode", "tokenizer_model_max_length"])


def llava_config(config, tower, dtype):
    """config.json in the original's form. tower: name or path of the CLIP folder; vision_config is our addition."""
    values = {**llama_config(config, dtype), **_multimodal(config, tower)}
    kind, anyres = config.text.model_type, config.image_aspect_ratio == "anyres"
    return values | {"model_type": f"llava_{kind}", "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
                     "image_grid_pinpoints": [canvas[::-1] for canvas in config.pinpoints] if anyres else None,
                     "vision_config": _vision(config)}


def llava_hf_lacks(config):
    """What llava-hf's two kinds (llava; llava_next for anyres) cannot express of a model, in words; None: nothing."""
    if config.mm_projector_type != "mlp2x_gelu":
        return f"a projector of type {config.mm_projector_type}, only for mlp2x_gelu"
    if (config.image_aspect_ratio == "anyres") != (config.mm_patch_merge_type == "spatial_unpad"):
        return f"{config.image_aspect_ratio} pictures merged {config.mm_patch_merge_type}"
    return None


def llava_hf_config(config, tower, dtype, image_token_index, rows):
    """config.json in llava-hf's published form, with the original's keys beside it, which transformers lets stand.

    anyres makes it a llava_next, whose image_grid_pinpoints are (height, width), not (width, height) as the original's.
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
    if config.image_aspect_ratio == "anyres":
        values |= {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"],
                   "image_grid_pinpoints": config.pinpoints}
    unpadded = {} if rows == config.text.vocab_size else {"unpadded_vocab_size": config.text.vocab_size}
    return values | _multimodal(config, tower) | unpadded


def _multimodal(config, tower):
    """The original's own keys (LLAVA.md 6.3)."""
    return {"mm_vision_tower": tower, "mm_hidden_size": config.vision.hidden_size, "use_mm_proj": True,
            "mm_use_im_patch_token": False} | _given(vars(config))


def _text(config):
    silent = {"sliding_window": None} if config.text.model_type == "mistral" else {}  # without the key it would be 4096
    return config.text.to_dict() | silent


def _vision(config):
    return {"model_type": "clip_vision_model", **asdict(config.vision)}
