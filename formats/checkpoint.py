"""What a folder of weights is: its tensors under our names, and which kind of checkpoint they make.

The folder's name says nothing here (the original goes by it, LLAVA.md 6.9); what its files hold decides: LAYOUTS. Only
tables of contents are read: tensors stay in their files until someone asks for one (formats/files.py).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from formats import bitsandbytes, files, hub, layouts
from formats.files import ADAPTER_FILES, PROJECTOR_FILES, TRAINED_BESIDE, WEIGHT_FILES
from formats.vocabulary import EMBEDDING, HEAD

LAYOUTS = {
    "llama": "a language model", "gguf": "a language model in one file", "clip": "a vision tower",
    "projector": "a projector",  # what stage 1 trains, perhaps with the embeddings of <im_start> and <im_end>
    "lora": "a LoRA adapter",  # PEFT's, with the projector that was trained beside it (non_lora_trainables.bin)
    "delta": "differences to a LLaMA's weights",  # LLaVA 0.x as it was published
    "llava": "a LLaVA in the original's layout", "llava-hf": "a LLaVA in transformers' layout",
    "llava_next": "a LLaVA 1.6 in transformers' layout",
}
FLOATS = ("float64", "float32", "bfloat16", "float16")
NORM = "language_model.model.norm.weight"  # (D,)


@dataclass
class Adapter:
    """A LoRA as PEFT saves it: W + lora_alpha / r * lora_B @ lora_A for each module that it names (Hu et al. 2021).
    base: the model that it was trained on, as its config names it, or None; modules: {our name of the weight:
    {"lora_A": (r, in), "lora_B": (out, r)}}, LazyTensors; config: adapter_config.json, for all else."""

    base: str
    r: int
    lora_alpha: float
    modules: dict
    config: dict


@dataclass
class Checkpoint:
    """A folder's or file's content. config: config.json or {}; tensors: {our name: LazyTensor}; unused: a word each."""

    path: Path
    config: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    unused: list = field(default_factory=list)
    adapter: Adapter = None

    def part(self, prefix):
        """The tensors of one part: 'language_model', 'mm_projector' or 'vision_tower'."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix + ".")}

    def add(self, tensors):
        """Take in {name in a file: LazyTensor}; ValueError for what is in no layout, comes twice, or is no float."""
        for name, tensor in tensors.items():
            ours, kind = layouts.our_name(name), str(tensor.dtype).removeprefix("torch.")
            if what := layouts.unused(name):
                self.unused.append(what)
                continue
            problems = (
                *(why for pattern, why in layouts.REFUSED.items() if re.fullmatch(pattern, name)),
                ours is None and "is in no known layout (LLaMA, CLIP, LLaVA, llava-hf)",
                ours in self.tensors and "comes a second time, under this or another name",
                kind not in FLOATS and f"is {kind}; expected float32, bfloat16 or float16; if it was quantised, load "
                "the model that it was made from")
            if any(problems):
                raise ValueError(f"{tensor.file}: tensor {name!r} {next(filter(None, problems))}")
            self.tensors[ours] = tensor

    @property
    def layout(self):
        """Which kind of checkpoint this is, a key of LAYOUTS."""
        if self.adapter:
            return "lora"
        if not any(name.startswith("language_model.model.layers.") for name in self.tensors):
            return "clip" if self.part("vision_tower") and not self.part("mm_projector") else "projector"
        # A trained RMSNorm scales by numbers near 1; the difference of two of them is a few hundredths at most.
        if NORM in self.tensors and self.tensors[NORM].read().float().abs().mean() < 0.1:
            return "delta"
        if "text_config" in self.config:
            return "llava_next" if self.config.get("model_type") == "llava_next" else "llava-hf"
        return "llava" if self.part("mm_projector") or self.config.get("mm_projector_type") else "llama"


def open_checkpoint(path_or_hub_id):
    """A local folder, a weight file, or a Hugging Face id -> Checkpoint."""
    path = Path(path_or_hub_id)
    single = path.suffix in (".bin", ".safetensors") and not path.is_dir()
    path = path if single else hub.find_folder(path_or_hub_id)
    folder = path.parent if single else path
    adapted = not single and (folder / "adapter_config.json").exists()
    there = {file.name for file in folder.iterdir()}
    if not single and not adapted and there & {*ADAPTER_FILES} and not there & {*WEIGHT_FILES}:
        raise ValueError(f"{folder} holds an adapter, and adapter_config.json is missing; copy it again")
    bare = single or adapted or there & {*PROJECTOR_FILES}
    config = files.read_json(folder / "config.json", missing={} if bare else None)
    quantised = config.get("quantization_config", {"quant_method": "bitsandbytes"}).get("quant_method", "unknown")
    if quantised != "bitsandbytes":
        raise ValueError(f"{folder} is quantised ({quantised}); only bitsandbytes is known: load the model that it was "
                         "made from")
    checkpoint = Checkpoint(path, config)
    checkpoint.add(bitsandbytes.fold(files.open_weights(path)))
    if adapted:
        add_adapter(checkpoint)
    elif not single and not checkpoint.part("mm_projector"):  # the original keeps a projector apart
        checkpoint.add(files.open_weights(folder, PROJECTOR_FILES))
    if not checkpoint.tensors and not adapted:
        raise ValueError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES + PROJECTOR_FILES)}")
    return checkpoint


def add_adapter(checkpoint):
    """Take in an adapter and what was trained beside it (LLAVA.md 6.7). ValueError: it is no LoRA, or half of one."""
    folder = checkpoint.path
    config = files.read_json(folder / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config['peft_type']}; only LoRA is supported")
    tensors, modules, others = files.open_weights(folder, ADAPTER_FILES), {}, {}
    if not tensors:
        raise ValueError(f"{folder} has an adapter_config.json and no {' or '.join(ADAPTER_FILES)}; copy it again")
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        ours = match and layouts.our_name(match[1] + ".weight")
        if match and not ours:
            raise ValueError(f"{tensor.file}: tensor {name!r} adapts a module that no known layout has")
        if ours in (EMBEDDING, HEAD) or not match and re.search(r"\.(?:lora_|base_layer.w|token_adapter)", name):
            raise ValueError(f"{tensor.file}: tensor {name!r} is not supported; plain LoRA of the layers' linears is")
        if match:
            modules.setdefault(ours, {})[match[2]] = tensor
        else:
            others[name.replace(".base_layer.bias", ".bias")] = tensor
    listed, found = config.get("target_modules"), {name.partition(".lora_")[0] for name in tensors}
    listed = listed if isinstance(listed, list) else []  # else a pattern, or `all-linear`
    if lost := [name for name in listed if "." in name and not any(module.endswith(f".{name}") for module in found)]:
        raise ValueError(f"{folder}: adapter_config.json names {files.list_names(lost)}, the weights do not; copy both")
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise ValueError(f"{folder}/adapter_config.json: base_model_name_or_path {base!r} is no name of a model")
    for name, pair in modules.items():
        if len(pair) < 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(pair.items()))
            raise ValueError(f"{folder}: the adapter of {name} is {shapes}; expected lora_A (r, in), lora_B (out, r)")
    checkpoint.add(others)
    checkpoint.add(files.open_weights(folder, TRAINED_BESIDE))
    checkpoint.adapter = Adapter(base, config.get("r"), config.get("lora_alpha"), modules, config)
