"""sampling/placing.py and turns.py: what is planned is what is taken, and a model in pieces says what it says whole."""

import json
import subprocess
import sys
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import copy_tokenizer
from drawn import draw
from test_kernels import on_a_gpu

import lora
import quant
import sample
from benches.loading import make as write_model
from kernels.attention import Packing
from kernels.linear import pack
from model import Cache, LlamaConfig, Llava, LlavaConfig
from quant import Quantisation
from sample import Request, generate
from sampling.placing import DISK, Needs, Placing, Plan, count, fit, make
from sampling.turns import ALIGN, Buffer, Following, page_locked, size_of
from vision import ClipVisionConfig
from weights import Blank, convert, load, save

ROOT = Path(__file__).resolve().parent.parent
EIGHT = Needs((10,) * 8, 1, 5, 3)  # eight layers, each with one byte of cache
CARDS = {"cuda:0": 40, "cuda:1": 60}


# ------------------------------------------------------------------------------------------------------------- the plan


def test_layers_lie_in_order_and_the_rest_takes_turns():
    plan = make(EIGHT, CARDS, 0)  # 40 - 3 - 5 hold two; 60 - 3 - 2 x 10 - 3 three
    assert plan.homes == ["cuda:0"] * 2 + ["cuda:1"] * 3 + [DISK] * 3
    assert plan.devices == ["cuda:0"] * 2 + ["cuda:1"] * 6
    assert make(EIGHT, CARDS, 25).homes[5:] == ["cpu", "cpu", DISK]
    assert make(EIGHT, {"cuda:0": 96}, 0).homes == ["cuda:0"] * 8
    assert make(EIGHT, {"cuda:0": 95}, 99).homes == ["cuda:0"] * 5 + ["cpu"] * 3  # of two, both would be there anyway
    assert make(EIGHT, {"cpu": 36}, 0).homes == [DISK] * 8


def test_balanced_gives_even_shares():
    cards = {f"cuda:{i}": 200 for i in range(4)}
    assert make(EIGHT, cards, 0).devices == ["cuda:0"] * 8
    even = make(EIGHT, cards, 0, "balanced").devices
    assert [even.count(card) for card in cards] == [2, 2, 2, 2]
    assert make(EIGHT, {"cuda:0": 200, "cuda:1": 24}, 0, "balanced").devices == ["cuda:0"] * 7 + ["cuda:1"]


@pytest.mark.parametrize("seed", range(40))
def test_no_room_is_overfull_and_no_layer_takes_turns_without_need(seed):
    draws = iter(torch.randint(1, 40, (40,), generator=torch.Generator().manual_seed(seed)).tolist())
    needs = Needs(tuple(next(draws) for _ in range(3 + seed % 7)), next(draws) // 8, next(draws), next(draws) // 4)
    rooms, total = {f"cuda:{i}": 4 * next(draws) for i in range(1 + seed % 3)}, len(needs.layers)
    try:
        plan = make(needs, rooms, next(draws))
    except ValueError:
        assert not any(fit(needs, rooms, away) for away in (0, *range(3, total + 1)))
        return
    away = sum(home != device for home, device in zip(plan.homes, plan.devices))
    assert not any(fit(needs, rooms, fewer) for fewer in {0, *range(3, total + 1)} if fewer < away)
    for device, room in rooms.items():
        used = needs.beside * plan.devices.count(device) + needs.around * (device == "cuda:0")
        used += sum(size for size, home in zip(needs.layers, plan.homes) if home == device)
        used += needs.buffers * (away > 0 and device == plan.devices[-1])
        assert not used or used + needs.work <= room


@pytest.mark.parametrize("bits, kind, double", [(16, "nf4", True), (8, "nf4", True), (4, "nf4", True),
                                                (4, "fp4", False)])
def test_counted_are_the_bytes_that_a_model_has(tiny_llava, bits, kind, double):
    coding, parts = Quantisation(bits, kind, double), load(tiny_llava, device="cpu", bits=bits, quant_type=kind,
                                                           double_quant=double).model
    with torch.device("meta"), Blank():
        model = Llava(parts.config)
    needs = count(model, {}, coding, 100)
    layers = parts.language_model.model.layers
    for counted, layer in zip(needs.layers, layers, strict=True):  # nine matrices of three tensors, with gaps
        assert 0 <= counted - sum(p.nbytes for p in layer.parameters()) <= 27 * ALIGN and counted >= size_of(layer)
    whole = sum(p.nbytes for p in parts.parameters())
    assert needs.around == whole - sum(p.nbytes for p in layers.parameters())
    cache = Cache(parts.config.text, torch.float32, "cpu", 100)
    assert needs.beside == cache.keys[0].nbytes + cache.values[0].nbytes
    assert count(model, {}, coding, 100, 3000).beside == needs.beside + 4 * 1000  # an adapter


def test_seven_billion_weights_in_four_bits():
    """PERFORMANCE 1.4's sizes: 3.34 GB of codes, 0.52 of embeddings and head, 0.5 MB of cache for a token."""
    text = LlamaConfig(32064, 4096, 11008, 32, 32)
    with torch.device("meta"), Blank():
        model = Llava(LlavaConfig(text, ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14), "mlp2x_gelu")).bfloat16()
    needs = count(model, {}, Quantisation(4), 2048)
    assert sum(needs.layers) == pytest.approx(3.34e9, rel=0.01)
    assert needs.around == pytest.approx(0.525e9 + 0.582e9 + 0.042e9, rel=0.01)
    assert 32 * needs.beside == 2048 * 524288
    assert make(needs, {"cuda:0": int(8e9)}, 0).homes == ["cuda:0"] * 32
    card = [make(count(model, {}, Quantisation(4), tokens, cpu=False), {"cuda:0": int(4e9)}, int(8e9)).homes
            for tokens in (2048, 1024)]  # with 4 GB; half of the context gives room for more layers
    assert 10 < card[0].count("cuda:0") < card[1].count("cuda:0") < 30 and DISK not in card[0]
    with torch.device("meta"), Blank():  # 13B with 12 GB
        model = Llava(LlavaConfig(LlamaConfig(32000, 5120, 13824, 40, 40), model.config.vision, "mlp2x_gelu")).half()
    assert make(count(model, {}, Quantisation(4), 2048), {"cuda:0": int(12e9)}, 0).homes == ["cuda:0"] * 40


@pytest.mark.parametrize("flags, says", [
    (["--max_memory", "lots"], "expected a size like 4GB"), (["--max_memory", "disk=4GB"], "expected a size like 4GB"),
    (["--max_memory", "cuda:7=4GB"], "here are cpu"), (["--max_memory", "cuda=4GB"], "here are cpu"),
    (["--device_map", "balanced"], "several GPUs"),
    (["--max_memory", "1MB"], "GB are the least that would do"), (["--plan", "--max_memory", "1MB"], "are the least"),
    (["--max_memory", "1MB", "--plan_tokens", "0"], "1 or more"), (["--device_map", "all"], "invalid choice")])
def test_what_cannot_be_is_one_sentence(run_main, flags, says):
    status, out, err = run_main(sample, "--device", "cpu", "--prompt", "hi", *flags)
    assert status == 2 and says in err and "Traceback" not in err and not out


def test_codes_that_are_made_while_loading_cannot_rest_in_the_file():
    with pytest.raises(ValueError, match="3 of 8 layers find no room.*all of it takes 0.000 GB"):
        make(EIGHT, CARDS, 0, coding=True)
    assert make(EIGHT, CARDS, 30, coding=True).homes[5:] == ["cpu"] * 3


def test_the_plan_reads_nothing_but_the_config(tiny_llava, tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    (tmp_path / "config.json").write_bytes((tiny_llava / "config.json").read_bytes())
    status, out, _ = run_main(sample, "--model_name_or_path", tmp_path, "--plan", "--max_memory", "35MB", "--device",
                              "cpu", "--plan_tokens", 64)
    assert status == 0 and "layers 0-2" in out and "of 0.035 GB" in out
    sizes = [float(line[50:].split()[0]) for line in out.splitlines()[2:]]
    assert sizes.pop() == pytest.approx(sum(sizes), abs=0.003)
    status, out, _ = run_main(sample, "--model_name_or_path", "llava-hf/llava-1.5-7b-hf", "--plan", "--device", "cpu",
                              "--dtype", "bfloat16", "--max_memory", "8GB")  # known without the hub
    assert status == 0 and "disk" in out and "brings in 8.9" in out
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    status, out, _ = run_main(sample, "--model_name_or_path", "llava-hf/llava-1.5-13b-hf", "--plan", "--max_memory",
                              "cuda:0=16GB,cuda:1=16GB,cpu=8GB")  # of a machine that is not here
    lines = [line.split() for line in out.splitlines() if line.startswith("layers")]
    assert status == 0 and [line[2] for line in lines] == ["cuda:0", "cuda:1"] and lines[1][1].endswith("-39")


# ---------------------------------------------------------------------------------------------------- layers take turns


class InPieces:
    """A placing that gives each layer the home that it is told."""

    def __init__(self, homes, device="cpu", tokens=64):
        self.homes, self.device, self.tokens = homes, device, tokens

    def __call__(self, model, tensors, quantisation, device, worn=None):
        needs = count(model, tensors, quantisation, self.tokens)
        return Plan(needs, {self.device: 0}, [self.device] * len(self.homes), self.homes)


ALL_AWAY = InPieces([DISK] * 3)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    scenes = draw(tmp_path_factory.mktemp("scenes"))
    return [Request([("human", "What color is the circle?")], [scenes / "a.png"], 12),
            Request([("human", "Compare.")], [scenes / "b.png", scenes / "a.png"], 12),
            Request([("human", "Hi")], [], 9)]


def answers(loaded, requests):
    return [answer.token_ids for answer in generate(loaded, requests)]


@pytest.mark.parametrize("dtype, homes", [("float32", [DISK] * 3), ("bfloat16", [DISK] * 3),
                                          ("float32", ["cpu", DISK, DISK]), ("float32", [DISK, "cpu", DISK])])
def test_answers_are_those_of_the_whole_model(tiny_llava, requests, dtype, homes):
    whole = load(tiny_llava, dtype, "cpu", image_aspect_ratio="pad")
    loaded = load(tiny_llava, dtype, "cpu", image_aspect_ratio="pad", place=InPieces(homes))
    assert answers(loaded, requests) == answers(whole, requests)
    held = {p.untyped_storage().data_ptr() for i, layer in enumerate(loaded.model.language_model.model.layers)
            for p in layer.parameters() if homes[i] == DISK}
    assert len(held) == min(2, homes.count(DISK))  # they share two buffers


def test_requests_wait_for_cells_that_were_planned(tiny_llava, requests):
    loaded, together = load(tiny_llava, device="cpu", place=InPieces([DISK] * 3, tokens=330)), []
    engine = sample.Engine(loaded)
    for i, request in enumerate(3 * requests):
        engine.add(request, i)
    said = {}
    while engine.waiting or engine.running:
        said |= {i: answer.token_ids for i, answer in engine.step()}
        together.append(len(engine.running))
        assert sum(stretch.size for stretch in engine.cache.stretches) <= 331 == len(engine.cache.keys[0])
    assert max(together) > 1 and [said[i] for i in range(9)] == 3 * answers(load(tiny_llava, device="cpu"), requests)


def test_a_pass_that_is_broken_off_does_no_harm(tiny_llava, requests):
    whole, loaded = load(tiny_llava, device="cpu"), load(tiny_llava, device="cpu", place=ALL_AWAY)

    def stop(*_):
        raise KeyboardInterrupt

    handle = loaded.model.language_model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(loaded, requests)
    handle.remove()
    assert answers(loaded, requests) == answers(whole, requests)


def test_an_error_of_the_disk_comes_through(tiny_llava, requests, monkeypatch):
    loaded = load(tiny_llava, device="cpu", dtype="bfloat16", place=ALL_AWAY)

    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("formats.files.read_into", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            generate(loaded, requests)
    monkeypatch.undo()  # and when it is back, all is well
    assert answers(loaded, requests) == answers(load(tiny_llava, device="cpu", dtype="bfloat16"), requests)


def test_matrices_are_packed_only_where_they_stay(tiny_llava, requests, monkeypatch):
    whole, loaded = (load(tiny_llava, device="cpu", bits=8, dtype="bfloat16", place=place)
                     for place in (None, InPieces(["cpu"] * 3)))
    buffer = Buffer(size_of(loaded.model.language_model.model.layers[1]), torch.device("cpu"), False)
    buffer.adopt(loaded.model.language_model.model.layers[1])
    seen = []
    monkeypatch.setattr("kernels.nf4.wants_planes", lambda codes, *_: seen.append(codes))
    quant.arrange(loaded.model)
    assert len(seen) == 2 * 7
    assert pack(whole.model) > pack(loaded.model) > 0
    assert answers(loaded, requests) == answers(whole, requests)


def test_adapters_go_on_layers_that_take_turns(tiny_llava, tmp_path, requests):
    loaded = load(tiny_llava, device="cpu")
    loaded.lora = lora.LoraConfig(4, 8, 0.0)
    lora.inject(loaded.model, "language_model", loaded.lora, 0)
    with torch.no_grad():
        for layer in lora.adapted(loaded.model).values():
            layer.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    save(loaded, tmp_path / "worn")
    whole, placed = (answers(load(tiny_llava, device="cpu", adapter=tmp_path / "worn", place=place), requests)
                     for place in (None, ALL_AWAY))
    assert whole == placed != answers(load(tiny_llava, device="cpu"), requests)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_read_from_the_file(tiny_llava, tmp_path, requests, bits):
    convert(tiny_llava, tmp_path / "codes", bits=bits)
    whole, placed = (load(tmp_path / "codes", device="cpu", place=place) for place in (None, ALL_AWAY))
    assert answers(placed, requests) == answers(whole, requests)
    assert Placing(max_memory="39MB", tokens=9)(  # resting in the file is no matter of quantising while loading
        whole.model, {}, Quantisation(), torch.device("cpu"), coding=False).homes == ["cpu"] * 3


@pytest.mark.parametrize("bits", [4, 16])
def test_layers_rest_in_main_memory(tiny_llava, requests, bits):
    """What a GPU has them do, with the CPU's memory in both places."""
    whole, loaded = (load(tiny_llava, device="cpu", bits=bits) for _ in range(2))
    layers = loaded.model.language_model.model.layers
    buffers = [Buffer(max(map(size_of, layers)), torch.device("cpu"), False) for _ in range(2)]
    for i, layer in enumerate(layers):
        buffers[i % 2].adopt(layer)
    assert answers(loaded, requests) == answers(whole, requests)


def test_no_page_of_main_memory_is_locked_twice(monkeypatch):
    locked = {}

    def lock(begin, size, _):
        locked[begin] = {page for page in range(begin, begin + size, PAGESIZE)}
        assert begin % PAGESIZE == size % PAGESIZE == 0
        return 0

    cuda = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    kept = [page_locked(size) for size in (9, PAGESIZE, PAGESIZE + 1, 70)]
    assert [len(memory) for memory in kept] == [9, PAGESIZE, PAGESIZE + 1, 70]
    assert sum(map(len, locked.values())) == len(set().union(*locked.values())) == 5
    kept.clear()
    assert not locked
    monkeypatch.setattr(cuda, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(ValueError, match="0.000 GB of main memory cannot be locked.*CUDA error 2.*--max_memory cpu="):
        page_locked(9)


def test_it_is_not_saved(tiny_llava, tmp_path):
    with pytest.raises(ValueError, match="to save it, load it without"):
        save(load(tiny_llava, device="cpu", place=ALL_AWAY), tmp_path / "out")


def test_what_layers_are_given_follows_them():
    """Over two devices, the second of which only knows shapes."""
    given = torch.ones(5, 8), (torch.ones(5, 1, 4),) * 2, Packing(torch.tensor([0, 3, 5])), None
    meta, follow = torch.device("meta"), Following()
    x, rotary, packing, cache = follow(torch.device("cpu"), None, given)
    assert x is given[0] and rotary is given[1] and packing is given[2] and cache is None
    x, rotary, packing, _ = follow(meta, None, given)
    assert {x.device, rotary[1].device, packing.position.device} == {meta} and packing.lengths == [3, 2]
    again = follow(meta, None, (x, *given[1:]))
    assert again[0] is x and again[2] is packing  # moved once
    assert follow(meta, None, (x, given[1], Packing(torch.tensor([0, 5])), None))[2].lengths == [5]
    assert follow(meta, None, given[:1])[0].device == meta  # the norm behind the layers
    cache = Cache(LlamaConfig(9, 8, 8, 2, 2), torch.float32, ["cpu", meta], 10)
    cache.begin(given[2], [cache.open(4), cache.open(4)])
    cache.write(1, *torch.ones(2, 5, 2, 4, device=meta))
    assert [x.device.type for x in cache.keys] == ["cpu", "meta"]


# ---------------------------------------------------------------------------------------------------------- its memory

CHILD = """
import json, sys, torch
import sample
from benches.loading import memory, reset_peak
from sampling.placing import Placing
from weights import load
torch.set_num_threads(1)
torch.ones(9, 9) @ torch.ones(9, 9)
before = reset_peak()
loaded = load(sys.argv[1], device="cpu", place=Placing(max_memory=sys.argv[2], tokens=256) if sys.argv[2] else None)
requests = [sample.Request([("human", text)], [], 6, logprobs=3) for text in ("Hi", "What color is it? " * 3)]
answers = sample.generate(loaded, requests)
print(json.dumps({"peak": memory("VmHWM") - before, "said": [[a.token_ids, str(a.logprobs)] for a in answers]}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_memory_stays_below_the_limit(tmp_path, tiny_tokenizer):
    """A float32 model of 0.31 GB under 0.16 GB, beside what Python and torch take without it."""
    write_model(tmp_path / "model", {
        "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 15, "num_attention_heads": 10,
        "vocab_size": 512, "max_position_embeddings": 512}, torch.float32)
    copy_tokenizer(tiny_tokenizer, tmp_path / "model")
    results = []
    for limit in ("160MB", ""):
        run = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "model", limit], capture_output=True, text=True,
                             cwd=ROOT)
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))
    limited, whole = results
    assert limited["peak"] < 160e6 < 0.6 * whole["peak"]
    assert limited["said"] == whole["said"]


@on_a_gpu
@pytest.mark.parametrize("homes", [["cpu"] * 3, [DISK] * 3, ["cuda:0", "cpu", DISK]])
def test_layers_come_to_the_gpu(tiny_llava, requests, homes):
    loaded = load(tiny_llava, "float32", "cuda", place=InPieces(homes, "cuda:0"))
    assert answers(loaded, requests) == answers(load(tiny_llava, "float32", "cuda"), requests)


@on_a_gpu
def test_the_gpu_s_memory_stays_below_the_limit(tmp_path, tiny_tokenizer):
    write_model(tmp_path / "model", {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
                                     "num_attention_heads": 16, "vocab_size": 512}, torch.float32)
    copy_tokenizer(tiny_tokenizer, tmp_path / "model")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load(tmp_path / "model", "float32", "cuda", place=Placing(max_memory="300MB", tokens=256))
    limited = answers(loaded, [Request([("human", "Hi")], [], 9)])
    assert torch.cuda.max_memory_allocated() - before < 300e6
    assert limited == answers(load(tmp_path / "model", "float32", "cuda"), [Request([("human", "Hi")], [], 9)])


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_model(tiny_llava, requests):
    loaded = load(tiny_llava, "float32", "cuda", place=Placing("balanced"))
    assert len({next(layer.parameters()).device for layer in loaded.model.language_model.model.layers}) == 2
    assert answers(loaded, requests) == answers(load(tiny_llava, "float32", "cuda"), requests)
