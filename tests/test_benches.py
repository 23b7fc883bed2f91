"""benches: rows compare the same numbers on both sides, and come out as a table, as JSON and as a picture."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from benches import __main__ as benches  # noqa: E402
from benches import gpu, gpu_models, loading, quantising, training  # noqa: E402
from benches.adapters import row_of  # noqa: E402
from formats import command  # noqa: E402
from training import flags  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_both_loaders_read_the_same_weights(tmp_path):
    loading.make(tmp_path / "x", loading.SMALL, torch.float32)
    ours, theirs = (loading.measured(who, tmp_path / "x", "bfloat16") for who in ("ours", "transformers"))
    assert ours["checksum"] == theirs["checksum"] != 0
    assert ours["seconds"] > 0 and ours.keys() == theirs.keys()


def run(monkeypatch, *arguments):
    row = {"ours": 0.5, "peer": 1.0, "peer_name": "peer", "unit": "s", "error": 0.0}
    rows = {"a": lambda smoke: row, "b": lambda smoke: row | {"peer": 0.25 if smoke else 0.5}}
    monkeypatch.setattr(benches, "ROWS", {"cpu": rows, "gpu": {}})
    monkeypatch.setattr(sys, "argv", ["benches", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        command.run(benches.main)
    return end.value.code or 0


def test_rows_as_table_json_and_picture(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "cpu", "--smoke", "--json", tmp_path / "x.json", "--png", tmp_path / "x.png") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["ratio"] for row in rows] == [2.0, 0.5]
    assert rows[0].keys() == {"row", "ours", "peer", "peer_name", "unit", "ratio", "error", "versions"}
    assert Image.open(tmp_path / "x.png").size == (1000, 60 + 2 * 76)
    assert run(monkeypatch, "cpu", "b") == 0 and capsys.readouterr().out.startswith("b ")
    assert run(monkeypatch, "cpu", "c") == 2 and "no cpu row c; there are a, b" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["attention_llava", "attention_tower", "attention_2048_backward", "attention_cache_16",
                                 "loss_stage1", "rms_norm", "swiglu", "rotate", "nf4_1_row_planar", "lora_dropout",
                                 "blocks_forward"])
def test_rows_of_kernels_run_at_toy_size_and_both_sides_agree(row):
    found = gpu.ROWS[row](smoke=True)
    assert found["ours"] > 0 and found["peer"] > 0 and found["error"] < 1e-5 and found["peers"]


@pytest.mark.parametrize("row", ["step_stage1_7b", "step_lora_7b", "prefill_7b_16", "decode_7b_16"])
def test_rows_of_whole_models_run_at_toy_size_and_both_sides_agree(row):
    pytest.importorskip("peft")
    found = gpu_models.ROWS[row](smoke=True)
    assert found["ours"] > 0 and found["error"] < 1e-5 and found["share"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpus_rows_say_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benches", "gpu", "rotate"])
    with pytest.raises(SystemExit):
        command.run(benches.main)
    assert "there is no CUDA GPU here; --smoke shows on a CPU that the rows run" in capsys.readouterr().err


def test_a_peer_that_does_not_run_is_named_and_left_out(capsys):
    def broken():
        raise RuntimeError("No available kernel")

    sides = {"slow": lambda: (torch.zeros(9).exp(),), "broken": broken}
    row = gpu.contest(True, lambda: (torch.ones(9),), sides, lambda: (torch.ones(9),), traffic=72)
    assert set(row["peers"]) == {"slow"} and row["share"] == row["floor"] / row["ours"]
    assert "broken does not run here: RuntimeError 'No available kernel'" in capsys.readouterr().err
    alone = gpu.contest(True, lambda: (torch.ones(9),), {"broken": broken}, lambda: (torch.ones(9),))
    assert alone["peer"] is alone["peer_name"] is None and alone["ours"] > 0
    assert "and no peer here" in benches.line({"row": "x", "ratio": None} | alone)
    with pytest.raises(RuntimeError):
        gpu.contest(True, broken, {"slow": sides["slow"]})


def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    alone = {"ours": 0.5, "peer": None, "peer_name": None, "unit": "ms", "error": 0.0}
    monkeypatch.setattr(benches, "ROWS", {"cpu": {"a": lambda smoke: 1 / 0, "b": lambda smoke: alone}, "gpu": {}})
    monkeypatch.setattr(sys, "argv", ["x", "cpu", "--json", str(tmp_path / "x"), "--png", str(tmp_path / "x.png")])
    assert benches.main() == 1
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()] == [["a", "failed"], ["b", "ours"]]
    assert "ZeroDivisionError" in err and [row["row"] for row in json.loads((tmp_path / "x").read_text())] == ["b"]


def test_without_bitsandbytes_the_peer_is_in_16_bits(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert gpu_models.ROWS["decode_7b_nf4"](smoke=True)["peer_name"] == "transformers in 16 bits"
    assert gpu.ROWS["nf4_1_row"](smoke=True)["peer"] is None


def test_what_is_timed_of_a_peer_is_not_put_in_our_order():
    row = gpu.contest(True, lambda: (torch.ones(4),), {"other": lambda: (2 * torch.ones(2, 2),)},
                      lambda: (torch.ones(4),), seen=lambda results: tuple(x.flatten() / 2 for x in results))
    assert row["error"] == row["peer_error"] == 0


def test_adapters_are_a_row_for_each_run(tmp_path):
    words = f"--lora_enable True --lora_r 4 --bf16 --output_dir {tmp_path} --data_path x.json --model_name_or_path"
    args = flags.parse([*words.split(), str(ROOT / "miniature/llava")])
    (tmp_path / "training_args.json").write_text(json.dumps(vars(args)))
    rows = [{"step": 1, "loss": 2.0, "seconds": 0.5, "memory_gb": 1.5},
            {"step": 1, "eval_set": "eval", "eval_loss": 1.0, "eval_match": 0.75, "eval_match_shuffled": 0.25,
             "eval_match_blank": 0.125}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name, *sight, trained, weights, gradients, moments, seconds, peak = row_of(tmp_path)
    assert name == tmp_path.name and sight == ["0.750", "0.250", "0.125"] and (seconds, peak) == ("0.50", "1.50")
    config = json.loads((ROOT / "miniature/llava/config.json").read_text())["text_config"]
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = config["num_key_value_heads"] * (config.get("head_dim") or width // heads)
    pairs = 2 * (width + width) + 2 * (width + kv) + 3 * (width + inner)  # q, o; k, v; gate, up, down
    count = int(trained.replace(",", ""))
    projector = count - 4 * pairs * config["num_hidden_layers"]
    assert 0 < projector < 100_000 and float(gradients) == round(4 * count / 1e6, 1)
    assert float(moments) == round(8 * count / 1e6, 1) and float(weights) > 1


@pytest.mark.parametrize("stage, pure", [("pretrain", False), ("finetune", False), ("finetune", True)])
def test_a_step_trains_the_same_model_as_transformers(stage, pure):
    row = training.race(stage, pure, smoke=True)
    assert 0 < row["ours"] and 0 < row["peer"] and row["error"] < 0.02


@pytest.mark.parametrize("bits, peak", [(16, False), (16, True), (4, False), (4, True)])
def test_an_adapter_s_step_is_that_of_peft(bits, peak):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    row = quantising.race(bits, smoke=True, peak=peak)
    assert 0 < row["ours"] and 0 < row["peer"] and row["error"] < 0.02


def test_the_same_parameters_of_both_sides_learn_the_same():
    """As far as bfloat16 can tell."""
    torch.manual_seed(0)
    config = training.LlavaConfig(training.SMALL, training.SMALL_TOWER, "mlp2x_gelu")
    model, batch = training.Llava(config), training.drawn("finetune", config, 0)
    theirs, ours = (side("finetune", model, True) for side in (training.theirs, training.ours))
    assert sorted(p.shape for p in ours.trained) == sorted(p.shape for p in theirs.trained)
    norms = []
    for side in (ours, theirs):
        side.loss(batch).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in side.trained]).item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_memory_of_a_step_is_what_its_tensors_take():
    """A step that allocates 4 MB at a time, of which 1 MB stays."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            ctx.kept, work = torch.empty(2**18), torch.empty(3 * 2**18)
            return work[:1].sum() * 0 + p.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(4)

    p = torch.nn.Parameter(torch.zeros(4))
    side = training.Side(lambda batch: Loss.apply(p), [p], torch.optim.SGD([p]))
    assert training.allocated(side, None) == pytest.approx(4 * 2**20, rel=0.01)


@pytest.mark.parametrize("name", ["prefill", "decode_bf16", "decode_int8", "batch_16"])
def test_rows_of_answers_compare_the_same_model(name):
    """As far as bfloat16, and int8, can tell; the scores' standard deviation is 8."""
    row = benches.ROWS["cpu"][name](True)
    assert row["ours"] > 0 and row["peer"] > 0 and row["error"] < (1.5 if "int8" in name else 0.5)


@pytest.mark.parametrize("name", ["pipeline", "startup"])
def test_rows_of_the_data(name):
    row = benches.ROWS["cpu"][name](True)
    assert row["ours"] > 0 and row["peer"] > 0
