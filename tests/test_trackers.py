"""training/trackers.py: the curves arrive at the trackers as they stand in log.jsonl, and no tracker can cost a run."""

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from drawn import draw, rows_of, words
from test_checkpoint import at_step

import train
from training import flags, trackers


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def start(tiny_llama, tiny_clip, scenes, tmp_path):
    """start(**flags) trains six steps of stage 1 into tmp_path / "out". -> exit status"""
    given = dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, image_folder=scenes, version="plain",
                 data_path=scenes / "captions.json", tune_mm_mlp_adapter=True, per_device_train_batch_size=2,
                 learning_rate=1e-2, use_cpu=True, output_dir=tmp_path / "out", save_projector_only=True, max_steps=6)
    return lambda **options: train.main(words(**given | options))


class TensorBoard:
    """What torch.utils.tensorboard has. runs: folder -> [(purge_step, {(name, step): number})], a pair per start"""

    def __init__(self):
        self.runs, self.closed = {}, 0

    def SummaryWriter(self, folder, purge_step):
        numbers = {}
        self.runs.setdefault(folder, []).append((purge_step, numbers))
        return SimpleNamespace(add_scalar=lambda name, number, step: numbers.update({(name, step): number}),
                               flush=lambda: None, close=self.close)

    def close(self):
        self.closed += 1


class Wandb:
    """What the module wandb has."""

    def __init__(self):
        self.runs, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.runs.append(options)
        return SimpleNamespace(log=lambda numbers, step: self.rows.append((step, numbers)), finish=self.finish)

    def finish(self):
        self.finished += 1


@pytest.fixture
def board(monkeypatch):
    fake = TensorBoard()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return fake


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tensorboard_gets_every_logging_steps_row_and_the_evaluations(start, board, scenes, tmp_path):
    held_out = scenes / "talks.json"
    assert start(report_to="tensorboard", logging_steps=4, eval_data_path=held_out, eval_steps=3, eval_generate=1) == 0
    (folder, [(purge, numbers)]), = board.runs.items()
    assert folder == str(tmp_path / "out" / "runs") and purge == 0 and board.closed == 1
    logged = {row["step"]: row for row in rows_of(tmp_path / "out") if "loss" in row}
    for name in "loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second":
        of_steps = {step: number for (key, step), number in numbers.items() if key == f"train/{name}"}
        assert of_steps == {step: logged[step][name] for step in (4, 6)}  # the last one always
    judged = {row["step"]: row["eval_loss"] for row in rows_of(tmp_path / "out") if "eval_loss" in row}
    assert {step: number for (key, step), number in numbers.items() if key == "eval/loss"} == judged
    assert judged.keys() == {0, 3, 6} and ("eval/match", 6) in numbers
    assert not any("answers" in key or "ids" in key or key.endswith("/step") for key, _ in numbers)


def test_wandb_goes_on_with_the_same_run_and_the_same_steps(start, wandb, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(report_to="wandb", run_name="mine", save_steps=2) == 143
    monkeypatch.setenv("WANDB_PROJECT", "shapes")
    assert start(report_to="wandb", run_name="mine", save_steps=2) == 0
    first, second = wandb.runs
    assert first["project"] == "pumice" and second["project"] == "shapes" and first["name"] == "mine"
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["learning_rate"] == 1e-2
    json.dumps(first["config"])
    assert [step for step, _ in wandb.rows] == [1, 2, 3, 4, 5, 6] and wandb.finished == 2
    assert [row["train/loss"] for _, row in wandb.rows] == [row["loss"] for row in rows_of(tmp_path / "out")]
    assert start(report_to="wandb", overwrite_output_dir=True) == 0  # another run
    assert wandb.runs[2]["id"] != first["id"] and wandb.runs[2]["name"] == str(tmp_path / "out")


def test_tensorboard_takes_back_what_a_resumed_run_does_again(start, board, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(report_to="all", save_steps=2)
    assert board.closed == 1  # what was sent is there, whatever ended the run
    assert start(report_to="tensorboard", save_steps=2) == 0
    (_, [(_, before), (purge, after)]), = board.runs.items()
    assert purge == 6 and {step for _, step in before} == {1, 2, 3, 4, 5} and {step for _, step in after} == {6}


def test_a_tracker_that_is_missing_or_fails_is_a_sentence_and_training_goes_on(start, wandb, tmp_path, monkeypatch,
                                                                               capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # cannot be imported
    wandb.init = lambda **options: 1 / 0
    assert start(report_to="all") == 0
    said = capsys.readouterr().err
    assert "--report_to tensorboard: tensorboard is not installed (pip install tensorboard); training goes on" in said
    assert "--report_to wandb: wandb failed (ZeroDivisionError: division by zero); training goes on" in said
    assert len(rows_of(tmp_path / "out")) == 6


def test_a_tracker_that_fails_later_is_dropped(board, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.dist, "get_rank", lambda: 1)
    args = SimpleNamespace(output_dir=tmp_path, eval_data_path="a.json,b.json", report_to=["tensorboard"])
    trackers.Trackers(args, 3).log({"step": 4, "loss": 1.0})
    assert not board.runs  # another rank than the first is silent
    monkeypatch.setattr(trackers.dist, "get_rank", lambda: 0)
    made = trackers.Trackers(args, 3)
    made.log({"step": 4, "loss": 1.0, "learning_rate": [1e-3, 2e-5], "ids": [["a"]]})
    made.log({"step": 4, "eval_set": "a", "eval_loss": 2.0, "eval_match": None, "eval_match_by_kind": {"color": 1}})
    (purge, numbers), = board.runs[str(tmp_path / "runs")]
    assert purge == 4 and numbers == {("train/loss", 4): 1.0, ("train/learning_rate", 4): 1e-3, ("eval/a_loss", 4): 2.0}
    made.running["tensorboard"] = lambda numbers, step: 1 / 0, board.close
    made.log({"step": 5, "loss": 1.0})
    made.log({"step": 6, "loss": 1.0})
    made.close()
    assert capsys.readouterr().err.count("tensorboard failed (ZeroDivisionError") == 1 and not board.closed


def test_nothing_is_imported_unless_it_is_asked_for(start, board, wandb):
    assert start(max_steps=1, report_to="none") == 0
    assert not board.runs and not wandb.runs


@pytest.mark.parametrize("given, expected", [
    ("", None), ("--report_to none", None), ("--report_to all", ["tensorboard", "wandb"]),
    ("--report_to wandb", ["wandb"]), ("--report_to wandb tensorboard", ["tensorboard", "wandb"]),
    ("--report_to tensorboard,wandb", ["tensorboard", "wandb"])])
def test_names_of_trackers(given, expected):
    assert flags.parse(f"--model_name_or_path m --data_path d --output_dir o {given}".split()).report_to == expected


def test_a_tracker_that_is_not_known():
    with pytest.raises(ValueError, match="--report_to mlflow: use tensorboard, wandb, all or none"):
        flags.parse("--model_name_or_path m --data_path d --output_dir o --report_to mlflow".split())
