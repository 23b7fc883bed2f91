"""What a folder of weights is: its tensors under our names, and which kind of checkpoint they make.

The folder's name says nothing here (the original goes by it, LLAVA.md 6.9); what its files hold decides:

    llama        a language model alone                        lora        PEFT's adapter, with the projector that was
    llava        LLM and projector, the original's layout                  trained beside it (non_lora_trainables.bin)
    llava-hf     the same, transformers' layout                delta       LLaVA 0.x: differences to LLaMA's weights
    llava_next   LLaVA 1.6, transformers' layout               clip        a vision tower, with or without CLIP's rest
    projector    what stage 1 trains, perhaps with the embeddings of <im_start> and <im_end>

Only tables of contents are read: tensors stay in their files until someone asks for one (formats/files.py).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from formats import files, hub, layouts

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_BESIDE = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
NORM = "language_model.model.norm.weight"  # (D,)


@dataclass
class Adapter:
    """A LoRA as PEFT saves it: W + lora_alpha / r * lora_B @ lora_A for each module that it names (Hu et al. 2021).

    base: the model that it was trained on, as its config names it, or None; modules: {our name of the weight:
    {"lora_A": (r, in), "lora_B": (out, r)}}, LazyTensors; config: adapter_config.json, for all else.
    """

    base: str
    r: int
    lora_alpha: float
    modules: dict
    config: dict


@dataclass
class Checkpoint:
    """What one folder, or one weight file, holds.

    config: config.json or {}; tensors: {our name: LazyTensor}; unused: what else there is, a word per tensor.
    """

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
            ours = layouts.our_name(name)
            if what := layouts.unused(name):
                self.unused.append(what)
            elif why := layouts.refused(name):
                raise ValueError(f"{tensor.file}: tensor {name!r} {why}")
            elif ours is None:
                raise ValueError(f"{tensor.file}: tensor {name!r} is in no known layout (LLaMA, CLIP, LLaVA, llava-hf)")
            elif ours in self.tensors:
                raise ValueError(f"{tensor.file}: tensor {name!r} comes a second time, under this or another name")
            elif not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{tensor.file}: tensor {name!r} is {kind}; expected float32, bfloat16 or float16; if "
                                 "it was quantised, load the model that it was made from")
            else:
                self.tensors[ours] = tensor

    @property
    def layout(self):
        """Which kind of checkpoint this is, a word of the list at the head of this file."""
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
    needed = not single and not adapted and not any((folder / file).exists() for file in PROJECTOR_FILES)
    config = files.read_json(folder / "config.json") if needed or (folder / "config.json").exists() else {}
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "in an unknown way")
        raise ValueError(f"{folder} is quantised ({method}); load the model that it was made from")
    checkpoint = Checkpoint(path, config)
    checkpoint.add(files.open_weights(path))
    if adapted:
        add_adapter(checkpoint)
    elif not single and not checkpoint.part("mm_projector"):  # the original keeps a projector apart
        checkpoint.add(open_first(folder, PROJECTOR_FILES) or {})
    if not checkpoint.tensors and not adapted:
        raise ValueError(f"{path} holds no weights; expected one of {', '.join(files.WEIGHT_FILES + PROJECTOR_FILES)}")
    return checkpoint


def open_first(folder, names):
    """The tensors of the first of these files that the folder has; None if it has none of them."""
    file = next((folder / name for name in names if (folder / name).exists()), None)
    return file and files.open_file(file)


def add_adapter(checkpoint):
    """Read adapter_config.json and adapter_model.*, and take in what was trained beside the adapter. (LLAVA.md 6.7)

    ValueError for adapters of other kinds than LoRA and for halves without the other.
    """
    folder = checkpoint.path
    config = files.read_json(folder / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config['peft_type']}; only LoRA is supported")
    tensors, modules, others = open_first(folder, ADAPTER_FILES), {}, {}
    if tensors is None:
        raise ValueError(f"{folder} has an adapter_config.json and no {' or '.join(ADAPTER_FILES)}; copy it again")
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        ours = match and layouts.our_name(match[1] + ".weight")
        if match and not ours:
            raise ValueError(f"{tensor.file}: tensor {name!r} adapts a module that no known layout has")
        if match:
            modules.setdefault(ours, {})[match[2]] = tensor
        else:
            others[name] = tensor
    for name, pair in modules.items():
        if len(pair) < 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(pair.items()))
            raise ValueError(f"{folder}: the adapter of {name} is {shapes}; expected lora_A (r, in), lora_B (out, r)")
    checkpoint.add(others)
    checkpoint.add(open_first(folder, TRAINED_BESIDE) or {})
    checkpoint.adapter = Adapter(
        config.get("base_model_name_or_path"), config.get("r"), config.get("lora_alpha"), modules, config)
