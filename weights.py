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
"""

import contextlib
import io
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from formats import command, delta, files, gguf_llama, hub, inspection, layouts, processor, templates, vocabulary
from formats.checkpoint import open_checkpoint
from formats.command import say
from formats.vocabulary import EMBEDDING, HEAD
from model import Llava, LlavaConfig
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
    silent_ids: ids that no answer may hold, rows of the head without a token.
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
    if dtype == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ValueError(f"--dtype {dtype!r} is not known; use auto, {', '.join(known)}")
    return known[dtype]


def load(path_or_hub_id, dtype="auto", device="auto", bits=16, model_base=None, vision_tower=None,
         pretrain_mm_mlp_adapter=None, mm_projector_type=None, projector_seed=None, pad_token=None, im_patch=False,
         **settings):
    """Load a model -> Loaded. What was found, and what was left out, is said in a line or two on stderr.

    path_or_hub_id: a folder in any layout of formats/layouts.py, or a Hugging Face id. dtype: auto, a name, a
    torch.dtype, or `stored`. model_base: the language model of a folder that holds only a projector. vision_tower: a
    CLIP folder or id that takes the place of the folder's own. pretrain_mm_mlp_adapter: mm_projector.bin, a
    .safetensors, or a folder with one. A new projector is made only where none is found and `mm_projector_type` or
    `projector_seed` asks for one. pad_token: added to a tokenizer that names none; im_patch: add `<im_patch>`.
    settings: fields of LlavaConfig (conv_mode, …) that go before the checkpoint's; None is not given.
    ValueError for everything that does not fit.
    """
    if bits != 16:
        raise ValueError(f"--bits {bits} is not supported yet; use 16")
    given = open_checkpoint(path_or_hub_id)
    language = find_language_model(given, model_base)
    config = read_config(language)
    if given is not language and given.config:
        config = replace(layouts.read_config(given.config, given.tensors, given.path), text=config.text)
    config = replace(config, **{key: value for key, value in settings.items() if value is not None})
    tower, tower_name, config.vision = find_tower(given, config, vision_tower)
    adapter, projector = find_projector(given, config, pretrain_mm_mlp_adapter, mm_projector_type)
    new_projector = config.vision is not None and adapter is None
    if new_projector:
        projector, config.mm_projector_type = new_mm_projector(given, config, mm_projector_type, projector_seed)
    projector |= find_newline(given, adapter, config, projector_seed)
    tensors = {**language.part("language_model"), **projector, **(tower.part("vision_tower") if tower else {})}
    tokenizer, silent_ids = fit_vocabulary(tensors, config, given, language, adapter, pad_token, im_patch)

    device = pick_device(device)
    dtype = tensors[EMBEDDING].dtype if dtype == "stored" else pick_dtype(dtype, device)
    with torch.device("meta"), Blank():
        model = Llava(config)
    spare = take_spare(model, tensors)
    fill(model, tensors, dtype, device, path_or_hub_id)

    conv_mode, why = templates.choose_conv_mode(config, tokenizer)
    loaded = Loaded(
        model, tokenizer, tower and find_image_processor(tower.path, config), config,
        conv_mode, tower=tower_name, silent_ids=silent_ids,
        spare={name: tensor for name, tensor in spare.items() if name != HEAD}, new_projector=new_projector)
    unused = count_unused({"language_model": language, "vision_tower": tower, "mm_projector": adapter}, given, spare,
                          config)
    say(f"{path_or_hub_id}: {describe(loaded)}; template {conv_mode} ({why})")
    if unused:
        say("  not needed and left out: " + ", ".join(f"{what} ({count} tensors)" for what, count in unused.items()))
    return loaded


def find_language_model(given, model_base):
    """The checkpoint that holds the LLM: `given` itself, or model_base where `given` is a projector alone."""
    if given.layout == "lora":
        base = given.adapter.base or "a model that it does not name"
        raise ValueError(f"{given.path} is a LoRA adapter of rank {given.adapter.r} for {base}; adapters are not "
                         "applied yet: give a model that it has been merged into")
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
    vocabulary for llava-hf are taken off."""
    config = layouts.read_config(language.config, language.tensors, language.path)
    if "unpadded_vocab_size" in language.config:
        for name in {EMBEDDING, HEAD} & language.tensors.keys():
            language.tensors[name] = language.tensors[name].rows(config.text.vocab_size)
    layouts.check_language_model(config.text, language.tensors, language.path)
    return config


def find_tower(given, config, vision_tower):
    """-> (Checkpoint with the tower's tensors, its name, ClipVisionConfig), all None for a language model alone.

    As the original does, a folder's own tower counts less than the CLIP folder that its config names, unless it was
    trained (llava-hf's layout, or the config says so); where that folder is not here, its own is taken: a tower that
    was not trained is the same. A projector for CLIP ViT-L whose config names no tower is LLaVA 0.x's (LLAVA.md 6.3).
    """
    own, values = given.part("vision_tower"), given.config
    named = values.get("mm_vision_tower") or values.get("vision_tower")
    projector = given.part("mm_projector") or values.get("mm_projector_type") == "identity"
    trained = "text_config" in values or values.get("unfreeze_mm_vision_tower") or values.get("mm_vision_tower_lr")
    folder = hub.here(named) if named else None
    known = folder and layouts.read_vision_config(files.read_json(folder / "config.json"), named)
    if vision_tower is None and own and (trained or not folder):
        if named and not trained:
            say(f"{given.path}: {named}, which its config names, is not here; its own copy of the tower is taken")
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        vision = config.vision or known or layouts.vision_config_of_shapes(shapes)
        layouts.check_tower(vision, own, given.path)
        return given, named or str(given.path), vision
    if vision_tower is None and not projector and not named:
        return None, None, None
    name = vision_tower or named
    width = next((tensor.shape[1] for tensor in given.part("mm_projector").values() if len(tensor.shape) == 2), None)
    if name is None and width == 1024:
        name = "openai/clip-vit-large-patch14"
        say(f"{given.path} names no vision tower; LLaVA's first one is taken, {name}")
    if name is None:
        raise ValueError(f"{given.path} has a projector but names no vision tower; name one with --vision_tower")
    tower = open_checkpoint(name)
    vision = layouts.read_vision_config(tower.config, tower.path)
    layouts.check_tower(vision, tower.tensors, tower.path)
    before = config.vision or known
    if before and before.num_patches != vision.num_patches:
        say(f"WARNING: {given.path} knows pictures of {before.image_size} pixels, {before.num_patches} tokens each; "
            f"the vision tower {name} takes {vision.image_size} pixels, {vision.num_patches} tokens each")
    return tower, str(name), vision


def find_projector(given, config, adapter, kind):
    """-> (Checkpoint that the projector comes from, or None; {our name: tensor}). Sets config.mm_projector_type.

    The type follows from the tensors' names; ValueError if `kind`, the config or the widths on both sides disagree.
    """
    source = given if adapter is None else open_checkpoint(adapter)
    tensors = source.part("mm_projector")
    if config.vision is None:
        if adapter:
            raise ValueError(f"{adapter} needs a vision tower; name one with --vision_tower")
        return None, {}
    says = kind or source.config.get("mm_projector_type")
    if not tensors and says != "identity":
        if adapter:
            raise ValueError(f"{adapter} holds no projector; expected tensors named model.mm_projector.*")
        return None, {}
    found = layouts.projector_type(tensors)
    if says not in (None, found):
        raise ValueError(f"{source.path} holds a projector of type {found}, not {says}; correct "
                         + ("--mm_projector_type" if kind else "mm_projector_type in config.json"))
    config.mm_projector_type = found
    shapes = [tensors[name].shape for name in sorted(tensors) if name.endswith("weight")]
    widths = (shapes[0][1], shapes[-1][0]) if shapes else (config.vision.hidden_size, config.vision.hidden_size)
    for width, wanted, what in ((widths[0], config.vision.hidden_size, "the vision tower's"),
                                (widths[1], config.text.hidden_size, "the language model's")):
        if width != wanted:
            raise ValueError(f"the projector of {source.path} maps width {widths[0]} to {widths[1]}, but {what} width "
                             f"is {wanted}; use parts that belong together")
    return source, tensors


def new_mm_projector(given, config, kind, seed):
    """An untrained projector with torch's own initialisation, as the original's -> ({our name: tensor}, its type)."""
    if kind is None and seed is None:
        raise ValueError(f"{given.path} has no projector; give one with --pretrain_mm_mlp_adapter, or train one")
    kind = kind or "linear"
    with torch.random.fork_rng(devices=[]):
        torch.seed() if seed is None else torch.manual_seed(seed)
        module = build_projector(kind, config.vision.hidden_size, config.text.hidden_size)
    say(f"{given.path} has no projector: a new {kind} one is made, untrained, from seed {seed}")
    return {f"mm_projector.{name}": files.lazy(tensor) for name, tensor in module.state_dict().items()}, kind


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

    projector: the Checkpoint it comes from, or None. -> (Tokenizer or None, the ids that no answer may hold)
    """
    text, where = config.text, language.path
    tokenizer = inspection.find_tokenizer(where)
    if tokenizer is None:
        return None, []
    if tokenizer.eos_token_id and (text.bos_token_id, text.eos_token_id) == (0, 1):  # stale ones of LLaVA 0.x
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = text.vocab_size
    tokens = vocabulary.missing_tokens(tokenizer, given.config, config.mm_use_im_start_end, rows, pad_token, im_patch)
    if tokens:
        tokenizer = inspection.find_tokenizer(where, tokens)
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
    """Take out of `tensors`, and return, what the model as configured does not compute with: tower layers behind the
    selected one and the norm behind them; the head of a file whose config ties it to the embeddings."""
    config, spare = model.config, {}
    for name in tensors.keys() - dict(model.named_parameters()).keys():
        layer = re.fullmatch(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\..+", name)
        if ((layer and int(layer[1]) < config.vision.num_hidden_layers) or "vision_model.post_layernorm." in name
                or (name == HEAD and config.text.tie_word_embeddings)):
            spare[name] = tensors.pop(name)
    return spare


def fill(model, tensors, dtype, device, where):
    """Give every parameter of a model on the meta device its tensor: each used once, each filled once, shapes equal.

    A tensor that needs no cast is the file's own pages on the CPU; others are cast while they are read, so that memory
    holds the model and some megabytes more.
    """
    parameters = dict(model.named_parameters())
    shapes = {}
    for name in parameters.keys() & tensors.keys():
        if tensors[name].shape != parameters[name].shape:
            shapes.setdefault((tuple(tensors[name].shape), tuple(parameters[name].shape)), []).append(name)
    complaints = [f"{what}: {files.list_names(names)}" for what, names in (
        ("missing", parameters.keys() - tensors.keys()), ("no place in this model", tensors.keys() - parameters.keys()),
        *((f"{found}, expected {wanted}", names) for (found, wanted), names in sorted(shapes.items()))) if names]
    if complaints:
        raise ValueError(f"{where}: config.json and weights do not agree: {'; '.join(complaints)}")
    with ThreadPoolExecutor(4) as threads:  # some wait for the disk while others cast
        filled = threads.map(lambda name: nn.Parameter(tensors[name].to(dtype).read().to(device)), parameters)
        for name, parameter in zip(parameters, filled):
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    if model.config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def find_image_processor(folder, config):
    """The tower's ImageProcessor, from preprocessor_config.json or (transformers 5) inside processor_config.json."""
    side, values = config.vision.image_size, {}
    if (folder / "preprocessor_config.json").exists():
        values = files.read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        values = files.read_json(folder / "processor_config.json").get("image_processor", {})
    processor = ImageProcessor.from_dict(values or {"size": side})
    if processor.crop_size != side:
        say(f"WARNING: {folder} makes pictures of {processor.crop_size} pixels, its tower takes {side}: {side} it is")
        processor = replace(processor, crop_size=side, shortest_edge=side)
    return replace(processor, image_grid_pinpoints=config.pinpoints if config.image_aspect_ratio == "anyres" else None)


def count_unused(sources, given, spare, config):
    """-> {what: number of tensors} that the files hold and the model does not: known kinds and replaced parts."""
    checkpoints = {id(checkpoint): checkpoint for checkpoint in (given, *sources.values()) if checkpoint}.values()
    counts = Counter(what for checkpoint in checkpoints for what in checkpoint.unused)
    for name in spare:
        counts["the tied head" if name == HEAD else "tower layers behind the selected one"] += 1
    for checkpoint in checkpoints:
        if NEWLINE in checkpoint.tensors and config.mm_patch_merge_type != "spatial_unpad":
            counts[f"{NEWLINE} of {checkpoint.path}"] = 1
        for part, source in sources.items():
            if source is not checkpoint and checkpoint.part(part):
                counts[f"{part} of {checkpoint.path}"] = len(checkpoint.part(part))
    return counts


def describe(loaded):
    """One line: parameters by part, dtype, device, tokens per picture."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in loaded.model.named_children()}
    weight = loaded.model.language_model.model.embed_tokens.weight
    sizes = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in parts.items())
    views = "view" if loaded.config.image_aspect_ratio == "anyres" else "picture"
    tokens = f", {loaded.config.image_tokens} tokens per {views}" if loaded.config.vision else ""
    return f"{sizes} parameters, {str(weight.dtype).removeprefix('torch.')} on {weight.device}{tokens}"


# -------------------------------------------------------------------------------------------------------------- saving


def save(loaded, folder, layout="auto", tensors=None, dtype=None, max_shard_size=files.SHARD_BYTES, overwrite=True,
         check=False):
    """Write a folder that `load`, transformers and vLLM read as it is.

    layout: llava-hf, llava (the original's) or auto: llava-hf if it has words for the projector. A language model alone
    is written as a plain LLaMA. tensors: {our name: tensor} instead of the model's own (gathered from many ranks);
    dtype: cast to it; max_shard_size: bytes of one weight file. Tower tensors that the model left out are copied.
    overwrite: the folder may hold something; check: read all of it again before it is called written. Nothing is left
    half written.
    """
    tensors, contents, layout, stored = lay_out(loaded, layout, tensors, dtype)
    with files.new_folder(folder, overwrite) as temporary:
        files.write_tensors(temporary, tensors, max_shard_size)
        files.write_files(temporary, contents)
        if check:
            read_again(temporary, tensors)
    say(f"written to {folder}: {layout} layout, {stored}" + (", read again and found equal" if check else ""))


def lay_out(loaded, layout="auto", tensors=None, dtype=None):
    """What `save` will write, and nothing is written yet; tensors on the meta device do too, their sizes are known.

    -> ({name in the file: tensor or LazyTensor}, {file: bytes or what becomes JSON}, name of the layout, of the dtype)
    """
    config = replace(loaded.config, conv_mode=loaded.conv_mode)
    layout = pick_layout(config, layout)
    tensors = dict(loaded.model.state_dict() if tensors is None else tensors)
    if config.text.tie_word_embeddings:
        tensors.pop(HEAD, None)
    stored = dtype or tensors[EMBEDDING].dtype
    tensors |= {name: tensor.to(stored) for name, tensor in loaded.spare.items()}
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    stored = str(stored).removeprefix("torch.")

    contents = loaded.tokenizer.folder_files if loaded.tokenizer else {}
    ids = {key: getattr(config.text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    contents["generation_config.json"] = {key: value for key, value in ids.items() if value is not None}
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
            tensors[name] = tensors[name][:rows]
        config = replace(config, text=replace(config.text, vocab_size=rows))
        values = layouts.llava_config(config, loaded.tower, stored)
        contents["config.json"] = values | {"unfreeze_mm_vision_tower": True}
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
    of the others, so that none ever scores best; generation_config.json suppresses them besides.
    """
    vocabulary = len(tensors[EMBEDDING])
    image_token_id = processor.add_image_token(contents, len(tokenizer) if tokenizer else vocabulary)
    if image_token_id < vocabulary:
        return image_token_id, vocabulary
    rows = -(-(image_token_id + 1) // 64) * 64
    for name in {EMBEDDING, HEAD} & tensors.keys():
        weight = tensors[name]
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        tensors[name] = torch.cat([weight, mean.expand(rows - vocabulary, -1)])  # (rows, D)
    contents["generation_config.json"]["suppress_tokens"] = list(range(vocabulary, rows))
    return image_token_id, rows


def save_projector(loaded, folder, tensors=None):
    """Write what stage 1 learned as the original does: mm_projector.bin (`model.mm_projector.*`, and the embeddings if
    <im_start> and <im_end> are among them) and config.json.

    tensors: as in `save`. (LLAVA.md 6.8.)
    """
    tensors = loaded.model.state_dict() if tensors is None else tensors
    kind = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    config = layouts.llava_config(replace(loaded.config, conv_mode=loaded.conv_mode), loaded.tower, kind)
    learned = ("mm_projector.", NEWLINE) + (EMBEDDING,) * loaded.config.mm_use_im_start_end
    with files.new_folder(folder, replace=True) as temporary:
        torch.save({layouts.file_name(name, "llava"): tensor.detach().cpu().clone() for name, tensor in tensors.items()
                    if name.startswith(learned)}, temporary / "mm_projector.bin")
        files.write_files(temporary, {"config.json": config | {"tune_mm_mlp_adapter": True}})


def pick_layout(config, layout):
    """'auto' -> llava-hf, or llava where llava-hf has no words for the projector, which is said."""
    if layout not in ("auto", "llava-hf", "llava"):
        raise ValueError(f"layout {layout!r} is not known; use auto, llava-hf or llava")
    if config.vision is None:
        if layout != "auto":
            raise ValueError(f"a language model without a vision tower has no {layout} layout; leave --to out")
        return "llava"  # its names without projector and tower are LLaMA's
    lacks = layouts.llava_hf_lacks(config)
    if lacks is None:
        return "llava-hf" if layout == "auto" else layout
    if layout == "llava-hf":
        raise ValueError(f"llava-hf has no words for {lacks}; write the original's layout (--to llava)")
    if layout == "auto":
        say(f"llava-hf has no words for {lacks}; written is the original's layout")
    return "llava"


# -------------------------------------------------------------------------------------------------------- command line


def convert(source, out, layout="auto", max_shard_size=files.SHARD_BYTES, overwrite=False):
    """Any folder that `load` reads, or a GGUF LLaMA -> a folder in a public layout; tensors keep their dtype."""
    if Path(source).suffix != ".gguf":
        loaded = load(source, dtype="stored", device="cpu")
        return save(loaded, out, layout, max_shard_size=max_shard_size, overwrite=overwrite, check=True)
    if layout != "auto":
        raise ValueError(f"{source} is a language model; it becomes a plain LLaMA folder, leave --to out")
    tensors, contents = gguf_llama.read(source)
    with files.new_folder(out, overwrite) as temporary:
        files.write_tensors(temporary, tensors, max_shard_size)
        files.write_files(temporary, contents)
        read_again(temporary, tensors)
    say(f"written to {out}: plain LLaMA layout, {sum(t.numel() for t in tensors.values()) / 1e6:,.2f} M parameters, "
        "read again and found equal")


def extract(source, out, overwrite=False):
    """A whole model's projector -> a .bin or .safetensors file, or a folder with mm_projector.bin and config.json.

    As the original's extract_mm_projector: its names, and with <im_start> and <im_end> the embeddings (LLAVA.md 6.8).
    """
    checkpoint = open_checkpoint(source)
    config, out = checkpoint.config, Path(out)
    if not checkpoint.part("mm_projector"):
        raise ValueError(f"{source} holds no projector; expected a LLaVA, or what its stage 1 has written")
    parts = ("mm_projector.", "image_newline") + ((EMBEDDING,) if config.get("mm_use_im_start_end") else ())
    tensors = {layouts.file_name(name, "llava"): tensor for name, tensor in checkpoint.tensors.items()
               if name.startswith(parts)}
    if out.suffix in (".bin", ".safetensors"):
        with files.new_file(out, overwrite) as temporary:
            files.write_file(temporary, tensors)
    else:
        if "text_config" in config:  # llava-hf's; projectors are known with the original's
            values = layouts.read_config(config, checkpoint.tensors, checkpoint.path)
            dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            config = layouts.llava_config(values, config.get("mm_vision_tower", str(source)), dtype)
        with files.new_folder(out, overwrite) as temporary:
            files.write_file(temporary / "mm_projector.bin", tensors)
            files.write_files(temporary, {"config.json": config | {"tune_mm_mlp_adapter": True}})
    say(f"written to {out}: {', '.join(tensors)}, read again and found equal")


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
    differing = commands.add_parser("delta", help="apply a delta to its LLaMA, or make one")
    differing.add_argument("what", choices=("apply", "make"), help="apply: base + delta = target")
    for name in ("base", "delta", "target"):  # the longer names are the original's
        path = "path" if name == "delta" else "model_path"
        differing.add_argument(f"--{name}", f"--{name}_{path}", required=True, metavar="FOLDER")
    extracting = commands.add_parser("extract", help="take the projector out of a whole model")
    extracting.add_argument("source", help="a folder in any layout")
    extracting.add_argument("out", help="a .bin or .safetensors file, or a folder")
    for writing in (converting, differing):
        writing.add_argument("--max_shard_size", type=command.file_size, default="5GB", help="like 5GB or 200MB")
    for writing in (converting, differing, extracting):
        writing.add_switch("--overwrite_output_dir", help="write to a folder, or over a file, that is there already")
    args = parser.parse_args()
    if args.command == "inspect":
        report = inspection.inspect(args.path)
        print(json.dumps(report, indent=2) if args.json else inspection.describe(report, args.tensors))
    elif args.command == "convert":
        convert(args.source, args.out, args.to, args.max_shard_size, args.overwrite_output_dir)
    elif args.command == "extract":
        extract(args.source, args.out, args.overwrite_output_dir)
    elif args.what == "apply":
        delta.apply(args.base, args.delta, args.target, args.max_shard_size, args.overwrite_output_dir)
    else:
        delta.make(args.base, args.target, args.delta, args.max_shard_size, args.overwrite_output_dir)


if __name__ == "__main__":
    command.run(main)
