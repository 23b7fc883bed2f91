"""Delta weights: LLaVA 0.x as it was published, the difference to a LLaMA that one had to bring along.

    apply   target = delta + base        make   delta = target - base

both in float16, tensor by tensor, as the original computes them (LLAVA.md 6.6). What LLaVA adds to its language model
is in the delta as it is: the projector, and the rows of the embeddings and of the head behind the base's last. Nothing
is held whole: a tensor of each side is read, added and written before the next one. `make` writes a checksum of the
base into the delta's config.json, so that `apply` can tell another LLaMA of the same shapes.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch

from formats import files, layouts
from formats.checkpoint import open_checkpoint
from formats.command import Progress, say
from formats.vocabulary import EMBEDDING, HEAD

CHECKSUM = "delta_base_sha256"  # key of the delta's config.json


def apply(base, delta, target, max_shard_size=files.SHARD_BYTES, overwrite=False):
    """base and delta -> a LLaVA in the original's layout, float16, with the delta's tokenizer. Folders or hub ids.
    ValueError: not the base that the delta was made from (shapes, names, checksum), or what files.new_folder says."""
    base, delta = open_checkpoint(base), open_checkpoint(delta)
    config = dict(delta.config)
    wanted = config.pop(CHECKSUM, None)
    if "mm_projector.weight" in delta.tensors and config.get("model_type") == "llama":  # LLaVA's name for itself
        config |= {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}  # came later
    tensors = combine(base, delta, 1)
    if wanted and wanted != checksum(base):
        raise ValueError(f"{base.path} has the shapes of the base that {delta.path} was made from, but other numbers; "
                         "give --base the folder that it was made from")
    write(target, tensors, config, delta.path, max_shard_size, overwrite)


def make(base, delta, target, max_shard_size=files.SHARD_BYTES, overwrite=False):
    """The reverse: base and target -> a folder that `apply` turns into target again, up to float16's rounding."""
    base, target = open_checkpoint(base), open_checkpoint(target)
    if "text_config" in target.config:
        raise ValueError(f"{target.path} is in llava-hf's layout, and deltas are in the original's; first write it so: "
                         f"python weights.py convert {target.path} OUT --to llava")
    tensors = combine(base, target, -1)
    write(delta, tensors, target.config | {CHECKSUM: checksum(base)}, target.path, max_shard_size, overwrite)


def combine(base, other, sign):
    """{our name: LazyTensor}: other + sign * base, or other alone. ValueError: they do not belong together."""
    ours, theirs = base.part("language_model"), other.part("language_model")
    for one, two, names in ((base, other, ours.keys() - theirs), (other, base, theirs.keys() - ours)):
        if names:
            raise ValueError(f"{one.path} does not belong to {two.path}, it alone has {files.list_names(names)}; "
                             "use the LLaMA that the delta was made from")
    wrong = []
    for name, tensor in theirs.items():
        a, b = ours[name].shape, tensor.shape
        if a[1:] != b[1:] or (a > b if name in (EMBEDDING, HEAD) else a != b):  # these two may have more rows
            wrong.append(f"{name} {tuple(a)} and {tuple(b)}")
    if wrong:
        raise ValueError(f"{base.path} and {other.path} do not belong together, their shapes differ: "
                         f"{files.list_names(wrong)}; use the LLaMA that the delta was made from")

    def combined(name):
        result = other.tensors[name].read().to(torch.float16, copy=True)
        if name in ours:
            result[: ours[name].shape[0]] += sign * ours[name].read().to(torch.float16)
        return result

    return {name: files.LazyTensor(tensor.shape, torch.float16, tensor.file, partial(combined, name))
            for name, tensor in other.tensors.items()}


def checksum(base):
    """SHA-256 over a language model's names, shapes and float16 numbers, whatever files and layout they stand in."""
    digest = hashlib.sha256()
    tensors = base.part("language_model")
    progress = Progress(f"checksum of {base.path}", sum(tensor.nbytes for tensor in tensors.values()))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(files.as_bytes(tensor.read().to(torch.float16)))
        progress.advance(tensor.nbytes)
    return digest.hexdigest()


def write(out, tensors, config, small_files, max_shard_size, overwrite):
    """Write a folder in the original's layout, with the tokenizer and other small files of the folder `small_files`."""
    contents = {file.name: file.read_bytes() for file in sorted(Path(small_files).iterdir())
                if file.name == "tokenizer.model" or file.suffix in (".json", ".jinja")
                and not file.name.endswith(".index.json")}
    contents["config.json"] = config | {"torch_dtype": "float16"}
    contents["config.json"].pop("dtype", None)  # transformers 5's word for it
    named = {layouts.file_name(name, "llava"): tensor for name, tensor in tensors.items()}
    files.write_folder(out, named, contents, max_shard_size, overwrite, files.compare)
    say(f"written to {out}: {len(named)} tensors, float16, read again and found equal")
