"""formats/files.py: weight files are read a tensor at a time and written as a stream; broken ones are named."""

import errno
import gc
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import command, files

ROOT = Path(__file__).resolve().parent.parent


def some_tensors():
    """Every dtype that checkpoints have, a large tensor (which is mapped), a scalar, an empty one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"f.{dtype}".replace("torch.", ""): torch.randn(5, 7, generator=generator).to(dtype) for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)}
    tensors |= {"i8": torch.arange(-5, 5, dtype=torch.int8), "i64": torch.arange(9), "b": torch.tensor([True, False]),
                "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.zeros(3, dtype=torch.uint8)}
    return tensors | {"large": torch.randn(300, 301, generator=generator),
                      "large half": torch.randn(401, 301, generator=generator).half()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        and files.as_bytes(found[name].read()).tobytes() == files.as_bytes(tensor).tobytes()
        for name, tensor in expected.items())


# ------------------------------------------------------------------------------------------------------------- reading


def test_what_the_library_writes_is_read_and_what_we_write_the_library_reads(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors")
    files.write_safetensors(tmp_path / "ours.safetensors", files.lazily(tensors))
    assert same(files.open_weights(tmp_path / "theirs.safetensors"), tensors)
    assert same(files.open_weights(tmp_path / "ours.safetensors"), tensors)
    read = load_file(tmp_path / "ours.safetensors")
    assert read.keys() == tensors.keys() and all(
        torch.equal(read[name].float(), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("archive", [True, False])
def test_bin_files_of_today_and_from_before_torch_1_6(tmp_path, archive):
    tensors = {name: tensor for name, tensor in some_tensors().items() if archive or "float8" not in name}
    whole = torch.arange(60.0).reshape(6, 10)
    views = {"view": whole[2:4], "transposed": whole.t(), "column": whole[:, 3], "parameter": torch.nn.Parameter(whole)}
    torch.save(tensors | views, tmp_path / "x.bin", _use_new_zipfile_serialization=archive)
    assert same(files.open_weights(tmp_path / "x.bin"), tensors | views)


def test_nothing_is_read_before_it_is_asked_for_and_nothing_stays(tmp_path):
    torch.save({"a": torch.ones(1000, 1000), "b": torch.ones(3)}, tmp_path / "x.bin")
    save_file({"a": torch.ones(1000, 1000), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    for file in "x.bin", "x.safetensors":
        tensors = files.open_weights(tmp_path / file)
        assert mappings(tmp_path / file) == 0
        large, small = tensors["a"].read(), tensors["b"].read()
        assert mappings(tmp_path / file) == 1 and small.sum() == 3
        large.zero_()  # memory changes, the file does not
        assert tensors["a"].read().sum() == 1e6
        del large
        gc.collect()
        assert mappings(tmp_path / file) == 0


def mappings(file):
    """How many parts of a file this process has mapped."""
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    return Path("/proc/self/maps").read_text().count(str(file))


def test_lazy_tensors_know_their_size_and_can_be_cut_and_cast(tmp_path):
    save_file({"a": torch.arange(12.0).reshape(4, 3)}, tmp_path / "x.safetensors")
    tensor = files.open_weights(tmp_path / "x.safetensors")["a"]
    assert (tensor.nbytes, tensor.numel(), tensor.file) == (48, 12, tmp_path / "x.safetensors")
    cut = tensor.rows(2).to(torch.float16)
    assert (tuple(cut.shape), cut.dtype, cut.nbytes) == ((2, 3), torch.float16, 12)
    assert torch.equal(cut.read(), torch.arange(6.0).reshape(2, 3).half())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_as_one_and_safetensors_first(tmp_path, suffix):
    tensors = {f"{i}": torch.full((4,), float(i)) for i in range(6)}
    shards(tmp_path, tensors, suffix)
    assert same(files.open_weights(tmp_path), tensors)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert files.open_weights(tmp_path).keys() == tensors.keys()
    save_file({"first": torch.ones(1)}, tmp_path / "model.safetensors")
    assert files.open_weights(tmp_path).keys() == (tensors.keys() if suffix == "safetensors" else {"first"})
    (tmp_path / "empty").mkdir()
    assert files.open_weights(tmp_path / "empty") == {}


def shards(folder, tensors, suffix="safetensors", count=3):
    """{name: tensor} -> `count` shards and their index -> the index's path and content."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    where = {name: f"{stem}-{i % count}.{suffix}" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index, where


# ------------------------------------------------------------------------------------------------------- what is broken


def refusal(path):
    """The one sentence with which a file or folder is refused."""
    with pytest.raises(ValueError) as error:
        files.open_weights(path)
    assert "\n" not in str(error.value)
    return str(error.value)


class Code:
    """Runs `touch` where it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, archive):
    torch.save({"a": Code(tmp_path / "run")}, tmp_path / "x.bin", _use_new_zipfile_serialization=archive)
    assert "holds code (posix.system), which is refused and was not run; get the weights as .safetensors" in refusal(
        tmp_path / "x.bin")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"a": Code(tmp_path / "run")}, protocol=2))
    assert "raw.bin is truncated or no weight file" in refusal(tmp_path / "raw.bin")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [{"a": 5}, [torch.ones(2)], {"model": {"a": torch.ones(2)}}])
def test_a_pickle_of_other_things_is_no_weight_file(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    assert "expected a dict of names and tensors" in refusal(tmp_path / "x.bin")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("cut", [0, 3, 100, -1, -500])
def test_truncated_files(tmp_path, suffix, cut):
    index, where = shards(tmp_path, some_tensors(), suffix)
    file = tmp_path / where["large"]
    file.write_bytes(file.read_bytes()[:cut])
    assert refusal(tmp_path).startswith(f"{file} is truncated or no weight file")


@pytest.mark.parametrize("header", [
    b"[]", b"no json", b'{"a": 1}', b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [-4, 0]}}',
    b'{"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, '
    b'"a": {"dtype": "U8", "shape": [], "data_offsets": [1, 2]}}'])
def test_headers_that_lie(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "x.safetensors is truncated or no weight file" in refusal(tmp_path / "x.safetensors")


def test_a_missing_shard_is_named_and_so_are_all_others(tmp_path):
    index, where = shards(tmp_path, some_tensors())
    for shard in "model-0.safetensors", "model-2.safetensors":
        (tmp_path / shard).unlink()
    assert f"{index} names files that are not there: model-0.safetensors, model-2.safetensors" in refusal(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    index, where = shards(tmp_path, some_tensors())
    index.write_text(json.dumps({"weight_map": where | {"ghost": "model-1.safetensors"}}))
    assert "1.safetensors does not hold what it should by model.safetensors.index.json: ghost;" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in where.items() if name != "scalar"}}))
    assert f"{where['scalar']} holds what it should not by model.safetensors.index.json: scalar;" in refusal(tmp_path)


def test_an_index_that_names_something_twice(tmp_path):
    index, where = shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, count=1)
    index.write_text('{"weight_map": {"a": "model-0.safetensors", "a": "model-0.safetensors"}}')
    assert "'a' comes twice" in refusal(tmp_path)
    index.write_text('{"weight_map": {"a": "model-0.safetensors", "b": "./model-0.safetensors"}}')
    assert "names the file './model-0.safetensors'; expected a plain name" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors", "a/../../secret.safetensors",
                                  "..\\secret.safetensors", "C:\\secret.safetensors", "", "."])
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names the file {name!r}; expected a plain name of a file in its folder" in refusal(tmp_path / "x")


def test_links_out_of_the_folder_are_fine(tmp_path):
    """Hugging Face's cache is made of them."""
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model-0.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-0.safetensors"}}')
    assert same(files.open_weights(tmp_path / "x"), {"a": torch.ones(2)})


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: expected " in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------------- writing


def test_shards_keep_to_their_size_and_the_index_to_the_shards(tmp_path):
    tensors = {f"{i:02d}": torch.full((25,), float(i)) for i in range(10)}  # 100 bytes each
    files.write_tensors(tmp_path, tensors, 250)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1000} and len(set(index["weight_map"].values())) == 5
    assert index["weight_map"]["09"] == "model-00005-of-00005.safetensors"
    assert same(files.open_weights(tmp_path), tensors)


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path):
    tensors = {"a": torch.ones(10), "b": torch.ones(1000), "c": torch.ones(10)}
    files.write_tensors(tmp_path, tensors, 100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert same(files.open_weights(tmp_path), tensors)


def test_tensors_are_read_one_by_one_while_writing(tmp_path):
    alive, most = set(), []

    def computed(i):
        tensor = torch.full((20_000,), float(i))
        alive.add(i)
        most.append(len(alive))
        import weakref
        weakref.finalize(tensor, alive.discard, i)
        return tensor
    tensors = {f"{i}": files.LazyTensor(torch.Size([20_000]), torch.float32, None, lambda i=i: computed(i))
               for i in range(8)}
    files.write_tensors(tmp_path, tensors)
    assert max(most) <= 2  # the last one goes when the next one has come
    assert load_file(tmp_path / "model.safetensors")["7"][0] == 7


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with files.new_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["x"]
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "c") as temporary:
        (temporary / "x").write_text("x")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_holds_something_is_left_alone_unless_told(tmp_path):
    (tmp_path / "out").mkdir()
    with files.new_folder(tmp_path / "out"):
        pass  # an empty one is fine
    (tmp_path / "out" / "model-1.safetensors").write_text("old")
    (tmp_path / "out" / "log.jsonl").write_text("log")
    with pytest.raises(ValueError, match="out already holds something; .* --overwrite_output_dir"):
        with files.new_folder(tmp_path / "out"):
            pass
    with files.new_folder(tmp_path / "out", replace=True) as temporary:
        files.write_tensors(temporary, {"a": torch.ones(1)})
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "log.jsonl"}
    with pytest.raises(ValueError, match="log.jsonl is a file"), files.new_folder(tmp_path / "out" / "log.jsonl"):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"x cannot be written \(.+\); name another place"):
        with files.new_folder(tmp_path / "file" / "x"):
            pass
    with pytest.raises(ValueError, match="file is there already"), files.new_file(tmp_path / "file"):
        pass
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="Permission denied"), files.new_folder(tmp_path / "closed" / "x"):
            pass


def test_no_disk_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 5_000_000)
    large = files.LazyTensor(torch.Size([10_000, 1000]), torch.float32, None, lambda: pytest.fail("was read"))
    with pytest.raises(ValueError, match="0.040 GB are to be written and 0.005 GB are free"):
        with files.new_folder(tmp_path / "out") as temporary:
            files.write_tensors(temporary, {"a": large})
    with pytest.raises(ValueError, match="0.040 GB are to be written"), files.new_file(tmp_path / "x.bin") as file:
        files.write_file(file, {"a": large})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")
    tensors = {"a": torch.ones(30_000), "b": files.LazyTensor(torch.Size([3]), torch.float32, None, full)}
    with pytest.raises(ValueError, match=r"out: the disk is full, 0.000 GB are written and [\d,.]+ GB free"):
        with files.new_folder(tmp_path / "out") as temporary:
            files.write_tensors(temporary, tensors)
    assert list(tmp_path.iterdir()) == []


def test_what_comes_back_from_the_disk_as_another_is_noticed(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    files.write_tensors(tmp_path, tensors)
    files.compare(tmp_path, tensors)
    for changed, sentence in (({"b": torch.tensor([0.0, -0.0])}, "b was written and read again, and is another"),
                              ({"c": torch.ones(1)}, "was written wrong: c")):
        with pytest.raises(ValueError, match=sentence):
            files.compare(tmp_path, tensors | changed)


# ---------------------------------------------------------------------------------------------------------- peak memory

PEAK = """
import sys, torch, weights
status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
before = status("VmRSS")
model = weights.load(sys.argv[1], dtype=sys.argv[2], device="cpu").model
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_float32_file_never_stands_in_memory_whole(tmp_path, suffix):
    """Loading as bfloat16 peaks at the parameters' size and one tensor of the file. 120 MB of float32 in 6 shards."""
    D, F, V, layers = 512, 2048, 4000, 6
    tensors = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(layers):
        tensors |= {f"model.layers.{i}.self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        tensors |= {f"model.layers.{i}.mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
        tensors |= {f"model.layers.{i}.mlp.down_proj.weight": (D, F)}
        tensors |= {f"model.layers.{i}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    shards(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()}, suffix, count=6)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers, "vocab_size": V,
        "num_attention_heads": 8, "rms_norm_eps": 1e-5}))
    ended = subprocess.run([sys.executable, "-c", PEAK, tmp_path, "bfloat16"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peak, size, largest = map(int, ended.stdout.split())
    assert size == 2 * sum(torch.Size(shape).numel() for shape in tensors.values())
    assert peak < size + 2 * largest + 6e6, f"{peak / 1e6:.1f} MB for parameters of {size / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------- command.py's part in it


def test_sizes_as_people_write_them():
    for text, size in {"5GB": 5e9, "200 mb": 2e8, "1.5GiB": 1.5 * 2**30, "1000": 1000, "3K": 3000, "7B": 7}.items():
        assert command.file_size(text) == size
    for text in "", "GB", "-5GB", "five", "0", "1..2GB":
        with pytest.raises(command.argparse.ArgumentTypeError):
            command.file_size(text)


def test_progress_says_how_far_and_how_long(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    progress = command.Progress("writing", 4_000_000_000)
    for seconds in (0.5, 11, 12, 40):
        now[0] = seconds
        progress.advance(1_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "writing: 50 % of 4.00 GB, 182 MB/s, 0:11 left", "writing: 100 % of 4.00 GB, 100 MB/s, 0:00 left"]
