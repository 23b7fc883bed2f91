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
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from formats.command import Progress

WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors",  # the first that exists is read
                "pytorch_model.bin.index.json", "pytorch_model.bin")
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
    """A tensor that stands in `file`, or is computed of some that do: `read()` -> CPU tensor, which nothing else keeps.

    Writing to a tensor that was read changes memory, never the file. begin: the byte of the file where its numbers
    begin, if they stand there one after the other.
    """

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

    def rows(self, count):
        """The first `count` rows."""
        shape = torch.Size([count, *self.shape[1:]])
        return LazyTensor(shape, self.dtype, self.file, lambda: self.read()[:count], self.begin)

    def to(self, dtype):
        """The same numbers in another dtype; those of a file without all of them standing in memory in the old one."""
        if dtype == self.dtype:
            return self
        cast = (lambda: self.read().to(dtype)) if self.begin is None else (lambda: cast_pieces(self, dtype))
        return LazyTensor(self.shape, dtype, self.file, cast)


def lazy(tensor, file=None):
    """A tensor that is in memory already, as a LazyTensor."""
    return LazyTensor(tensor.shape, tensor.dtype, file, lambda: tensor)


def open_weights(path):
    """A weight file, or a folder with one or with an index and its shards -> {name in the file: LazyTensor}.

    .safetensors go before .bin; a folder without weight files gives {}. Only tables of contents are read.
    ValueError, one sentence: missing, truncated, not tensors alone, index and shards that do not agree.
    """
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    name = next((name for name in WEIGHT_FILES if (path / name).exists()), None)
    if name is None:
        return {}
    return open_shards(path / name) if name.endswith(".index.json") else open_file(path / name)


def open_shards(index):
    """*.index.json -> {name: LazyTensor} of all its shards."""
    content = read_json(index, once)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index}: expected weight_map, an object of tensor names and file names")
    shards = sorted(set(where.values()))
    for shard in shards:
        parts = PurePosixPath(shard.replace("\\", "/")).parts
        if ".." in parts or ":" in shard or not parts or parts[0] == "/" or "/".join(parts) != shard:
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
                raise ValueError(f"{index.parent / shard} {what} by {index.name}: {list_names(names)}; "
                                 "copy the folder again")
        tensors |= found
    return tensors


def open_file(path):
    """One .safetensors or .bin file -> {name: LazyTensor}."""
    path = Path(path)
    try:
        return open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; download or copy the folder again") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|(?:function|class) (\S+)", str(error))
        what = f"code ({next(filter(None, code.groups()))})" if code else "something that is no tensor"
        raise ValueError(f"{path} is truncated or no weight file: it holds {what}, which is refused and was not run; "
                         "get the weights as .safetensors") from None
    except Exception as error:  # KeyError, EOFError, BadZipFile, RuntimeError …: all mean a file to replace
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
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
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or begin < 0 or 8 + length + end > size:
            raise ValueError(f"{name!r} does not fit into {size} bytes")
        tensors[name] = lazy_at(path, dtype, shape, None, 8 + length + begin)
    return tensors


def open_bin(path):
    """{name: LazyTensor} of a .bin file. One older than torch 1.6 is no archive: it is read whole, and stays."""
    if not zipfile.is_zipfile(path):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: lazy(tensor, path) for name, tensor in named_tensors(tensors)}
    tensors = torch.load(path, map_location="meta", weights_only=True)  # the table alone
    return {name: lazy_at(path, tensor.dtype, tensor.shape, tensor.stride(), tensor.untyped_storage()._checkpoint_offset
                          + tensor.storage_offset() * tensor.itemsize) for name, tensor in named_tensors(tensors)}


def named_tensors(tensors):
    """The items of a dict of tensors; ValueError for all else that a pickle may hold."""
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("expected a dict of names and tensors")
    return tensors.items()


def lazy_at(path, dtype, shape, stride, begin):
    """The LazyTensor whose numbers begin at byte `begin` of a file; stride None: one row after the other."""
    apart = stride and not torch.empty_strided(shape, stride, device="meta").is_contiguous()
    return LazyTensor(shape, dtype, path, lambda: mapped(path, dtype, shape, stride, begin), None if apart else begin)


def mapped(path, dtype, shape, stride, begin):
    """Numbers of a file as a tensor. The mapping is its own and private: it goes when the tensor goes, and whoever
    writes to the tensor writes to memory."""
    count = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if stride else math.prod(shape)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    with open(path, "rb") as file:
        if count * dtype.itemsize < SMALL or begin % dtype.itemsize:
            file.seek(begin)
            numbers = torch.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype)
        else:
            before = begin % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), before + count * dtype.itemsize, access=mmap.ACCESS_COPY,
                              offset=begin - before)
            numbers = torch.frombuffer(pages, dtype=dtype, count=count, offset=before)
    return numbers.as_strided(shape, stride) if stride else numbers.view(shape)


def cast_pieces(tensor, dtype):
    """A LazyTensor's numbers in another dtype, a megabyte at a time, which is still in the cache when it is cast: 5 %
    faster than casting a mapped tensor, and the old numbers never stand in memory together."""
    result = torch.empty(tensor.shape, dtype=dtype)
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


def read_json(path, pairs=None):
    """A JSON file -> dict; ValueError names the file if it is missing or broken. pairs: as `once`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a model folder with a config.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None


def once(pairs):
    """A JSON object's (key, value) pairs -> dict; json itself would let the last of two win."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return values


def list_names(names):
    """Names for a message, every one of them: those that differ in the number of the layer alone share an entry."""
    groups = {}
    for name in sorted(names):
        layer = re.search(r"(?<=layers\.)\d+", name)
        groups.setdefault(re.sub(r"(?<=layers\.)\d+", "#", name), []).append(int(layer[0]) if layer else None)
    return ", ".join(name.replace("#", ranges(numbers)) if numbers[0] is not None else name
                     for name, numbers in groups.items())


def ranges(numbers):
    """[3, 4, 5, 7] -> '{3-5,7}'; one number stays as it is."""
    runs = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return words if len(numbers) == 1 else f"{{{words}}}"


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def new_folder(folder, replace=False):
    """A temporary folder beside `folder` that takes its place only when the block has ended without an error.

    replace: `folder` may hold something already. Its files stay unless new ones have their names; weight files that
    stand there from before would be read first, or half, and go.
    ValueError: the folder holds something and is not to be replaced, cannot be written, or its disk is full.
    """
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
        raise ValueError(f"{path} is there already; name another file, or add --overwrite_output_dir")
    with temporary_folder(path) as temporary:
        yield temporary / path.name
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


def write_tensors(folder, tensors, max_shard_size=SHARD_BYTES):
    """Write model.safetensors, or from max_shard_size bytes on several files and their index, one tensor at a time.

    tensors: {name: tensor or LazyTensor}, or pairs of them. ValueError before anything is written if the disk has too
    little room.
    """
    tensors = lazily(tensors)
    size = check_room(folder, tensors)
    shards, room = [{}], max_shard_size
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    index, progress = {}, Progress("writing", size)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(Path(folder) / file, shard, progress)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_files(folder, {"model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": index}})


def write_safetensors(path, tensors, progress=None):
    """One .safetensors file of {name: LazyTensor}, each read when its turn comes. Wide dtypes go first, so that every
    number stands at a multiple of its size."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    words = {dtype: word for word, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": words[tensors[name].dtype], "shape": [*tensors[name].shape],
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].read()
            assert tensor.shape == tensors[name].shape and tensor.dtype == tensors[name].dtype, name
            file.write(as_bytes(tensor))
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
    """{name: tensor or LazyTensor}, or pairs -> {name: LazyTensor}, sorted."""
    return {name: lazy(tensor) if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in sorted(dict(tensors).items())}


def as_bytes(tensor):
    """A tensor's numbers as numpy's bytes, without a copy where it lies in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_file(path, tensors):
    """{name: tensor or LazyTensor} -> one .bin or .safetensors file, read again and compared. For small ones."""
    check_room(path.parent, lazily(tensors))
    if path.suffix == ".safetensors":
        write_safetensors(path, lazily(tensors))
    else:
        torch.save({name: tensor.read().detach().cpu().clone() for name, tensor in lazily(tensors).items()}, path)
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
