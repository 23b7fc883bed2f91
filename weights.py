"""Weights: folders of public checkpoints -> a model that runs, and back.

A folder is read in three steps. Its files are mapped into memory, which costs nothing until a number is used. Every
tensor gets our name for it (formats/layouts.py). The model is built without memory (torch's meta device) and each of
its parameters takes the tensor of its name, cast to the wanted dtype one at a time. The account is strict: each tensor
is used once, each parameter filled once, all shapes agree; otherwise loading stops and says which do not.

The three parts may come from three places: a language model, a CLIP folder (`vision_tower`), a projector
(`pretrain_mm_mlp_adapter`); that is how LLaVA is first put together. Saving writes llava-hf's layout, which
transformers and vLLM load as it is, or the original's where llava-hf has no words for the projector.

    python weights.py inspect PATH [--json]
    python weights.py convert SRC OUT [--to llava-hf|llava]
"""

import json
import os
import re
import shutil
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from formats import command, layouts, processor, templates
from model import Llava, LlavaConfig
from projector import build_projector
from tokenizer import Tokenizer
from vision import ImageProcessor

WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors",  # the first that exists is read
                "pytorch_model.bin.index.json", "pytorch_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
SHARD_BYTES = 5e9  # of one file that we write
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"  # (V, D)


# ---------------------------------------------------------------------------------------------------- files -> tensors


def read_tensors(path):
    """One .safetensors or .bin file -> {name: CPU tensor}, mapped into memory: nothing is read before it is used.

    The mapping is private: writing to a tensor never writes to the file. Pickles are read with weights_only=True.
    """
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 are no zip archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download or copy the folder again") from None
    except Exception as error:  # SafetensorError, UnpicklingError, EOFError, RuntimeError: all mean a file to replace
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or no weight file ({reason}); copy it again") from None


def read_json(path):
    """A JSON file -> dict; ValueError names the file if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a model folder with a config.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


@dataclass
class Checkpoint:
    """What one folder (or projector file) holds.

    config: config.json or {}; tensors: {our name: memory-mapped tensor}; unused: what else there is, a word per tensor.
    """

    path: Path
    config: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    unused: list = field(default_factory=list)

    def part(self, prefix):
        """The tensors of one part: 'language_model', 'mm_projector' or 'vision_tower'."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix + ".")}

    def add(self, file):
        """Take in the tensors of one weight file."""
        for name, tensor in read_tensors(file).items():
            ours = layouts.our_name(name)
            if what := layouts.unused(name):
                self.unused.append(what)
            elif ours is None:
                raise ValueError(f"{file}: tensor {name!r} is in no known layout (LLaMA, CLIP, LLaVA, llava-hf)")
            elif ours in self.tensors:
                raise ValueError(f"{file}: tensor {name!r} comes a second time, under this or another name")
            else:
                self.tensors[ours] = tensor


def open_checkpoint(path_or_hub_id):
    """A local folder or a Hugging Face id -> Checkpoint, shards together; .safetensors go before .bin."""
    folder = find_folder(path_or_hub_id)
    checkpoint = Checkpoint(folder, read_json(folder / "config.json"))
    name = next((name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if name is None:
        files = []
    elif name.endswith(".index.json"):
        files = sorted(set(read_json(folder / name)["weight_map"].values()))
    else:
        files = [name]
    for file in files:
        checkpoint.add(folder / file)
    if not checkpoint.part("mm_projector"):  # the original keeps a projector apart, and old ones are in no shard
        for file in PROJECTOR_FILES:
            if (folder / file).exists():
                checkpoint.add(folder / file)
                break
    if not checkpoint.tensors:
        raise ValueError(f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES + PROJECTOR_FILES)}")
    return checkpoint


def find_folder(path_or_hub_id):
    """A local folder as it is; otherwise the files of a Hugging Face id, downloaded once into its cache."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; expected the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_hub_id)):
        raise ValueError(f"{folder} does not exist; expected a model folder or a Hugging Face id like owner/name")
    from huggingface_hub import snapshot_download
    try:
        small = ["*.json", "*.jinja", "tokenizer.model"]
        folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=[*small, "*.bin"]))
        return folder
    except Exception as error:  # no network, no such repository, no access: huggingface_hub has a class for each
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_hub_id} is no folder here, and no download from Hugging Face: {reason}") from None


# ------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """A model with all that goes with it.

    tokenizer and image_processor are None where the folder has none; tower: name or path of the vision tower; spare:
    tower tensors that the model does not need but a saved folder does; new_projector: True if it is untrained.
    """

    model: Llava
    tokenizer: Tokenizer
    image_processor: ImageProcessor
    config: LlavaConfig
    conv_mode: str
    tower: str = None
    spare: dict = field(default_factory=dict)
    new_projector: bool = False


def pick_device(device="auto"):
    """'auto' -> CUDA, Apple's MPS or the CPU, the first there is."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


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
         pretrain_mm_mlp_adapter=None, mm_projector_type=None, projector_seed=None, **settings):
    """Load a model -> Loaded. What was found, and what was left out, is said in a line or two on stderr.

    path_or_hub_id: a folder in any layout of formats/layouts.py, or a Hugging Face id. dtype: auto, a name, a
    torch.dtype, or `stored`. model_base: the language model of a folder that holds only a projector. vision_tower: a
    CLIP folder or id that takes the place of the folder's own. pretrain_mm_mlp_adapter: mm_projector.bin, a
    .safetensors, or a folder with one. A new projector is made only where none is found and `mm_projector_type` or
    `projector_seed` asks for one. settings: fields of LlavaConfig (conv_mode, …) that go before the checkpoint's; None
    is not given.
    ValueError for everything that does not fit.
    """
    if bits != 16:
        raise ValueError(f"--bits {bits} is not supported yet; use 16")
    given = open_checkpoint(path_or_hub_id)
    language = find_language_model(given, model_base)
    config = layouts.read_config(language.config, language.tensors, language.path)
    if given is not language and given.config:
        config = replace(layouts.read_config(given.config, given.tensors, given.path), text=config.text)
    config = replace(config, **{key: value for key, value in settings.items() if value is not None})
    tower, tower_name, config.vision = find_tower(given, config, vision_tower)
    adapter, projector = find_projector(given, config, pretrain_mm_mlp_adapter, mm_projector_type)
    new_projector = config.vision is not None and adapter is None
    if new_projector:
        projector, config.mm_projector_type = new_mm_projector(given, config, mm_projector_type, projector_seed)

    device = pick_device(device)
    dtype = language.tensors[EMBEDDING].dtype if dtype == "stored" else pick_dtype(dtype, device)
    with torch.device("meta"):
        model = Llava(config)
    tensors = {**language.part("language_model"), **projector, **(tower.part("vision_tower") if tower else {})}
    for name in (EMBEDDING, HEAD):
        if "unpadded_vocab_size" in language.config and name in tensors:
            tensors[name] = tensors[name][: config.text.vocab_size]
    spare = take_spare(model, tensors)
    fill(model, tensors, dtype, device, path_or_hub_id)

    tokenizer = find_tokenizer(language.path)
    loaded = Loaded(
        model, tokenizer, tower and find_image_processor(tower.path, config), config,
        templates.resolve_conv_mode(config, tokenizer), tower=tower_name,
        spare={name: tensor for name, tensor in spare.items() if name != HEAD}, new_projector=new_projector)
    unused = count_unused({"language_model": language, "vision_tower": tower, "mm_projector": adapter}, given, spare)
    say(f"{path_or_hub_id}: {describe(loaded)}; template {loaded.conv_mode}")
    if unused:
        say("  not needed and left out: " + ", ".join(f"{what} ({count} tensors)" for what, count in unused.items()))
    return loaded


def find_language_model(given, model_base):
    """The checkpoint that holds the LLM: `given` itself, or model_base where `given` is a projector alone."""
    if any(name.startswith("language_model.model.layers.") for name in given.tensors):
        if model_base:
            raise ValueError(f"{given.path} is a whole model; --model_base goes with a folder that is only a projector")
        return given
    if given.part("vision_tower"):
        raise ValueError(f"{given.path} is a vision tower without a language model; give it as --vision_tower")
    if not model_base:
        raise ValueError(f"{given.path} holds only a projector; name its language model with --model_base")
    return find_language_model(open_checkpoint(model_base), None)


def find_tower(given, config, vision_tower):
    """-> (Checkpoint with the tower's tensors, its name, ClipVisionConfig), all None for a language model alone.

    As the original does, a folder's own tower counts less than the CLIP folder that its config names, unless it was
    trained (`unfreeze_mm_vision_tower`, or llava-hf's layout); where that folder is not here, its own is taken.
    """
    own = given.part("vision_tower")
    named = given.config.get("mm_vision_tower")
    trained = "text_config" in given.config or given.config.get("unfreeze_mm_vision_tower")
    if vision_tower is None and own and (trained or not named or not Path(named).is_dir()):
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        return given, named or str(given.path), config.vision or layouts.vision_config_of_shapes(shapes)
    if vision_tower is None and not given.part("mm_projector") and given.config.get("mm_projector_type") != "identity":
        return None, None, None
    name = vision_tower or named
    if name is None:
        raise ValueError(f"{given.path} has a projector but names no vision tower; name one with --vision_tower")
    tower = open_checkpoint(name)
    vision = layouts.read_vision_config(tower.config, tower.path)
    before = config.vision
    if before is None and vision_tower and named and Path(named).is_dir():
        before = layouts.read_vision_config(read_json(Path(named) / "config.json"), named)
    if before and before.num_patches != vision.num_patches:
        say(f"WARNING: {given.path} knows pictures of {before.image_size} pixels, {before.num_patches} tokens each; "
            f"the vision tower {name} takes {vision.image_size} pixels, {vision.num_patches} tokens each")
    return tower, str(name), vision


def find_projector(given, config, adapter, kind):
    """-> (Checkpoint that the projector comes from, or None; {our name: tensor}). Sets config.mm_projector_type.

    The type follows from the tensors' names; ValueError if `kind`, the config or the widths on both sides disagree.
    """
    source = given if adapter is None else open_projector(adapter)
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
        raise ValueError(f"{source.path} holds a projector of type {found}, not {says}; correct --mm_projector_type")
    config.mm_projector_type = found
    shapes = [tensors[name].shape for name in sorted(tensors) if name.endswith("weight")]
    widths = (shapes[0][1], shapes[-1][0]) if shapes else (config.vision.hidden_size, config.vision.hidden_size)
    for width, wanted, what in ((widths[0], config.vision.hidden_size, "the vision tower's"),
                                (widths[1], config.text.hidden_size, "the language model's")):
        if width != wanted:
            raise ValueError(f"the projector of {source.path} maps width {widths[0]} to {widths[1]}, but {what} width "
                             f"is {wanted}; use parts that belong together")
    return source, tensors


def open_projector(path):
    """mm_projector.bin, a .safetensors file, or a folder (or Hugging Face id) with one -> Checkpoint."""
    path = Path(path)
    if path.suffix not in (".bin", ".safetensors") or path.is_dir():
        return open_checkpoint(path)
    config = path.with_name("config.json")
    checkpoint = Checkpoint(path, read_json(config) if config.exists() else {})
    checkpoint.add(path)
    return checkpoint


def new_mm_projector(given, config, kind, seed):
    """An untrained projector with torch's own initialisation, as the original's -> ({our name: tensor}, its type)."""
    if kind is None and seed is None:
        raise ValueError(f"{given.path} has no projector; give one with --pretrain_mm_mlp_adapter, or train one")
    kind = kind or "linear"
    with torch.random.fork_rng(devices=[]):
        torch.seed() if seed is None else torch.manual_seed(seed)
        module = build_projector(kind, config.vision.hidden_size, config.text.hidden_size)
    say(f"{given.path} has no projector: a new {kind} one is made, untrained, from seed {seed}")
    return {f"mm_projector.{name}": tensor for name, tensor in module.state_dict().items()}, kind


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
    """Give every parameter of a model on the meta device its tensor: each used once, each filled once, shapes equal."""
    parameters = dict(model.named_parameters())
    complaints = [f"{name} is missing" for name in sorted(parameters.keys() - tensors.keys())]
    complaints += [f"{name} has no place in this model" for name in sorted(tensors.keys() - parameters.keys())]
    complaints += [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameters[name].shape)}"
                   for name in parameters if name in tensors and tensors[name].shape != parameters[name].shape]
    if complaints:
        more = f" and {len(complaints) - 12} more" if len(complaints) > 12 else ""
        raise ValueError(f"{where}: config.json and weights do not agree: {'; '.join(complaints[:12])}{more}")
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensors[name].to(device, dtype)))
    if model.config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def find_tokenizer(folder):
    """The folder's Tokenizer, None if it has no tokenizer files at all."""
    names = ("tokenizer.json", "tokenizer.model")
    return Tokenizer.from_folder(folder) if any((folder / name).exists() for name in names) else None


def find_image_processor(folder, config):
    """The tower's ImageProcessor, from preprocessor_config.json or (transformers 5) inside processor_config.json."""
    side, values = config.vision.image_size, {}
    if (folder / "preprocessor_config.json").exists():
        values = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        values = read_json(folder / "processor_config.json").get("image_processor", {})
    processor = ImageProcessor.from_dict(values or {"size": side})
    if processor.crop_size != side:
        say(f"WARNING: {folder} makes pictures of {processor.crop_size} pixels, its tower takes {side}: {side} it is")
        processor = replace(processor, crop_size=side, shortest_edge=side)
    return processor


def count_unused(sources, given, spare):
    """-> {what: number of tensors} that the files hold and the model does not: known kinds and replaced parts."""
    checkpoints = {id(checkpoint): checkpoint for checkpoint in (given, *sources.values()) if checkpoint}.values()
    counts = Counter(what for checkpoint in checkpoints for what in checkpoint.unused)
    for name in spare:
        counts["the tied head" if name == HEAD else "tower layers behind the selected one"] += 1
    for checkpoint in checkpoints:
        for part, source in sources.items():
            if source is not checkpoint and checkpoint.part(part):
                counts[f"{part} of {checkpoint.path}"] = len(checkpoint.part(part))
    return counts


def describe(loaded):
    """One line: parameters by part, dtype, device, tokens per picture."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in loaded.model.named_children()}
    weight = loaded.model.language_model.model.embed_tokens.weight
    sizes = ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in parts.items())
    tokens = f", {loaded.config.image_tokens} tokens per picture" if loaded.config.vision else ""
    return f"{sizes} parameters, {str(weight.dtype).removeprefix('torch.')} on {weight.device}{tokens}"


def say(text):
    """Tell the user, once: on stderr, so that stdout stays free for answers and JSON; from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- saving


def save(loaded, folder, layout="auto", tensors=None, dtype=None):
    """Write a folder that `load`, transformers and vLLM read as it is.

    layout: llava-hf, llava (the original's) or auto: llava-hf if it has words for the projector. A language model alone
    is written as a plain LLaMA. tensors: {our name: tensor} instead of the model's own (gathered from many ranks);
    dtype: cast to it. Tower tensors that the model left out are copied. Nothing is left half written.
    """
    config = replace(loaded.config, conv_mode=loaded.conv_mode)
    layout = pick_layout(config, layout)
    tensors = dict(loaded.model.state_dict() if tensors is None else tensors)
    if config.text.tie_word_embeddings:
        tensors.pop(HEAD, None)
    stored = dtype or tensors[EMBEDDING].dtype
    tensors |= {name: tensor.to(stored) for name, tensor in loaded.spare.items()}
    tensors = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    stored = str(stored).removeprefix("torch.")

    copied = loaded.tokenizer.folder_files if loaded.tokenizer else {}
    files = {name: path.read_bytes() for name, path in copied.items()}
    ids = {key: getattr(config.text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files["generation_config.json"] = {key: value for key, value in ids.items() if value is not None}
    if config.vision is None:
        files["config.json"] = layouts.llama_config(config, stored)
    else:
        files["preprocessor_config.json"] = processor.preprocessor_config(loaded.image_processor, config)
    if layout == "llava-hf":
        image_token_id, rows = make_room_for_image_token(files, tensors, loaded.tokenizer)
        files["config.json"] = layouts.llava_hf_config(config, loaded.tower, stored, image_token_id, rows)
        files["processor_config.json"] = processor.processor_config(config)
        if template := processor.chat_template(config.conv_mode, loaded.tokenizer):
            files["chat_template.jinja"] = template.encode()
    elif config.vision is not None:
        rows = processor.remove_image_token(files) or config.text.vocab_size
        for name in {EMBEDDING, HEAD} & tensors.keys():
            tensors[name] = tensors[name][:rows]
        config = replace(config, text=replace(config.text, vocab_size=rows))
        files["config.json"] = layouts.llava_config(config, loaded.tower, stored) | {"unfreeze_mm_vision_tower": True}
    with whole_folder(folder) as temporary:
        write_shards(temporary, {layouts.file_name(name, layout): tensor for name, tensor in tensors.items()})
        write_files(temporary, files)
    say(f"written to {folder}: {'plain LLaMA' if config.vision is None else layout} layout, {stored}")


def make_room_for_image_token(files, tensors, tokenizer):
    """llava-hf looks `<image>` up before it puts the features there: give it an id and the vocabulary a row for it.

    Changes files and tensors in place -> (id of `<image>`, rows). Rows are added up to a multiple of 64, as published,
    all the mean of the others, so that none ever scores best; generation_config.json suppresses them besides.
    """
    vocabulary = len(tensors[EMBEDDING])
    image_token_id = processor.add_image_token(files, len(tokenizer) if tokenizer else vocabulary)
    if image_token_id < vocabulary:
        return image_token_id, vocabulary
    rows = -(-(image_token_id + 1) // 64) * 64
    for name in {EMBEDDING, HEAD} & tensors.keys():
        weight = tensors[name]
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        tensors[name] = torch.cat([weight, mean.expand(rows - vocabulary, -1)])  # (rows, D)
    files["generation_config.json"]["suppress_tokens"] = list(range(vocabulary, rows))
    return image_token_id, rows


def save_projector(loaded, folder, tensors=None):
    """Write what stage 1 learned as the original does: mm_projector.bin (`model.mm_projector.*`) and config.json.

    tensors: as in `save`. (LLAVA.md 6.8.)
    """
    tensors = loaded.model.state_dict() if tensors is None else tensors
    kind = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    config = layouts.llava_config(replace(loaded.config, conv_mode=loaded.conv_mode), loaded.tower, kind)
    with whole_folder(folder) as temporary:
        torch.save({f"model.{name}": tensor.detach().cpu().clone() for name, tensor in tensors.items()
                    if name.startswith("mm_projector.")}, temporary / "mm_projector.bin")
        write_files(temporary, {"config.json": config | {"tune_mm_mlp_adapter": True}})


def pick_layout(config, layout):
    """'auto' -> llava-hf, or llava where llava-hf has no words for the projector, which is said."""
    if layout not in ("auto", "llava-hf", "llava"):
        raise ValueError(f"layout {layout!r} is not known; use auto, llava-hf or llava")
    if config.vision is None:
        if layout != "auto":
            raise ValueError(f"a language model without a vision tower has no {layout} layout; leave --to out")
        return "llava"  # its names without projector and tower are LLaMA's
    if config.mm_projector_type == "mlp2x_gelu":
        return "llava-hf" if layout == "auto" else layout
    if layout == "llava-hf":
        raise ValueError(f"llava-hf has no words for a projector of type {config.mm_projector_type}, only for "
                         "mlp2x_gelu; write the original's layout (--to llava)")
    if layout == "auto":
        say(f"llava-hf has no words for a {config.mm_projector_type} projector; written is the original's layout")
    return "llava"


@contextmanager
def whole_folder(folder):
    """A temporary folder beside `folder` whose files move into it only when the block has ended without an error.

    Weight files that stand there from before and are not replaced would be read first, or half; they go.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        new = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")  # config.json comes last
        if any(file.suffix == ".safetensors" for file in new):
            for file in folder.glob("model*.safetensors*"):
                file.unlink()
        for file in new:
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(temporary)


def write_shards(folder, tensors):
    """model.safetensors, or from SHARD_BYTES on several files and their index."""
    shards, room = [{}], SHARD_BYTES
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor.cpu().contiguous()
        room -= tensor.nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it 0600
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_files(folder, {"model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": index}})


def write_files(folder, files):
    """{name: bytes, or what becomes JSON} -> files."""
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(content)


# -------------------------------------------------------------------------------------------------------- command line


def inspect(path):
    """What a folder holds -> dict for JSON: layout, parts (tensors, parameters, bytes, dtypes), config, template."""
    checkpoint = open_checkpoint(path)
    kind, parts = checkpoint.config.get("model_type"), {}
    for name in ("vision_tower", "mm_projector", "language_model"):
        if tensors := checkpoint.part(name).values():
            parts[name] = {"tensors": len(tensors), "parameters": sum(t.numel() for t in tensors),
                           "bytes": sum(t.nbytes for t in tensors),
                           "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors})}
    report = {"path": str(checkpoint.path), "layout": "clip", "parts": parts, "not_needed": Counter(checkpoint.unused)}
    if kind in layouts.CLIP_FAMILY:
        vision = layouts.read_vision_config(checkpoint.config, path)
        return report | {"image_tokens": vision.num_patches, "config": {"vision": asdict(vision)}}
    config = layouts.read_config(checkpoint.config, checkpoint.tensors, path)
    plain = "llava" if "mm_projector" in parts else "llama"
    report["layout"] = "llava-hf" if "text_config" in checkpoint.config else plain
    return report | {"image_tokens": config.image_tokens, "config": asdict(config),
                     "conv_mode": templates.resolve_conv_mode(config, find_tokenizer(checkpoint.path))}


def convert(source, out, layout="auto"):
    """Any folder that `load` reads, or a GGUF LLaMA -> a folder in a public layout; tensors keep their dtype."""
    if Path(source).suffix != ".gguf":
        return save(load(source, dtype="stored", device="cpu"), out, layout)
    if layout != "auto":
        raise ValueError(f"{source} is a language model; it becomes a plain LLaMA folder, leave --to out")
    from formats import gguf_llama
    tensors, files = gguf_llama.read(source)
    with whole_folder(out) as temporary:
        write_shards(temporary, tensors)
        write_files(temporary, files)
    say(f"written to {out}: plain LLaMA layout, {sum(t.numel() for t in tensors.values()) / 1e6:,.2f} M parameters")


def main():
    """The command line at the head of this file."""
    parser = command.Parser(prog="python weights.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("path")
    inspecting.add_switch("--json", help="as one JSON object")
    converting = commands.add_parser("convert", help="write a folder, or a GGUF LLaMA, in another layout")
    converting.add_argument("source")
    converting.add_argument("out")
    converting.add_argument("--to", default="auto", choices=("auto", "llava-hf", "llava"))
    args = parser.parse_args()
    if args.command == "convert":
        return convert(args.source, args.out, args.to)
    report = inspect(args.path)
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['path']}: {report['layout']} layout")
    for name, part in report["parts"].items():
        print(f"  {name:15s} {part['tensors']:5d} tensors {part['parameters'] / 1e6:10,.2f} M parameters "
              f"{part['bytes'] / 1e6:10,.1f} MB  {', '.join(part['dtypes'])}")
    for what, count in report["not_needed"].items():
        print(f"  {what:15s} {count:5d} tensors, not needed")
    print(f"  {report['image_tokens']} tokens per picture, template {report.get('conv_mode', 'none')}")


if __name__ == "__main__":
    command.run(main)
