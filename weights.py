"""Weights: folders of public checkpoints -> a model that runs, and back.

A folder is read in three steps. Its files are mapped into memory, which costs nothing until a number is used. Every
tensor gets our name for it (formats/layouts.py). The model is built without memory (torch's meta device) and each of
its parameters takes the tensor of its name, cast to the wanted dtype one at a time. The account is strict: each tensor
is used once, each parameter filled once, all shapes agree; otherwise loading stops and says which do not.

The three parts may come from three places: a language model, a CLIP folder (`vision_tower`), a projector
(`pretrain_mm_mlp_adapter`); that is how LLaVA is first put together. Saving writes llava-hf's layout, which
transformers and vLLM load as it is, or the original's where llava-hf has no words for the projector.

    python weights.py inspect PATH [--json]                                 what it is, what is missing to run it
    python weights.py convert SRC OUT [--to llava-hf|llava]                 another layout; SRC may be a GGUF LLaMA
    python weights.py delta apply|make --base B --delta D --target T        LLaVA 0.x as it was published
    python weights.py extract SRC OUT                                       the projector alone
    python weights.py merge ADAPTER OUT [--base B]                          a LoRA and its base as one model
"""

if __name__ == "__main__":  # Ctrl-C may end the imports, which take seconds, but without a traceback
    import sys
    sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import kernels.lora
import lora
import quant
from formats import adapter as adapters
from formats import command, delta, files, gguf_llama, hub, inspection, layouts, processor, templates, vocabulary
from formats.bitsandbytes import Folded, unfold
from formats.checkpoint import open_checkpoint
from formats.command import say
from formats.vocabulary import EMBEDDING, HEAD
from model import IMAGE_TOKEN_INDEX, Llava, LlavaConfig
from projector import build_projector
from tokenizer import Tokenizer
from vision import ImageProcessor

NEWLINE = "image_newline"  # (D,), the vector that ends a line of anyres tiles

# ------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """A model with all that goes with it.

    tokenizer and image_processor are None where the folder has none; tower: name or path of the vision tower; spare:
    tower tensors that the model does not need but a saved folder does; new_projector: True if it is untrained;
    silent_ids: ids that no answer may hold, rows of the head without a token. lora: of the adapter that the model wears
    or trains; base: the language model's name, fingerprint: () -> what tells it from others (formats/adapter.py);
    beside: our names of what the adapter's folder holds beside the adapter. cells: rows of prompts and answers that the
    cache has room for, None without such a plan. eager: answer without recorded steps (sampling/graph.py).
    """

    model: Llava
    tokenizer: Tokenizer
    image_processor: ImageProcessor
    config: LlavaConfig
    conv_mode: str
    tower: str = None
    spare: dict = field(default_factory=dict)
    new_projector: bool = False
    silent_ids: list = field(default_factory=list)
    lora: object = None
    base: str = None
    fingerprint: Callable = None
    beside: set = field(default_factory=set)
    eager: bool = False
    cells: int = None


def pick_device(device="auto"):
    """'auto' -> CUDA, Apple's MPS or the CPU, the first there is."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name in here if here[name]))
    if not here.get(str(device).split(":")[0], str(device) == "meta"):
        raise ValueError(f"--device {device} is not here; use auto or {', '.join(n for n in here if here[n])}")
    return torch.device(device)


def pick_dtype(dtype, device):
    """'auto' -> float32 on the CPU, bfloat16 elsewhere, float16 on GPUs older than Ampere. Names and dtypes both do."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        dtype = "float32" if device.type == "cpu" else "float16" if old else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r} is not known; use auto, float32, bfloat16, float16")
    return getattr(torch, dtype)


def load(path_or_hub_id, dtype="auto", device="auto", bits=16, model_base=None, vision_tower=None,
         quant_type="nf4", double_quant=True, quant_also="",
         pretrain_mm_mlp_adapter=None, mm_projector_type=None, projector_seed=None, pad_token=None, im_patch=False,
         adapter=None, force=False, prepare=None, offload=False, place=None, **settings):
    """Load a model -> Loaded. What was found, and what was left out, is said in a line or two on stderr.

    path_or_hub_id: a folder in any layout of formats/layouts.py, or a Hugging Face id. dtype: auto, a name, a
    torch.dtype, or `stored`. model_base: the language model of a folder that holds only a projector. vision_tower: a
    CLIP folder or id that takes the place of the folder's own. pretrain_mm_mlp_adapter: mm_projector.bin, a
    .safetensors, or a folder with one. A new projector is made only where none is found and `mm_projector_type` or
    `projector_seed` asks for one. bits, quant_type, double_quant, quant_also: as quant.Quantisation; matrices that are
    quantised in the folder stay so. pad_token: added to a tokenizer that names none; im_patch: add `<im_patch>`.
    adapter: a LoRA folder for the model to wear; force: though its base was another. A LoRA folder as the path goes on
    model_base, or on the base that it names. prepare: a function of the model that may change dtypes and divide it
    among ranks, before a number of it is read: each rank then reads its own rows, with `offload` into the CPU's memory.
    What it returns, {our name: tensor}, is put in, too. A model that is quantised or wears an adapter is whole by then.
    place: a sampling.placing.Placing, which spreads the layers over devices, main memory and their own files.
    settings: fields of LlavaConfig (conv_mode, …) that go before the checkpoint's; None is not given.
    ValueError for everything that does not fit.
    """
    quantisation = quant.Quantisation(bits, quant_type, double_quant, quant_also)
    given, base = open_checkpoint(path_or_hub_id), str(path_or_hub_id)
    if worn := adapter or given.adapter and path_or_hub_id:
        given, language, base = adapters.on_base(path_or_hub_id, model_base, adapter, force)
    else:
        language = find_language_model(given, model_base)
    config = read_config(language)
    if given is not language and given.config:
        config = replace(layouts.read_config(given.config, given.tensors, given.path), text=config.text)
    config = replace(config, **layouts.given(settings, settings))
    tower, tower_name, config.vision = find_tower(given, config, vision_tower)
    source, projector = find_projector(given, config, pretrain_mm_mlp_adapter, mm_projector_type, projector_seed)
    projector |= find_newline(given, source, config, projector_seed)
    tensors = {**language.part("language_model"), **projector, **(tower.part("vision_tower") if tower else {})}
    tokenizer, silent_ids = fit_vocabulary(tensors, config, given, language, source, pad_token, im_patch)

    device = pick_device(device)
    dtype = tensors[EMBEDDING].dtype if dtype == "stored" else pick_dtype(dtype, device)
    with torch.device("meta"), Blank():
        model = Llava(config).to(dtype)
    spare = take_spare(model, tensors)
    late = worn or quantisation.kind or any(isinstance(tensor, Folded) for tensor in tensors.values())
    if prepare and not late:
        tensors |= files.lazily(prepare(model))
    plan = place and place(model, tensors, quantisation, device, worn)
    fill(model, tensors, dtype, device, path_or_hub_id, quantisation, offload, plan)

    conv_mode, why = templates.choose_conv_mode(config, tokenizer, settings.get("conv_mode"))
    loaded = Loaded(
        model, tokenizer, tower and find_image_processor(tower.path, config), config,
        conv_mode, tower_name, spare, tower is not None and source is None, silent_ids, base=base,
        fingerprint=cache(partial(adapters.fingerprint, language.tensors)), cells=place and place.tokens)
    if worn:
        adapters.wear(loaded, worn)
    if prepare and late:
        prepare(model)
    say(f"{path_or_hub_id}: {describe(loaded)}; template {conv_mode} ({why})")
    say_unused({"language_model": language, "vision_tower": tower, "mm_projector": source}, given, spare, config)
    return loaded


def find_language_model(given, model_base):
    """The checkpoint that holds the LLM: `given` itself, or model_base where `given` is a projector alone."""
    if given.layout == "delta":
        raise ValueError(f"{given.path} holds differences to LLaMA's weights, no model; make one with `python "
                         f"weights.py delta apply --base LLAMA --delta {given.path} --target OUT`")
    if given.layout == "clip":
        raise ValueError(f"{given.path} is a vision tower without a language model; give it as --vision_tower")
    if given.layout != "projector":
        if model_base:
            raise ValueError(f"{given.path} is a whole model; --model_base goes with a folder that is only a projector")
        return given
    if not model_base:
        raise ValueError(f"{given.path} holds only a projector; name its language model with --model_base")
    return find_language_model(open_checkpoint(model_base), None)


def read_config(language):
    """A language model's config.json -> LlavaConfig, held against its tensors. Rows that `save` put behind the
    vocabulary for llava-hf are taken off, and so is a head that the config ties to the embeddings."""
    config = layouts.read_config(language.config, language.tensors, language.path)
    if "unpadded_vocab_size" in language.config:
        for name in {EMBEDDING, HEAD} & language.tensors.keys():
            language.tensors[name] = language.tensors[name].rows(config.text.vocab_size)
    if config.text.tie_word_embeddings and language.tensors.pop(HEAD, None):
        language.unused.append("the tied head")
    layouts.check_config("language_model", config.text, language.tensors, language.path)
    return config


def find_tower(given, config, vision_tower):
    """-> (Checkpoint with the tower's tensors, its name, ClipVisionConfig), all None for a language model alone.

    As the original does, a folder's own tower counts less than the CLIP folder that its config names, unless it was
    trained (llava-hf's layout, or the config says so); where that folder is not here, its own is taken: a tower that
    was not trained is the same. A projector for CLIP ViT-L whose config names no tower is LLaVA 0.x's (LLAVA.md 6.3).
    """
    own, values = given.part("vision_tower"), given.config
    named = values.get("mm_vision_tower") or values.get("vision_tower")
    trained = "text_config" in values or values.get("unfreeze_mm_vision_tower") or values.get("mm_vision_tower_lr")
    folder = hub.here(named) if named else None
    known = folder and layouts.read_vision_config(files.read_json(folder / "config.json"), named)
    if vision_tower is None and own and (trained or not folder):
        if named and not trained:
            say(f"{given.path}: {named}, which its config names, is not here; its own copy of the tower is taken")
        tower, name = given, named or given.path
        vision = config.vision or known or layouts.vision_config_of_shapes({key: own[key].shape for key in own})
    else:
        name = vision_tower or named
        if name is None and not given.part("mm_projector") and values.get("mm_projector_type") != "identity":
            return None, None, None
        if name is None and layouts.projector_type(given.part("mm_projector"))[1:2] == (1024,):
            name = "openai/clip-vit-large-patch14"
            say(f"{given.path} names no vision tower; LLaVA's first one is taken, {name}")
        if name is None:
            raise ValueError(f"{given.path} has a projector but names no vision tower; name one with --vision_tower")
        tower = open_checkpoint(name)
        vision = layouts.read_vision_config(tower.config, tower.path)
    layouts.check_config("vision_tower", vision, tower.tensors, tower.path)
    before = config.vision or known or vision
    if before.num_patches != vision.num_patches:
        say(f"WARNING: {given.path} knows pictures of {before.image_size} pixels, {before.num_patches} tokens each; "
            f"the vision tower {name} takes {vision.image_size} pixels, {vision.num_patches} tokens each")
    return tower, str(name), vision


def find_projector(given, config, adapter, kind, seed):
    """-> (Checkpoint that the projector comes from, or None for a new one or none; {our name: tensor}). The type, which
    config.mm_projector_type becomes, follows from the tensors' names.
    ValueError if `kind`, the config or the widths on both sides disagree, or a new one is not asked for."""
    source = given if adapter is None else open_checkpoint(adapter)
    if config.vision is None and adapter:
        raise ValueError(f"{adapter} needs a vision tower; name one with --vision_tower")
    if config.vision is None:
        return None, {}
    tensors, says = source.part("mm_projector"), kind or source.config.get("mm_projector_type")
    if not tensors and says != "identity":
        if adapter:
            raise ValueError(f"{adapter} holds no projector; expected tensors named model.mm_projector.*")
        return None, new_mm_projector(given, config, kind, seed)
    found, *widths = layouts.projector_type(tensors)
    if says not in (None, found):
        raise ValueError(f"{source.path} holds a projector of type {found}, not {says}; correct "
                         + ("--mm_projector_type" if kind else "mm_projector_type in config.json"))
    config.mm_projector_type = found
    widths = widths or 2 * [config.vision.hidden_size]
    for width, part, what in zip(widths, (config.vision, config.text), ("the vision tower's", "the language model's")):
        if width != (wanted := part.hidden_size):
            raise ValueError(f"the projector of {source.path} maps width {widths[0]} to {widths[1]}, but {what} width "
                             f"is {wanted}; use parts that belong together")
    return source, tensors


def new_mm_projector(given, config, kind, seed):
    """{our name: tensor} of an untrained projector, initialised as torch does, as the original's. Sets its type."""
    if kind is None and seed is None:
        raise ValueError(f"{given.path} has no projector; give one with --pretrain_mm_mlp_adapter, or train one")
    config.mm_projector_type = kind = kind or "linear"
    with torch.random.fork_rng(devices=[]):
        torch.seed() if seed is None else torch.manual_seed(seed)
        module = build_projector(kind, config.vision.hidden_size, config.text.hidden_size)
    say(f"{given.path} has no projector: a new {kind} one is made, untrained, from seed {seed}")
    return {f"mm_projector.{name}": files.lazy(tensor) for name, tensor in module.state_dict().items()}


def find_newline(given, adapter, config, seed):
    """{} or {NEWLINE: tensor} where anyres ends its lines with one: the projector's, the model's, or with a seed a new
    one, drawn as the original draws it."""
    if config.vision is None or config.mm_patch_merge_type != "spatial_unpad":
        return {}
    for checkpoint in filter(None, (adapter, given)):
        if NEWLINE in checkpoint.tensors:
            return {NEWLINE: checkpoint.tensors[NEWLINE]}
    if seed is None:
        raise ValueError(f"{given.path} has no image_newline, which mm_patch_merge_type spatial_unpad needs; give a "
                         "projector that has one with --pretrain_mm_mlp_adapter, or train one")
    say(f"{given.path} has no image_newline: a new one is made, untrained, from seed {seed}")
    width, generator = config.text.hidden_size, torch.Generator().manual_seed(seed)
    return {NEWLINE: files.lazy(torch.randn(width, generator=generator) * width**-0.5)}


def fit_vocabulary(tensors, config, given, language, projector, pad_token=None, im_patch=False):
    """Make embeddings, head, tokenizer and config agree (formats/vocabulary.py), `tensors` and `config` in place.
    projector: the Checkpoint it comes from, or None. -> (Tokenizer or None, the ids that no answer may hold)"""
    text, where = config.text, language.path
    tokenizer = inspection.find_tokenizer(where)
    if tokenizer is None:
        return None, []
    if tokenizer.eos_token_id and (text.bos_token_id, text.eos_token_id) == (0, 1):  # stale ones of LLaVA 0.x
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = text.vocab_size
    tokens = vocabulary.missing_tokens(tokenizer, given.config, config.mm_use_im_start_end, rows, pad_token, im_patch)
    if tokens:
        tokenizer.add_tokens(tokens)
    if tokens and len(tokenizer) > rows:
        trained = projector and projector.layout == "projector" and projector.tensors.get(EMBEDDING)
        vocabulary.add_rows(tensors, tokens, trained or None, len(tokenizer), where)
        rows = text.vocab_size = len(tokenizer)
    image_token = language.config.get("image_token_index", language.config.get("image_token_id"))
    return tokenizer, vocabulary.check_tokens(tokenizer, rows, image_token, where)


class Blank(TorchFunctionMode):
    """Modules made in here draw no first numbers, which files replace at once. On the meta device drawing them imports
    all of torch's compiler: 70 MB, and 1.1 seconds of every start (0.1 without)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def take_spare(model, tensors):
    """Take out of `tensors`, and return, what the model does not compute with: the tower's layers behind the selected
    one, and the norm behind them."""
    if model.vision_tower is None:
        return {}
    built, layers = len(model.vision_tower.vision_model["encoder"]["layers"]), model.config.vision.num_hidden_layers
    behind = ("post_layernorm.", *(f"encoder.layers.{i}." for i in range(built, layers)))
    behind = tuple(f"vision_tower.vision_model.{name}" for name in behind)
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(behind)}


def fill(model, tensors, dtype, main, where, quantisation, offload=False, plan=None):
    """Give every parameter of a model on the meta device its tensor: each used once, each filled once, shapes equal.
    A tensor that needs no cast is the file's own pages on the CPU; others are cast while they are read, so that memory
    holds the model and some megabytes more. What is to be quantised is, one matrix after the other. Of a parameter that
    is divided among ranks this one reads its rows. A plan (sampling/placing.py) may put layers elsewhere than on main;
    what it puts nowhere (meta) is not read here."""
    parameters, wrong = dict(model.named_parameters()), {}
    for name in parameters.keys() | tensors.keys():
        found, wanted = (tuple(side[name].shape) if name in side else None for side in (tensors, parameters))
        if found != wanted:
            what = "missing" if found is None else f"{found}, expected {wanted}" if wanted else "no place in this model"
            wrong.setdefault(what, []).append(name)
    if wrong:
        complaints = "; ".join(f"{what}: {files.list_names(names)}" for what, names in sorted(wrong.items()))
        raise ValueError(f"{where}: config.json and weights do not agree: {complaints}")

    def made(name):
        tensor, p, module = tensors[name], parameters[name], name.rpartition(".")[0]
        device = plan.device_of(name) if plan else main
        if isinstance(tensor, Folded):
            return quant.QuantisedLinear(tensor.shape, tensor.kind, tensor.parts(), dtype).to(device)
        if name.endswith(".weight") and quantisation.wants(module, model.get_submodule(module)):
            return quantisation.linear(tensor.read().to(device), dtype)
        if plan and device.type == "meta":
            return p
        if not hasattr(p, "device_mesh"):
            return nn.Parameter(tensor.to(p.dtype).read().to(device), p.requires_grad)
        own, = p.__create_chunk_list__()  # of a DTensor: where this rank's part begins, and its size
        rows = tensor.rows(own.sizes[0], own.offsets[0]).to(p.dtype).read().to("cpu" if offload else device)
        part = p.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        return nn.Parameter(part, p.requires_grad)

    with ThreadPoolExecutor(1 if quantisation.kind else 4) as threads:  # some wait for the disk while others cast
        for name, part in zip(parameters, threads.map(made, parameters)):
            module, _, leaf = name.rpartition(".")
            if isinstance(part, nn.Module):
                model.set_submodule(module, part)
            else:
                setattr(model.get_submodule(module), leaf, part)
    if model.config.text.tie_word_embeddings:
        language, embeddings = model.language_model, model.language_model.model.embed_tokens.weight
        if quantisation.wants("lm_head", language.lm_head):  # the embeddings stay as they are
            language.lm_head = quantisation.linear(embeddings.detach(), dtype)
        else:
            language.lm_head.weight = embeddings
    if plan:
        plan.settle(model, tensors)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def find_image_processor(folder, config):
    """The tower's ImageProcessor, from preprocessor_config.json or (transformers 5) inside processor_config.json."""
    side, values = config.vision.image_size, files.read_json(folder / "preprocessor_config.json", missing={})
    values = values or files.read_json(folder / "processor_config.json", missing={}).get("image_processor")
    processor = ImageProcessor.from_dict(values or {"size": side})
    if processor.crop_size != side:
        say(f"WARNING: {folder} makes pictures of {processor.crop_size} pixels, its tower takes {side}: {side} it is")
        processor = replace(processor, crop_size=side, shortest_edge=side)
    return replace(processor, image_grid_pinpoints=config.pinpoints if config.image_aspect_ratio == "anyres" else None)


def say_unused(sources, given, spare, config):
    """Say what the files hold and the model does not: known kinds, replaced parts. sources: {part: its Checkpoint}"""
    checkpoints = {id(checkpoint): checkpoint for checkpoint in (given, *sources.values()) if checkpoint}.values()
    counts = Counter(what for checkpoint in checkpoints for what in checkpoint.unused)
    counts["tower layers behind the selected one"] = len(spare)
    for checkpoint in checkpoints:
        if NEWLINE in checkpoint.tensors and config.mm_patch_merge_type != "spatial_unpad":
            counts[f"{NEWLINE} of {checkpoint.path}"] = 1
        for part, source in sources.items():
            counts[f"{part} of {checkpoint.path}"] = len(checkpoint.part(part)) if source is not checkpoint else 0
    if counts := +counts:  # without zeros
        say("  not needed and left out: " + ", ".join(f"{what} ({count} tensors)" for what, count in counts.items()))


def describe(loaded):
    """One line: parameters by part, dtype, device, tokens per picture."""
    parts = {name: quant.count(part) for name, part in loaded.model.named_children()}
    weight = loaded.model.language_model.model.embed_tokens.weight
    sizes = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in parts.items())
    views = "view" if loaded.config.image_aspect_ratio == "anyres" else "picture"
    tokens = f", {loaded.config.image_tokens} tokens per {views}" if loaded.config.vision else ""
    worn = f", LoRA of rank {loaded.lora.r}" if loaded.lora else ""
    return (f"{sizes} parameters, {str(weight.dtype).removeprefix('torch.')} on {weight.device}"
            f"{quant.describe(loaded.model)}{worn}{tokens}")


# -------------------------------------------------------------------------------------------------------------- saving


def save(loaded, folder, layout="auto", tensors=None, dtype=None, max_shard_size=files.SHARD_BYTES, overwrite=True,
         check=False):
    """Write a folder that `load`, transformers and vLLM read as it is.

    layout: llava-hf, llava (the original's) or auto: llava-hf if it has words for the projector. A language model alone
    is written as a plain LLaMA. tensors: {our name: tensor or LazyTensor} instead of the model's own;
    dtype: cast to it; max_shard_size: bytes of one weight file. Tower tensors that the model left out are copied.
    overwrite: the folder may hold something; check: read all of it again before it is called written, or a function
    (folder, tensors) that does. Nothing is left half written.
    """
    tensors, contents, layout, stored = lay_out(loaded, layout, tensors, dtype)
    write = adapters.write_folder if loaded.lora else files.write_folder
    write(folder, tensors, contents, max_shard_size, overwrite, read_again if check is True else check or None)
    say(f"written to {folder}: {layout} layout, {stored}" + (", read again and found equal" if check else ""))


def lay_out(loaded, layout="auto", tensors=None, dtype=None):
    """What `save` will write, and nothing is written yet; tensors on the meta device do too, their sizes are known.

    -> ({name in the file: tensor or LazyTensor}, {file: bytes or what becomes JSON}, name of the layout, of the dtype)
    """
    config = replace(loaded.config, conv_mode=loaded.conv_mode)
    tensors = dict(loaded.model.state_dict() if tensors is None else tensors)
    if loaded.lora:
        return adapters.lay_out(loaded, tensors, config)
    layout = pick_layout(config, layout)
    stored = dtype or tensors[EMBEDDING].dtype
    tensors |= {name: tensor.to(stored) for name, tensor in loaded.spare.items()}
    tensors = {name: tensor.to(dtype) if dtype and tensor.dtype.is_floating_point else tensor
               for name, tensor in tensors.items()}
    quantised = unfold(loaded.model, tensors)
    if config.text.tie_word_embeddings:
        tensors.pop(HEAD, None)
    stored = str(stored).removeprefix("torch.")

    contents = loaded.tokenizer.folder_files if loaded.tokenizer else {}
    contents["generation_config.json"] = layouts.given(vars(config.text), layouts.TOKEN_IDS)
    if config.vision is None:
        contents["config.json"] = layouts.llama_config(config, stored)
    else:
        contents["preprocessor_config.json"] = processor.preprocessor_config(loaded.image_processor, config)
    if layout == "llava-hf":
        image_token_id, rows = make_room_for_image_token(contents, tensors, loaded.tokenizer)
        contents["config.json"] = layouts.llava_hf_config(config, loaded.tower, stored, image_token_id, rows)
        contents["processor_config.json"] = processor.processor_config(config)
        if template := processor.chat_template(config.conv_mode, loaded.tokenizer, config.mm_use_im_start_end):
            contents["chat_template.jinja"] = template.encode()
    elif config.vision is not None:
        rows = processor.remove_image_token(contents) or config.text.vocab_size
        for name in {EMBEDDING, HEAD} & tensors.keys():
            tensors[name] = files.lazy(tensors[name]).rows(rows)
        config = replace(config, text=replace(config.text, vocab_size=rows))
        values = layouts.llava_config(config, loaded.tower, stored)
        contents["config.json"] = values | {"unfreeze_mm_vision_tower": True}
    if quantised:
        contents["config.json"]["quantization_config"] = quantised
    named = {layouts.file_name(name, layout): tensor for name, tensor in tensors.items()}
    return named, contents, "plain LLaMA" if config.vision is None else layout, stored


def read_again(folder, tensors):
    """What was written holds the same numbers, and loads as a whole: ValueError otherwise."""
    files.compare(folder, tensors)
    with contextlib.redirect_stderr(io.StringIO()):  # which would speak of the temporary folder
        load(folder, dtype="stored", device="cpu")


def make_room_for_image_token(contents, tensors, tokenizer):
    """llava-hf looks `<image>` up before it puts the features there: give it an id and the vocabulary a row for it.
    Changes both in place -> (id of `<image>`, rows). Rows are added up to a multiple of 64, as published, all the mean
    of the others, so that none ever scores best; generation_config.json suppresses them besides."""
    size = tensors[EMBEDDING].shape[0]
    image_token_id = processor.add_image_token(contents, len(tokenizer) if tokenizer else size)
    if image_token_id < size:
        return image_token_id, size
    rows = -(-(image_token_id + 1) // 64) * 64
    for name in {EMBEDDING, HEAD} & tensors.keys():
        tensors[name] = vocabulary.grow(files.lazy(tensors[name]), rows)
    contents["generation_config.json"]["suppress_tokens"] = list(range(size, rows))
    return image_token_id, rows


def save_projector(loaded, folder, tensors=None):
    """Write what stage 1 learned as the original does: mm_projector.bin (`model.mm_projector.*`, and the embeddings if
    <im_start> and <im_end> are among them) and config.json.
    tensors: as in `save`. (LLAVA.md 6.8.)"""
    tensors = loaded.model.state_dict() if tensors is None else tensors
    kind = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    config = layouts.llava_config(replace(loaded.config, conv_mode=loaded.conv_mode), loaded.tower, kind)
    write_projector(folder, tensors, config, overwrite=True)


def write_projector(out, tensors, config, overwrite, single=False):
    """mm_projector.bin and config.json in a folder, or the one file alone: what belongs into it of {our name: tensor},
    under the original's names, read again and compared. -> those names"""
    learned = ("mm_projector.", NEWLINE) + (EMBEDDING,) * bool(config.get("mm_use_im_start_end"))
    named = {layouts.file_name(name, "llava"): tensor for name, tensor in tensors.items() if name.startswith(learned)}
    with (files.new_file if single else files.new_folder)(out, overwrite) as temporary:
        files.write_file(temporary if single else temporary / "mm_projector.bin", named)
        if not single:
            files.write_files(temporary, {"config.json": config | {"tune_mm_mlp_adapter": True}})
    return list(named)


def pick_layout(config, layout):
    """'auto' -> llava-hf, or llava where llava-hf has no words for the projector, which is said."""
    if layout not in ("auto", "llava-hf", "llava"):
        raise ValueError(f"layout {layout!r} is not known; use auto, llava-hf or llava")
    if config.vision is None and layout != "auto":
        raise ValueError(f"a language model without a vision tower has no {layout} layout; leave --to out")
    lacks = config.vision and layouts.llava_hf_lacks(config)
    if lacks and layout == "llava-hf":
        raise ValueError(f"llava-hf has no words for {lacks}; write the original's layout (--to llava)")
    if lacks and layout == "auto":
        say(f"llava-hf has no words for {lacks}; written is the original's layout")
    plain = config.vision is None  # the original's names without projector and tower are LLaMA's
    return "llava" if lacks or plain or layout == "llava" else "llava-hf"


# -------------------------------------------------------------------------------------------------------- command line


def convert(source, out, layout="auto", max_shard_size=files.SHARD_BYTES, overwrite=False, bits=16):
    """Any folder that `load` reads, or a GGUF LLaMA -> a folder in a public layout; tensors keep their dtype, or with
    `bits` 4 or 8 the LLM's matrices are quantised."""
    if Path(source).suffix != ".gguf":
        loaded = load(source, dtype="stored", device="cpu", bits=bits)
        return save(loaded, out, layout, max_shard_size=max_shard_size, overwrite=overwrite, check=True)
    if layout != "auto" or bits != 16:
        raise ValueError(f"{source} is a language model; it becomes a plain LLaMA folder, leave --to and --bits out")
    tensors, contents = gguf_llama.read(source)
    files.write_folder(out, tensors, contents, max_shard_size, overwrite, read_again)
    say(f"written to {out}: plain LLaMA layout, {sum(t.numel() for t in tensors.values()) / 1e6:,.2f} M parameters, "
        "read again and found equal")


def extract(source, out, overwrite=False):
    """A whole model's projector -> a .bin or .safetensors file, or a folder with mm_projector.bin and config.json.

    As the original's extract_mm_projector: its names, and with <im_start> and <im_end> the embeddings (LLAVA.md 6.8).
    """
    checkpoint = open_checkpoint(source)
    config, projector = checkpoint.config, checkpoint.part("mm_projector")
    if not projector:
        raise ValueError(f"{source} holds no projector; expected a LLaVA, or what its stage 1 has written")
    if "text_config" in config:  # llava-hf's; projectors are known with the original's
        values = layouts.read_config(config, checkpoint.tensors, checkpoint.path)
        dtype = str(next(iter(projector.values())).dtype).removeprefix("torch.")
        config = layouts.llava_config(values, config.get("mm_vision_tower", str(source)), dtype)
    single = Path(out).suffix in (".bin", ".safetensors")
    names = write_projector(out, checkpoint.tensors, config, overwrite, single)
    say(f"written to {out}: {', '.join(names)}, read again and found equal")


def merge(adapter, out, base=None, onto=None, dtype=None, force=False, **how):
    """W + s B A for every matrix that an adapter corrects, one at a time, and all else as it is -> a whole model.

    base: None is the one that the adapter names. onto: for a base that is quantised, or was in training: `original`,
    its weights before that, or `dequantised`, what the adapter saw. dtype: None is the base's. how: as in `save`. Said
    is what rounding takes of the correction, and how far the logits are from those of base and adapter.
    ValueError, and nothing is written: `onto` is missing, or the logits are those of another model.
    """
    worn, config = adapters.open_adapter(adapter)
    if Path(out).resolve() in {Path(path).resolve() for path in (adapter, base or worn.adapter.base or adapter)}:
        raise ValueError(f"{out} is the adapter or its base, which merging reads; name another folder to write to")
    seen = worn.config.get(adapters.QUANTISATION, {})
    loaded = load(base or adapter, "stored", "cpu", adapter=base and adapter, force=force,
                  **(seen if onto == "dequantised" else {}))
    model, held, lost = loaded.model, quant.quantised(loaded.model), []
    if (held or seen) and onto != "dequantised" and (held or onto != "original"):
        raise ValueError(f"{adapter} was trained on a base that was quantised; say what to merge into: --onto "
                         "dequantised is what it saw" + ", --onto original the weights before that" * (not held))
    dtype = pick_dtype(dtype or model.language_model.model.embed_tokens.weight.dtype, torch.device("cpu"))
    new = {name: worn.adapter.modules.get(f"{name}.weight") for name in held.keys() | lora.adapted(model).keys()}
    tensors = {name: p for name, p in model.state_dict().items() if name.endswith("bias") or
               name.rpartition(".")[0] not in new}

    def merged(layer, pair):
        weight = getattr(layer, "linear", layer).weight.detach()
        if pair is None:
            return weight.to(dtype, copy=True)
        weight, squares = kernels.lora.merge(weight, pair["lora_A"].read(), pair["lora_B"].read(), config.scale, dtype)
        lost.append(squares)
        return weight

    for name, pair in new.items():
        layer = model.get_submodule(name)
        tensors[f"{name}.weight"] = files.LazyTensor(
            torch.Size([layer.out_features, layer.in_features]), dtype, None, partial(merged, layer, pair))

    def check(folder, written):
        files.compare(folder, written)
        with contextlib.redirect_stderr(io.StringIO()):
            model.to(torch.promote_types(dtype, model.language_model.model.embed_tokens.weight.dtype))
            adapters.wear(loaded, adapter)  # anew, in this dtype
            found, wanted = logits(load(folder, "stored", "cpu").model), logits(model)
        rounding, apart = torch.tensor(lost).sum(0), (found - wanted).abs().max()
        taken = (rounding[0] / rounding[1]).sqrt()
        say("WARNING: " * bool(taken > 0.05) + f"rounding to {dtype} takes {taken:.2%} of the correction"
            + "; --dtype float32 keeps it all" * (dtype != torch.float32))
        say(f"merged and unmerged logits differ by {apart:.2g} at most (standard deviation {wanted.std():.2g}), in the "
            f"likeliest word at {int((found.argmax(1) != wanted.argmax(1)).sum())} of {len(wanted)} places")
        if not apart < wanted.std():
            raise ValueError(f"{out} would be another model than base and adapter; nothing is written")

    with torch.device("meta"), Blank():
        whole = replace(loaded, model=Llava(loaded.config), lora=None)
    save(whole, out, tensors=tensors, dtype=dtype, check=check, **how)


@torch.no_grad()
def logits(model):
    """A model's scores on a few words, behind a picture of noise if it has a tower. -> (T, V) float32"""
    config, generator = model.config, torch.Generator().manual_seed(0)
    sizes = [[config.vision.image_size] * 2] if config.vision else []
    ids = torch.randint(config.text.vocab_size, (32,), generator=generator)
    ids = torch.cat([torch.full((sum(map(config.tokens_of, sizes)),), IMAGE_TOKEN_INDEX), ids])
    pixels = torch.randn(sum(map(config.views_of, sizes)), 3, *(sizes or [[1, 1]])[0], generator=generator)
    return model.logits(SimpleNamespace(
        input_ids=ids, position_ids=torch.arange(len(ids)), cu_seqlens=torch.tensor([0, len(ids)]), ids=["noise"],
        pixel_values=pixels, image_sizes=sizes))


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python weights.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what a folder or file holds and what it lacks to run")
    inspecting.add_argument("path", help="a folder, a weight file, a GGUF, or a Hugging Face id")
    inspecting.add_switch("--tensors", help="list every tensor")
    inspecting.add_switch("--json", help="all of it as one JSON object")
    converting = commands.add_parser("convert", help="write a folder, or a GGUF LLaMA, in another layout")
    converting.add_argument("source", help="a folder, a Hugging Face id, or a GGUF LLaMA")
    converting.add_argument("out", help="the folder to write; nothing of it is there before all is")
    converting.add_argument("--to", default="auto", choices=("auto", "llava-hf", "llava"), help="layout")
    converting.add_argument("--bits", type=int, default=16, help="4 (NF4) or 8: quantise the language model's matrices")
    differing = commands.add_parser("delta", help="apply a delta to its LLaMA, or make one")
    differing.add_argument("what", choices=("apply", "make"), help="apply: base + delta = target")
    for name in ("base", "delta", "target"):  # the longer names are the original's
        path = "path" if name == "delta" else "model_path"
        differing.add_argument(f"--{name}", f"--{name}_{path}", required=True, metavar="FOLDER")
    extracting = commands.add_parser("extract", help="take the projector out of a whole model")
    extracting.add_argument("source", help="a folder in any layout")
    extracting.add_argument("out", help="a .bin or .safetensors file, or a folder")
    merging = commands.add_parser("merge", help="a LoRA and its base -> a whole model")
    merging.add_argument("adapter", help="a folder as PEFT, this project or the original LLaVA writes it")
    merging.add_argument("out", help="the folder to write")
    merging.add_argument("--base", help="the model that it corrects; default: the one that its folder names")
    merging.add_argument("--onto", choices=("original", "dequantised"), help="which weights of a quantised base")
    merging.add_argument("--dtype", help="of the merged model: float32, bfloat16, float16; default: the base's")
    merging.add_switch("--force", help="merge although the adapter was trained on another base")
    for writing in (converting, differing, merging):
        writing.add_argument("--max_shard_size", type=command.file_size, default="5GB", help="like 5GB or 200MB")
    for writing in (converting, differing, extracting, merging):
        writing.add_switch("--overwrite_output_dir", help="write to a folder, or over a file, that is there already")
    args = parser.parse_args()
    if args.command == "inspect":
        report = inspection.inspect(args.path)
        print(json.dumps(report, indent=2) if args.json else inspection.describe(report, args.tensors))
    elif args.command == "convert":
        convert(args.source, args.out, args.to, args.max_shard_size, args.overwrite_output_dir, args.bits)
    elif args.command == "merge":
        merge(args.adapter, args.out, args.base, args.onto, args.dtype, args.force,
              max_shard_size=args.max_shard_size, overwrite=args.overwrite_output_dir)
    elif args.command == "extract":
        extract(args.source, args.out, args.overwrite_output_dir)
    else:
        combine = delta.apply if args.what == "apply" else delta.make
        combine(args.base, args.delta, args.target, args.max_shard_size, args.overwrite_output_dir)


if __name__ == "__main__":
    command.run(main)
