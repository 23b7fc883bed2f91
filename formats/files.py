"""Weight files: read one tensor at a time, written as a stream, never left half done.

A 7B model is 13 GB; nobody wants it in memory twice. So a file is opened by its table of contents alone, and every
tensor in it becomes a LazyTensor: it knows its shape, its dtype and where its numbers stand, and reads them when asked.
What it reads is a mapping of these very bytes: pages come when a number is used, and go when the tensor is dropped.

    .safetensors   8 bytes: n | n bytes: JSON {name: {dtype, shape, data_offsets}} | the numbers
    .bin           torch.save: a zip archive of a pickle (the table) and a file per tensor. Of the pickle only tensors
                   are read (weights_only=True), nothing in it is run

Several files together ("shards") have an index beside them, JSON too: {"weight_map": {tensor: file}}. Table and index
must agree: what one of them names and the other does not is an error, as is a path that leads out of the folder.
"""

import errno
import json
import math
import mmap
import os
import pickle
import re
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from formats.command import Progress

WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors",  # the first that exists is read
                "pytorch_model.bin.index.json", "pytorch_model.bin")
PROJECTOR_FILES, ADAPTER_FILES, TRAINED_BESIDE = (  # beside or instead of a whole model
    (f"{name}.safetensors", f"{name}.bin") for name in ("mm_projector", "adapter_model", "non_lora_trainables"))
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # safetensors' words
SHARD_BYTES = int(5e9)  # of one file that we write
SMALL = 1 << 16  # bytes; below, reading costs less than mapping, and a mapping holds a file descriptor
PIECE = 1 << 20  # bytes that are cast at a time
OF_THREAD = threading.local()


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stands in `file`, or is computed of some that do: `read()` -> CPU tensor, which nothing else keeps;
    writing to it changes memory alone. begin: the byte where its numbers begin, if they stand in a row."""

    shape: torch.Size
    dtype: torch.dtype
    file: Path
    read: Callable[[], torch.Tensor]
    begin: int = None

    @property
    def nbytes(self):
        return self.numel() * self.dtype.itemsize

    def numel(self):
        return math.prod(self.shape)

    def rows(self, count, first=0):
        """`count` rows from `first` on."""
        shape = torch.Size([count, *self.shape[1:]])
        begin = None if self.begin is None else self.begin + first * math.prod(shape[1:]) * self.dtype.itemsize
        return LazyTensor(shape, self.dtype, self.file, lambda: self.read()[first:first + count], begin)

    def to(self, dtype):
        """The same numbers in another dtype; those of a file without all of them standing in memory in the old one."""
        if dtype == self.dtype:
            return self
        cast = (lambda: self.read().to(dtype)) if self.begin is None else (lambda: cast_pieces(self, dtype))
        return LazyTensor(self.shape, dtype, self.file, cast)


def lazy(tensor, file=None):
    """A tensor that is in memory already, as a LazyTensor."""
    return tensor if isinstance(tensor, LazyTensor) else LazyTensor(tensor.shape, tensor.dtype, file, lambda: tensor)


def open_weights(path, names=WEIGHT_FILES):
    """A weight file, or the first of `names` that a folder holds -> {name in the file: LazyTensor}; {} without any.
    Only tables of contents are read. ValueError: missing, truncated, not tensors alone, index and shards disagree."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in names if (path / name).exists()), None)
    if path is None:
        return {}
    return open_shards(path) if path.suffix == ".json" else open_file(path)


def open_shards(index):
    """*.index.json -> {name: LazyTensor} of all its shards."""
    where = read_json(index, once).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index}: expected weight_map, an object of tensor names and file names")
    shards = sorted(set(where.values()))
    for shard in shards:
        if re.search(r"[\\:]", shard) or any(part in ("", ".", "..") for part in shard.split("/")):
            raise ValueError(f"{index} names the file {shard!r}; expected a plain name of a file in its folder")
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing)}; copy the folder again")
    tensors = {}
    for shard in shards:
        found, promised = open_file(index.parent / shard), {name for name, file in where.items() if file == shard}
        for what, names in (("does not hold what it should", promised - found.keys()),
                            ("holds what it should not", found.keys() - promised)):
            if names:
                raise ValueError(f"{index.parent / shard} {what} by {index.name}: {list_names(names)}; copy it again")
        tensors |= found
    return tensors


def open_file(path):
    """One .safetensors or .bin file -> {name: LazyTensor}."""
    try:
        return open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download or copy the folder again") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|function|class) (\S+)", str(error))
        what = f"code ({code[1]})" if code else "something that is no tensor"
        raise ValueError(f"{path} is truncated or no weight file: it holds {what}, which is refused and was not run; "
                         "get the weights as .safetensors") from None
    except Exception as error:  # KeyError, EOFError, BadZipFile, RuntimeError …: all mean a file to replace
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated or no weight file ({reason}); copy it again") from None


def open_safetensors(path):
    """{name: LazyTensor} of a .safetensors file; the layout stands at the head of this file."""
    tensors, size = {}, path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{size} bytes, and its header alone says {8 + length}")
        header = json.loads(file.read(length), object_pairs_hook=once)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        like = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
        begin, end = entry["data_offsets"]
        if end - begin != like.nbytes or begin < 0 or 8 + length + end > size:
            raise ValueError(f"{name!r} does not fit into {size} bytes")
        tensors[name] = lazy_at(path, like, 8 + length + begin)
    return tensors


def open_bin(path):
    """{name: LazyTensor} of a .bin file. One older than torch 1.6 is no archive: it is read whole, and stays."""
    archive = zipfile.is_zipfile(path)
    tensors = torch.load(path, map_location="meta" if archive else "cpu", weights_only=True)  # meta: the table alone
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("expected a dict of names and tensors")
    if not archive:
        return {name: lazy(tensor, path) for name, tensor in tensors.items()}
    return {name: lazy_at(path, tensor, tensor.untyped_storage()._checkpoint_offset
                          + tensor.storage_offset() * tensor.itemsize) for name, tensor in tensors.items()}


def lazy_at(path, like, begin):
    """The LazyTensor with the shape, dtype and strides of `like` whose numbers begin at byte `begin` of a file."""
    return LazyTensor(like.shape, like.dtype, path, lambda: mapped(path, like, begin),
                      begin if like.is_contiguous() else None)


def mapped(path, like, begin):
    """Numbers of a file as a tensor, whose own and private mapping of it goes when the tensor goes."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    count = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride()))
    size = count * like.itemsize
    with open(path, "rb") as file:
        if size < SMALL or begin % like.itemsize:
            file.seek(begin)
            numbers = torch.frombuffer(bytearray(file.read(size)), dtype=like.dtype)
        else:
            before = begin % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=begin - before)
            numbers = torch.frombuffer(pages, dtype=like.dtype, count=count, offset=before)
    return numbers.as_strided(like.shape, like.stride())


def cast_pieces(tensor, dtype):
    """A LazyTensor's numbers in another dtype; the old ones never stand in memory together."""
    return read_into(tensor, torch.empty(tensor.shape, dtype=dtype))


def read_into(tensor, result):
    """Fill `result`, contiguous and of any dtype, with a LazyTensor's numbers: a megabyte at a time, which is still in
    the cache when it is cast, 5 % faster than casting a mapped tensor. -> result"""
    if tensor.begin is None or tensor.dtype == result.dtype:
        return result.copy_(tensor.read())
    if not hasattr(OF_THREAD, "piece"):
        OF_THREAD.piece = mmap.mmap(-1, PIECE)  # kept: freeing it by malloc's rules would leave holes of many megabytes
    raw, piece = memoryview(OF_THREAD.piece), torch.frombuffer(OF_THREAD.piece, dtype=tensor.dtype)
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.begin)
        for part in result.view(-1).split(len(piece)):
            size = len(part) * tensor.dtype.itemsize
            if file.readinto(raw[:size]) < size:
                raise ValueError(f"{tensor.file} has become shorter while it was read; copy it again")
            part.copy_(piece[: len(part)])
    return result


def read_json(path, pairs=None, missing=None):
    """A JSON file -> dict, `missing` for one that is not there. pairs: as `once`. ValueError: no stand-in, broken."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=pairs)
        if not isinstance(values, dict):
            raise ValueError(f"an object, not {str(values)[:40]}")
        return values
    except FileNotFoundError:
        if missing is None:
            raise ValueError(f"{path} is missing; expected a model folder with a config.json") from None
        return missing
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


def once(pairs):
    """A JSON object's (key, value) pairs -> dict; json itself would let the last of two win."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} comes twice")
    return dict(pairs)


def list_names(names):
    """Names for a message, every one of them: those that differ in the number of the layer alone share an entry."""
    layer, groups = r"(?<=layers\.)\d+", {}
    for name in names:
        groups.setdefault(re.sub(layer, "#", name), []).extend(map(int, re.findall(layer, name)))
    return ", ".join(name.replace("#", ranges(numbers)) for name, numbers in sorted(groups.items()))


def ranges(numbers):
    """[3, 4, 5, 7] -> '{3-5,7}'; one number stays as it is."""
    runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])  # 0:3 1:4 2:5 | 3:7
    runs = [[number for _, number in run] for _, run in runs]
    words = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return words if len(numbers) == 1 else f"{{{words}}}"


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def new_folder(folder, replace=False):
    """A temporary folder beside `folder` that takes its place only when the block has ended without an error.

    replace: `folder` may hold something. Its files stay unless new ones have their names, but weight files, which would
    be read first, or half. ValueError: it holds something otherwise, cannot be written, or its disk is full."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not replace:
        raise ValueError(f"{folder} already holds something; name another folder, or add --overwrite_output_dir")
    with temporary_folder(folder) as temporary:
        yield temporary
        folder.mkdir(exist_ok=True)
        new = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")  # config.json comes last
        if any(file.suffix == ".safetensors" for file in new):
            for file in folder.glob("model*.safetensors*"):
                file.unlink()
        for file in new:
            file.replace(folder / file.name)


@contextmanager
def new_file(path, replace=False):
    """The same for a single file: a path to write to, which becomes `path` at the end."""
    path = Path(path)
    if path.is_dir() or path.exists() and not replace:
        raise ValueError(f"{path} is a folder; name a file" if path.is_dir() else
                         f"{path} is there already; name another file, or add --overwrite_output_dir")
    with temporary_folder(path) as temporary:
        yield temporary / path.name
        with open(temporary / path.name, "rb") as file:
            os.fsync(file.fileno())  # the content outlives a power cut if the name does
        (temporary / path.name).replace(path)


@contextmanager
def temporary_folder(beside):
    """A folder beside a path, on the same disk, gone when the block ends."""
    temporary = beside.with_name(f".{beside.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{beside} cannot be written ({error.strerror}); name another place") from None
    try:
        yield temporary
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written, free = sum(file.stat().st_size for file in temporary.iterdir()), free_bytes(temporary)
        raise ValueError(f"{beside}: the disk is full, {gigabytes(written)} are written and {gigabytes(free)} free; "
                         "make room or name a place on another disk") from None
    finally:
        shutil.rmtree(temporary)


def write_folder(folder, tensors, contents, max_shard_size=SHARD_BYTES, overwrite=False, check=None):
    """A new folder with {name: tensor or LazyTensor} and {file: content}; check(folder, tensors) has a last look."""
    with new_folder(folder, overwrite) as temporary:
        write_tensors(temporary, tensors, max_shard_size)
        write_files(temporary, contents)
        if check:
            check(temporary, tensors)


def write_tensors(folder, tensors, max_shard_size=SHARD_BYTES):
    """Write model.safetensors, or from max_shard_size bytes on several files and their index, one tensor at a time.
    tensors: {name: tensor or LazyTensor}. ValueError before anything is written if the disk has too little room."""
    tensors = lazily(tensors)
    progress = Progress("writing", check_room(folder, tensors))
    shards, room = [{}], max_shard_size
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(Path(folder) / file, shard, progress)
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": progress.total}, "weight_map": where}
        write_files(folder, {"model.safetensors.index.json": index})


def write_safetensors(path, tensors, progress=None):
    """One file of {name: LazyTensor}, read in turn, wide dtypes first: numbers stand at multiples of their size."""
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    words = {dtype: word for word, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": words[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            numbers = tensor.read()
            assert numbers.shape == tensor.shape and numbers.dtype == tensor.dtype, name
            file.write(as_bytes(numbers))
            if progress:
                progress.advance(tensor.nbytes)


def compare(path, tensors):
    """Read what was written, a folder or a file, and hold it against {name: tensor or LazyTensor}, bit by bit."""
    written, tensors = open_weights(path), lazily(tensors)
    if written.keys() != tensors.keys():
        raise ValueError(f"{path} was written wrong: {list_names(written.keys() ^ tensors.keys())}; try another disk")
    progress = Progress("checking", sum(tensor.nbytes for tensor in tensors.values()))
    for name, tensor in tensors.items():
        again = written[name]
        if (again.shape, again.dtype) != (tensor.shape, tensor.dtype) or not torch.equal(
                torch.from_numpy(as_bytes(again.read())), torch.from_numpy(as_bytes(tensor.read()))):
            raise ValueError(f"{path}: {name} was written and read again, and is another; try another disk")
        progress.advance(tensor.nbytes)


def lazily(tensors):
    """{name: tensor or LazyTensor} -> {name: LazyTensor}."""
    return {name: lazy(tensor) for name, tensor in tensors.items()}


def as_bytes(tensor):
    """A tensor's numbers as numpy's bytes, without a copy where it lies in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_file(path, tensors):
    """{name: tensor or LazyTensor} -> one .bin or .safetensors file, read again and compared. For small ones."""
    tensors = lazily(tensors)
    check_room(path.parent, tensors)
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors)
    else:
        torch.save({name: tensor.read().detach().cpu().clone() for name, tensor in tensors.items()}, path)
    compare(path, tensors)


def write_files(folder, files):
    """{name: bytes, or what becomes JSON} -> files."""
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        (Path(folder) / name).write_bytes(content)


def check_room(folder, tensors):
    """ValueError if the disk of a folder has less room than the tensors take. -> their bytes"""
    size, free = sum(tensor.nbytes for tensor in tensors.values()), free_bytes(folder)
    if size > free:
        raise ValueError(f"{Path(folder).parent}: {gigabytes(size)} are to be written and {gigabytes(free)} are free; "
                         "make room or name a place on another disk")
    return size


def free_bytes(folder):
    """What the disk of a folder still takes."""
    return shutil.disk_usage(folder).free


def gigabytes(size):
    """1234567890 -> '1.235 GB'."""
    return f"{size / 1e9:,.3f} GB"
