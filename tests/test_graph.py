"""sampling/graph.py: a recorded step says what the plain one says; when it is recorded, and when anew."""

from types import SimpleNamespace

import pytest
import torch
from drawn import draw
from kernel_cases import tiny
from test_kernels import on_a_gpu

import sample
from kernels import choice
from model import Cache
from sample import Request, generate
from sampling import graph
from weights import load


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_clip):
    return load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                device="cpu")


@pytest.fixture
def requests(tmp_path):
    """That come and go, with pictures and without, drawn and greedy, one with guesses, one with beams."""
    pictures = draw(tmp_path)
    return [Request([("human", "word " * (1 + 5 * (i % 4)))], [pictures / "a.png"] * (i % 3 == 0), 4 + 7 * i, seed=i,
                    temperature=(i % 2) * 0.8, lookup=3 * (i == 4), num_beams=1 + 2 * (i == 2)) for i in range(6)]


@pytest.fixture
def recorded(monkeypatch):
    """Steps are "recorded" on a CPU: what is played back is the same work on the same tensors. -> the recordings"""
    made = []

    def record(run):
        result = run()
        made.append(SimpleNamespace(replay=lambda: (play(result, run), made[i].times.append(1)), times=[]))
        i = len(made) - 1
        return made[i], result, []

    def play(result, run):
        result.copy_(run())

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "can_be_recorded", lambda model: True)
    return made


def texts(answers):
    return [(answer.token_ids, answer.text) for answer in answers]


def test_answers_from_recorded_steps_are_the_plain_ones(loaded, requests, recorded, monkeypatch):
    ours = texts(generate(loaded, requests, batch_size=3))
    assert len(recorded) > 1 and sum(len(record.times) for record in recorded) > 20
    monkeypatch.setattr(loaded, "eager", True)
    recorded.clear()
    assert texts(generate(loaded, requests, batch_size=3)) == ours and not recorded


def test_without_a_gpu_nothing_is_recorded(loaded, requests, monkeypatch):
    monkeypatch.setattr(graph, "record", lambda run: pytest.fail("recorded on a CPU"))
    assert not sample.Engine(loaded).decoder.records
    plain = texts(generate(loaded, requests))
    monkeypatch.setattr(graph, "can_be_recorded", lambda model: True)
    monkeypatch.setattr(graph, "TRIES", 10**9)  # the same step, never recorded
    assert texts(generate(loaded, requests)) == plain


def test_inference_mode_is_for_plain_weights_that_learn_nothing():
    """FSDP's are no plain tensors, and it keeps what it gathers of them, for training as well."""
    class Sharded(torch.Tensor):
        pass

    model, _ = tiny()
    cache, head = Cache(model.config.text, torch.float32, "cpu"), model.language_model.lm_head
    assert graph.Decoder(model.requires_grad_(True), cache).mode is torch.no_grad
    assert graph.Decoder(model.requires_grad_(False), cache).mode is torch.inference_mode
    head.weight = torch.nn.Parameter(head.weight.data.as_subclass(Sharded), requires_grad=False)
    assert graph.Decoder(model, cache).mode is torch.no_grad


def test_eager_on_the_command_line_records_nothing(recorded, capsys, monkeypatch):
    monkeypatch.setattr(graph, "TRIES", 0)
    words = ["--prompt", "what color is the circle ?", "--max_new_tokens", "9", "--device", "cpu"]
    assert sample.main(words) == 0 and len(recorded) == 1
    assert sample.main([*words, "--eager"]) == 0 and len(recorded) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0] == said[1]


def decoding(lengths, room=0):
    """A model, its cache, and stretches of so many rows that it has read."""
    model, _ = tiny()
    cache = Cache(model.config.text, torch.float32, "cpu", 0)
    stretches = [cache.open(length + room) for length in lengths]
    for stretch, length in zip(stretches, lengths):
        step_plainly(model, cache, [list(range(5, 5 + length))], [stretch])
    return model, cache, stretches


@torch.no_grad()
def step_plainly(model, cache, rows, stretches):
    """Model.logits of several new tokens of each."""
    positions = [stretch.length + i for stretch, row in zip(stretches, rows) for i in range(len(row))]
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return model.logits(SimpleNamespace(
        input_ids=torch.tensor(sum(rows, [])), position_ids=torch.tensor(positions), cu_seqlens=bounds, ids=[],
        pixel_values=torch.empty(0, 3, 14, 14), image_sizes=[]), cache, stretches)


@torch.no_grad()
def test_scores_are_the_plain_steps_and_the_numbers_stay_where_they_are(recorded):
    (model, cache, ours), (_, other, plain) = decoding([3, 9, 5], 20), decoding([3, 9, 5], 20)
    decoder, at = graph.Decoder(model, cache), set()
    for token in range(10, 22):
        found = decoder([token, token + 1, token + 2], ours)
        right = step_plainly(model, other, [[token], [token + 1], [token + 2]], plain)
        torch.testing.assert_close(found, right, rtol=0, atol=2e-6)
        step, = decoder.steps.values()
        at.add((step.numbers.data_ptr(), found.data_ptr()) if step.graph else step.numbers.data_ptr())
    assert [s.length for s in ours] == [s.length for s in plain] == [15, 21, 17]
    assert len(recorded) == 1 and len(recorded[0].times) == 12 - graph.TRIES and len(at) == 2


@torch.no_grad()
def test_steps_are_recorded_anew_when_rows_lengths_or_pools_change(recorded, monkeypatch):
    monkeypatch.setattr(graph, "SHORTEST", 16)
    model, cache, stretches = decoding([3, 9, 5], 40)
    decoder = graph.Decoder(model, cache)

    def go(count, times=graph.TRIES + 2):
        for _ in range(times):
            decoder([7] * count, stretches[:count])
        return len(recorded), list(decoder.steps)

    assert go(3) == (1, [(4, 16)])  # the fourth row is nobody's
    assert [s.length for s in stretches] == [7, 13, 9] and len(cache.stretches) == 4
    assert go(1) == (2, [(4, 16), (1, 16)])
    assert go(3, 3) == (2, [(4, 16), (1, 16)]) and stretches[1].length == 16  # played back
    assert go(3) == (3, [(4, 16), (1, 16), (4, 32)])
    more = len(cache.keys[0])
    cache.open(more)  # the pool grows, and lies elsewhere
    assert go(3) == (4, [(4, 32)]) and len(cache.keys[0]) > more


@torch.no_grad()
def test_what_cannot_be_recorded_is_said_and_runs(monkeypatch):
    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "can_be_recorded", lambda model: True)
    (model, cache, ours), (_, other, plain) = decoding([3], 20), decoding([3], 20)
    decoder = graph.Decoder(model, cache)
    with pytest.warns(UserWarning, match="runs without: operation not permitted") as told:
        for _ in range(5):
            found, right = decoder([7], ours), step_plainly(model, other, [[7]], plain)
            torch.testing.assert_close(found, right, rtol=0, atol=2e-6)
    assert len(told) == 1


def test_what_lies_in_several_places_or_is_fetched_is_not_recorded(monkeypatch):
    model = tiny()[0]
    assert not graph.can_be_recorded(model)  # on a CPU
    first, other, wide = (SimpleNamespace(data=torch.empty(0), device=torch.device("cuda", i), dtype=dtype)
                          for i, dtype in ((0, torch.bfloat16), (1, torch.bfloat16), (0, torch.float32)))

    def made(weight, *parameters, hooks=None):
        module = SimpleNamespace(_forward_pre_hooks=hooks, _forward_hooks={})
        return SimpleNamespace(language_model=SimpleNamespace(
            parameters=lambda: iter([weight, *parameters]), modules=lambda: iter([module]),
            model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))))

    monkeypatch.setattr(choice, "device_has_triton", lambda device: True)
    assert graph.can_be_recorded(made(first, first))
    assert not graph.can_be_recorded(made(first, other))
    assert not graph.can_be_recorded(made(first, hooks={1: print}))
    assert not graph.can_be_recorded(made(wide))  # whose attention is the reference's
    monkeypatch.setattr(choice, "rules", lambda: dict.fromkeys(choice.KERNELS, "reference"))
    assert not graph.can_be_recorded(made(first, first))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_equal_plain_ones_on_a_gpu(tiny_llama, tiny_clip, requests, dtype, monkeypatch):
    loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                  device="cuda", dtype=dtype)
    if dtype == torch.float32:
        monkeypatch.setattr(choice, "rules", lambda: dict.fromkeys(choice.KERNELS, "triton"))
    greedy = [Request(r.messages, r.images, 60) for r in requests]
    assert sample.Engine(loaded).decoder.records
    ours = texts(generate(loaded, greedy, batch_size=4))
    loaded.eager = True
    plain = texts(generate(loaded, greedy, batch_size=4))
    if dtype == torch.float32:
        assert ours == plain
    else:  # near ties may fall either way
        assert sum(a[0][:10] == b[0][:10] for a, b in zip(ours, plain)) >= 4
