"""Adapter folders: what a LoRA run has learned, in PEFT's layout, and which base it belongs to.

    adapter_config.json              PEFT's: rank, alpha, which modules, the base's name
    adapter_model.safetensors        lora_A (r, in) and lora_B (out, r) of each module
    non_lora_trainables.safetensors  the projector, and what else was trained as it is: a tower, biases
    config.json                      the whole model's, in the original's form, with conv_mode and the base's
                                     fingerprint; beside it the tokenizer's files

PEFT and vLLM read the first two and leave the others alone; what they call modules_to_save, vLLM does not take. Names
are those of transformers' model in memory, so that `model.load_state_dict(load_file("non_lora_trainables.safetensors"),
strict=False)` puts the rest there. Where llava-hf has no words for the projector, names and non_lora_trainables.bin are
the original's (LLAVA.md 6.7), whose folders are read as well.
"""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

import lora
from formats import files, layouts
from formats.bitsandbytes import Folded
from formats.checkpoint import LAYOUTS, open_checkpoint
from formats.command import say
from formats.vocabulary import EMBEDDING
from kernels import nf4
from quant import quantised

FINGERPRINT, CODES, QUANTISATION, BESIDE = (  # keys of config.json
    "base_fingerprint", "base_codes_fingerprint", "base_quantisation", "trained_beside")


def fingerprint(tensors, kind=None):
    """16 hex digits that tell a language model, {our name: LazyTensor}, in whatever files or layout, and in float32 as
    in bfloat16 (a float16 copy of float32 is rounded another way, and is another): a hash of the first 256 numbers, as
    bfloat16, of every tensor in its layers; of what is quantised, or taken as if it were (kind), of the codes."""
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith("language_model.model.layers.")):
        tensor = tensors[name]
        if isinstance(tensor, Folded):
            numbers = tensor.parts()[0][:128]
        elif kind and len(tensor.shape) == 2:
            numbers = nf4.encode(tensor.read()[:-(-256 // tensor.shape[1])], kind, False)[0][:128]
        else:
            numbers = tensor.read().reshape(-1)[:256].to(torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + files.as_bytes(numbers).tobytes())
    return digest.hexdigest()[:16]


def check_base(worn, found, base, force):
    """ValueError, with `force` a warning, if an adapter was trained on weights of another fingerprint than `found`."""
    if FINGERPRINT not in worn.config:
        say(f"{worn.path} has no config.json of ours, which would tell whether {base} is the base that it is for")
    elif found not in (worn.config[FINGERPRINT], worn.config.get(CODES)):
        what = (f"{worn.path} was trained on {worn.adapter.base}, and {base} has other weights, or the same rounded to "
                "float16")
        if not force:
            raise ValueError(f"{what}; give the base it was trained on, or --force to use it all the same")
        say(f"WARNING: {what}")


def open_adapter(folder):
    """-> Checkpoint with an adapter, lora.LoraConfig. ValueError: there is none, or one of a kind not known here."""
    worn = open_checkpoint(folder)
    if worn.adapter is None:
        raise ValueError(f"{folder} is no adapter; expected a folder with adapter_config.json")
    values = {key: value for key, value in worn.adapter.config.items() if value is not None}
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "target_parameters"):
        if values.get(key):
            raise ValueError(f"{folder}/adapter_config.json: {key} {values[key]!r} is not supported; plain LoRA is")
    if not values.keys() >= {"r", "lora_alpha"}:
        raise ValueError(f"{folder}/adapter_config.json: expected r and lora_alpha; copy the folder again")
    if worn.config.get(BESIDE, len(worn.tensors)) != len(worn.tensors):
        raise ValueError(f"{folder} was written with {worn.config[BESIDE]} tensors trained beside the adapter "
                         f"(non_lora_trainables) and has {len(worn.tensors)}; copy the folder again")
    known = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    try:
        return worn, lora.LoraConfig(**{"lora_dropout": 0.0} | {key: values[key] for key in known if key in values})
    except ValueError as error:
        raise ValueError(f"{folder}/adapter_config.json: {error}") from None


def on_base(name, model_base, adapter, force):
    """An adapter and the model that it goes on -> (Checkpoint of all but the language model, the language model's, the
    base's name). Either `name` is the adapter's, on model_base or the base that it names, or `adapter` is."""
    worn, _ = open_adapter(adapter or name)
    name = name if adapter else model_base or worn.adapter.base
    if name is None:
        raise ValueError(f"{worn.path} is a LoRA adapter that names no base; name it with --model_base")
    base = open_checkpoint(name)
    if base.layout in ("lora", "delta", "clip", "projector"):
        raise ValueError(f"{base.path} is {LAYOUTS[base.layout]}, which no adapter goes on; give a language model")
    check_base(worn, fingerprint(base.tensors), base.path, force)
    others = {key: tensor for key, tensor in base.tensors.items() if not key.startswith("language_model.")}
    mine = {key: tensor for key, tensor in worn.part("language_model").items()
            if tensor.shape == base.tensors[key].shape}  # if not, its last rows are <im_start> and <im_end>
    return (replace(base, config=worn.config or base.config, tensors=others | worn.tensors, unused=worn.unused),
            replace(base, tensors=base.part("language_model") | mine), str(name))


def wear(loaded, folder):
    """Put an adapter on a model, in place of one that it may wear, and nothing else. -> its Checkpoint"""
    worn, loaded.lora = open_adapter(folder)
    modules = {name.removesuffix(".weight"): pair for name, pair in worn.adapter.modules.items()
               if name not in loaded.spare}
    if behind := len(worn.adapter.modules) - len(modules):
        say(f"  not needed and left out: the adapter of tower layers behind the selected one ({behind} matrices)")
    lora.put(loaded.model, modules, loaded.lora, loaded.model.language_model.model.embed_tokens.weight.dtype)
    was, now = (values.get("bits", 16) for values in (worn.config.get(QUANTISATION, {}), quantisation(loaded.model)))
    if FINGERPRINT in worn.config and was != now:
        say(f"WARNING: {folder} was trained on a base in {was} bits, and this one is in {now}: answers differ")
    loaded.beside = worn.tensors.keys() - loaded.spare.keys()
    for name, p in loaded.model.named_parameters():
        p.requires_grad_(".lora_" in name or name in loaded.beside)
    return worn


def switch(loaded, folder, force=False):
    """Make a model that wears an adapter wear another one of the same base. ValueError: it does not fit."""
    own, before = dict(loaded.model.named_parameters()), loaded.beside
    worn = wear(loaded, folder)
    check_base(worn, loaded.fingerprint(), loaded.base, force)
    new = {name: tensor for name, tensor in worn.tensors.items() if name not in loaded.spare}
    fits = {name for name, tensor in new.items() if name in own and own[name].shape == tensor.shape}
    if wrong := Counter(name.split(".")[0] for name in (new.keys() - fits) | (before - new.keys())):
        parts = ", ".join(f"{part} ({count} tensors)" for part, count in sorted(wrong.items()))
        raise ValueError(f"{folder} does not train the parts of the adapter before it: {parts}; start with it alone")
    for name, tensor in new.items():
        own[name].data.copy_(tensor.read())
    loaded.conv_mode = worn.config.get("conv_mode", loaded.conv_mode)


def lay_out(loaded, tensors, config):
    """As weights.lay_out, of an adapter's folder: what was trained, and the projector. tensors: {our name: tensor}."""
    layout = "llava" if config.vision is None or layouts.llava_hf_lacks(config) else "llava-hf"
    learned = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    whole = ("mm_projector.", "image_newline")  # which the base may not have, nor these:
    whole += (EMBEDDING,) * config.mm_use_im_start_end
    whole += ("vision_tower.",) * any(name.startswith("vision_tower.") and ".lora_" not in name for name in learned)
    held = loaded.spare | loaded.model.state_dict() | tensors
    for name, m in quantised(loaded.model).items():  # a projector in codes is written as the numbers that they mean
        held[f"{name}.weight"] = files.LazyTensor(m.shape, m.dtype, None, partial(m.decode, m.dtype))
    named = {name_of(name, layout): tensor for name, tensor in held.items() if name in learned or
             name.startswith(whole) and ".lora_" not in name and not name.endswith((".codes", ".absmax", ".nested"))}
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    values = layouts.llava_config(config, loaded.tower, dtype) if config.vision else layouts.llama_config(config, dtype)
    values |= {"unfreeze_mm_vision_tower": True, FINGERPRINT: loaded.fingerprint(),  # the base's tower, before CLIP's
               BESIDE: sum(".lora_" not in name for name in named)}
    if seen := quantisation(loaded.model):
        values |= {QUANTISATION: seen, CODES: loaded.fingerprint(seen.get("quant_type", "int8"))}
    alpha = {"lora_alpha": int(loaded.lora.lora_alpha)} if loaded.lora.lora_alpha % 1 == 0 else {}  # as vLLM expects
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": loaded.base,
            **vars(loaded.lora), **alpha, "bias": "none", "target_modules": sorted(
                name_of(name, layout) for name in lora.adapted(loaded.model)), "inference_mode": True}
    words = loaded.tokenizer.folder_files if loaded.tokenizer else {}
    return named, words | {"adapter_config.json": peft, "config.json": values}, "PEFT's", dtype


def quantisation(model):
    """How a model is quantised, as weights.load takes it; {}: not at all."""
    for held in quantised(model).values():
        bits = {"bits": 8} if held.kind == "int8" else {"bits": 4, "quant_type": held.kind}
        return bits | {"double_quant": held.nested is not None}
    return {}


def name_of(name, layout):
    """What a tensor or a module is called in the original's model, or in memory in transformers' (from 5.6 on)."""
    module, lora_X, leaf = name.partition(".lora_")
    if lora_X:
        return f"base_model.model.{name_of(module, layout)}{lora_X}{leaf}.weight"
    published = layouts.file_name(f"{name}.", layout)[:-1]
    if layout == "llava":
        return published
    if "lm_head" in name:
        return published.removeprefix("language_model.")
    return "model." + re.sub(r"^(language_model)\.model|^(vision_tower)\.vision_model", r"\1\2", published)


def write_folder(folder, tensors, contents, _, overwrite, check):
    """As files.write_folder: the adapter and what was trained beside it in a file each, read again."""
    suffix = "bin" if any("mm_projector" in name for name in tensors) else "safetensors"  # bin: as the original
    with files.new_folder(folder, overwrite) as temporary:
        for file, new in (("adapter_model.safetensors", True), (f"non_lora_trainables.{suffix}", False)):
            if own := {name: tensor for name, tensor in tensors.items() if (".lora_" in name) == new}:
                files.write_file(temporary / file, own)
        files.write_files(temporary, contents)
        open_adapter(temporary)
