"""What a folder or file of weights is, before anything is loaded: `python weights.py inspect PATH`.

Tables of contents and configs are read, no weights. The last lines say what is missing to run it, since the parts of a
LLaVA are often published apart: an adapter without its model, a projector without its language model.
"""

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from formats import gguf_llama, hub, layouts, templates
from formats.checkpoint import LAYOUTS, open_checkpoint
from formats.vocabulary import EMBEDDING
from tokenizer import Tokenizer

PARTS = {"vision_tower": "vision_tower.", "mm_projector": ("mm_projector.", "image_newline"),
         "language_model": "language_model.", "adapter": "adapter."}


def inspect(path):
    """-> dict for JSON: path, layout, parts {name: tensors, parameters, bytes, dtypes, shape}, not_needed, config,
    image_tokens of a picture, conv_mode and why, missing (sentences), tensors {our name: …}; None: not known."""
    if Path(path).suffix == ".gguf":
        return inspect_gguf(path)
    checkpoint = open_checkpoint(path)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    tokenizer = find_tokenizer(folder)
    tensors = dict(checkpoint.tensors)
    if checkpoint.adapter:
        tensors |= {f"adapter.{name.removesuffix('.weight')}.{side}": tensor
                    for name, pair in checkpoint.adapter.modules.items() for side, tensor in pair.items()}
    config, vision = read_configs(checkpoint)
    rows = {name: {"shape": [*tensor.shape], "dtype": getattr(tensor, "kind", str(tensor.dtype)[6:]),
                   "bytes": getattr(tensor, "size", tensor.nbytes), "file": str(tensor.file)}
            for name, tensor in sorted(tensors.items())}
    parts = {name: summary([rows[key] for key in found])
             | {"shape": in_words(name, found, config, vision, checkpoint.adapter)}
             for name, prefixes in PARTS.items()
             if (found := {key: value for key, value in tensors.items() if key.startswith(prefixes)})}
    conv_mode, why = templates.choose_conv_mode(config, tokenizer) if config else (None, None)
    return {"path": str(checkpoint.path), "layout": checkpoint.layout, "parts": parts,
            "not_needed": Counter(checkpoint.unused),
            "config": asdict(config) if config else {"vision": asdict(vision)} if vision else {},
            "image_tokens": vision and (replace(config, vision=vision).image_tokens if config else vision.num_patches),
            "conv_mode": conv_mode, "conv_mode_why": why, "missing": missing(checkpoint, tokenizer), "tensors": rows}


def inspect_gguf(path):
    """The same for a GGUF file, whose dtypes are kinds of quantisation."""
    file, values = gguf_llama.open_gguf(path)
    config = {ours: values[theirs] for ours, theirs in gguf_llama.CONFIG.items() if theirs in values}
    rows = {tensor.name: {"shape": [int(size) for size in reversed(tensor.shape)], "dtype": tensor.tensor_type.name,
                          "bytes": int(tensor.n_bytes), "file": str(path)} for tensor in file.tensors}
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
    return {"path": str(path), "layout": "gguf", "parts": {"language_model": summary(rows.values()) | {"shape": shape}},
            "not_needed": {}, "config": config, "image_tokens": None, "conv_mode": None, "conv_mode_why": None,
            "missing": [f"another layout: python weights.py convert {path} OUT"], "tensors": rows}


def read_configs(checkpoint):
    """-> (LlavaConfig or None, ClipVisionConfig or None), the latter from the tensors where config.json is silent."""
    values, config, vision = checkpoint.config, None, None
    if values and checkpoint.layout == "clip":
        vision = layouts.read_vision_config(values, checkpoint.path)
    elif values:
        config = layouts.read_config(values, checkpoint.tensors, checkpoint.path)
        vision = config.vision
    if vision is None and (tower := checkpoint.part("vision_tower")):
        vision = layouts.vision_config_of_shapes({name: tuple(tensor.shape) for name, tensor in tower.items()})
    return config, vision


def find_tokenizer(folder):
    """The folder's Tokenizer, None if it has no tokenizer files at all."""
    names = ("tokenizer.json", "tokenizer.model")
    return Tokenizer.from_folder(folder) if any((folder / name).exists() for name in names) else None


def summary(rows):
    """How many tensors and how large."""
    return {"tensors": len(rows), "parameters": sum(math.prod(row["shape"]) for row in rows),
            "bytes": sum(row["bytes"] for row in rows), "dtypes": sorted({row["dtype"] for row in rows})}


def in_words(part, tensors, config, vision, adapter):
    """The shape of a part: its layers and widths."""
    if part == "vision_tower":
        return (f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, pictures of {vision.image_size} "
                f"pixels in patches of {vision.patch_size}")
    if part == "mm_projector":
        kind, *widths = layouts.projector_type(tensors)
        return f"{kind}, width {widths[0]} to {widths[1]}" if widths else kind
    if part == "adapter":
        return f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {len(adapter.modules)} matrices"
    rows, width = tensors[EMBEDDING].shape if EMBEDDING in tensors else (0, 0)
    if len(tensors) == 1 or config is None:
        return f"{rows} rows of embeddings of width {width}"
    text = config.text
    return (f"{text.num_hidden_layers} layers of width {width}, {text.num_attention_heads} heads "
            f"({text.num_key_value_heads} of keys and values), {rows} rows of vocabulary")


def missing(checkpoint, tokenizer):
    """What it takes to run this, a phrase each; an empty list if nothing."""
    layout, config, path = checkpoint.layout, checkpoint.config, checkpoint.path
    alone = {"delta": f"its LLaMA: python weights.py delta apply --base LLAMA --delta {path} --target OUT",
             "clip": "a language model and a projector; this folder goes with them as --vision_tower"}
    if layout in alone:
        return [alone[layout]]
    lacks = ["a tokenizer: tokenizer.json or tokenizer.model"] if tokenizer is None else []
    if layout == "lora":
        lacks = [f"the model that it was trained on, {checkpoint.adapter.base}: --model_base"]
    elif layout == "projector":
        lacks = ["its language model: --model_base"]
    if layout.startswith("llava") and not (
            checkpoint.part("mm_projector") or config.get("mm_projector_type") == "identity"):
        lacks.append("a projector: --pretrain_mm_mlp_adapter")
    named = config.get("mm_vision_tower") or config.get("vision_tower")
    if layout not in ("llama", "lora") and not checkpoint.part("vision_tower") and not (named and hub.here(named)):
        fetched = ", which loading fetches from Hugging Face" if named and hub.parse(named)[0] else ""
        lacks.append(f"its vision tower, {named}{fetched}" if named else "a vision tower: --vision_tower")
    return lacks


def describe(report, every=False):
    """inspect()'s report -> text; every: with a line for each tensor."""
    lines = [f"{report['path']}: {LAYOUTS[report['layout']]} ({report['layout']})"]
    for name, part in report["parts"].items():
        lines.append(f"  {name:15s} {part['tensors']:5d} tensors {part['parameters'] / 1e6:10,.2f} M parameters "
                     f"{part['bytes'] / 1e6:10,.1f} MB  {', '.join(part['dtypes'])}; {part['shape']}")
    for what, count in report["not_needed"].items():
        lines.append(f"  {what:15s} {count:5d} tensors, not needed")
    if every:
        lines += [f"  {name}  {tuple(tensor['shape'])} {tensor['dtype']}" for name, tensor in report["tensors"].items()]
    if report["image_tokens"]:
        lines.append(f"  {report['image_tokens']} tokens per picture")
    if report["conv_mode"]:
        lines.append(f"  template {report['conv_mode']} ({report['conv_mode_why']})")
    lines += [f"  missing to run it: {what}" for what in report["missing"]] or ["  no part is missing to run it"]
    return "\n".join(lines)
