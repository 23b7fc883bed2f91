"""training/checkpoint.py: a run that was killed, stopped or broken goes on as if nothing had happened."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from drawn import draw, ports, rows_of, run_train, words
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata

import train
from formats import files
from training import checkpoint, evaluation

ROOT = Path(__file__).resolve().parent.parent
SAME = "step", "epoch", "loss", "grad_norm", "learning_rate", "learned_tokens", "tokens", "ids", "eval_loss"
STEPS = 8


@pytest.fixture(scope="module")
def flags(tiny_llama, tiny_clip, tmp_path_factory):
    """Eight steps of two micro-batches of two records; of the three in an epoch one is left for the next."""
    scenes = draw(tmp_path_factory.mktemp("scenes"))
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, data_path=scenes / "talks.json", version="v1", per_device_train_batch_size=2,
                gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=STEPS, model_max_length=128, save_steps=2,
                log_samples=True, eval_data_path=scenes / "talks.json", eval_steps=3)


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of the run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight")
    run_train(out, **flags)
    return out


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The folder of a run that Ctrl-C ended after step 5: checkpoint-2, -4 and -5, and the model as it was then."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert start(out, flags) == 130
    return out


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it to go on from."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def start(out, flags, **others):
    """train.py within this process. -> exit status"""
    return train.main(words(use_cpu=True, output_dir=out, **flags | others))


def refusal(out, flags, **others):
    """The sentence that ends a run."""
    with pytest.raises(ValueError) as error:
        start(out, flags, **others)
    return str(error.value)


def at_step(patch, step, action):
    """Do something right after a step's row is written."""
    report = train.Loop.report

    def and_act(loop, row):
        report(loop, row)
        if row["step"] == step:
            action()

    patch.setattr(train.Loop, "report", and_act)


def course(out):
    """log.jsonl, of each row what does not depend on the clock."""
    return [{key: row[key] for key in SAME if key in row} for row in rows_of(out)]


def names(out):
    """The checkpoints of a run."""
    return [folder.name for folder in checkpoint.checkpoints(out).values()]


def assert_same_run(one, other):
    """The same losses to the last bit, each step once, and the same weights."""
    assert course(one) == course(other)
    ours, theirs = (load_file(out / "model.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------------------- kill -9

KILLED = """
import os, signal, sys
import train
from training import checkpoint

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def report(loop, row, report=train.Loop.report):
    report(loop, row)
    if row["step"] == 5 and "step" in sys.argv[1]:
        die()

def complete(temporary, folder, *rest, complete=checkpoint.complete):
    if folder.name == "checkpoint-6" and "save" in sys.argv[1]:
        die()
    return complete(temporary, folder, *rest)

train.Loop.report, checkpoint.complete = report, complete
words = sys.argv[2:]
while words:  # several runs in one process
    end = words.index("--") if "--" in words else len(words)
    os.environ["MASTER_PORT"], *argv = words[:end]
    words = words[end + 1:]
    status = train.main(argv)
sys.exit(status)
"""


def process(when, *runs, rank=None):
    """A process of its own that trains, and dies at step 5 or while it saves checkpoint-6; runs: (port, flags)."""
    argv = [word for port, flags in runs for word in ("--", str(port), *words(use_cpu=True, **flags))][1:]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost"}
    env |= {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen([sys.executable, "-c", KILLED, when, *argv], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("when", ["step", "save"])
def test_a_run_killed_in_a(when, flags, straight, tmp_path, capsys):
    run = process(when, (0, flags | {"output_dir": tmp_path}))
    assert run.wait(60) == -signal.SIGKILL, run.stderr.read()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-6.tmp").exists() == (when == "save") and not (tmp_path / "config.json").exists()
    assert start(tmp_path, flags) == 0
    said = capsys.readouterr()
    assert f"resumed from {tmp_path}/checkpoint-4: 4 of 8 steps are done" in said.out
    assert "log.jsonl: " in said.err and ("checkpoint-6.tmp was never completed" in said.err) == (when == "save")
    assert_same_run(tmp_path, straight)
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "test-save").exists()


def of_two_ranks(flags, folder):
    """The flags for two ranks, and as many records for each."""
    records = json.loads(flags["data_path"].read_text())[:4]
    (folder / "four.json").write_text(json.dumps(records))
    return {key: flags[key] for key in flags if not key.startswith("eval")} | {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "data_path": folder / "four.json"}


def test_two_ranks_killed_go_on_as_two_and_as_one(flags, tmp_path):
    two = of_two_ranks(flags, tmp_path)
    first, second, third = ports(3)
    whole, killed, alone = tmp_path / "whole", tmp_path / "killed", tmp_path / "alone"
    runs = [process("save" if rank == 0 else "", (first, two | {"output_dir": killed}), rank=rank) for rank in (0, 1)]
    assert runs[0].wait(60) == -signal.SIGKILL, runs[0].stderr.read()
    runs[1].kill()
    assert names(killed) == ["checkpoint-2", "checkpoint-4"]
    shutil.copytree(killed, alone)
    runs = [process("", (second, two | {"output_dir": killed}), (third, two | {"output_dir": whole}), rank=rank)
            for rank in (0, 1)]
    assert [run.wait(60) for run in runs] == [0, 0], [run.stderr.read() for run in runs]
    assert_same_run(killed, whole)
    assert start(alone, two, gradient_accumulation_steps=2) == 0
    assert [row["ids"] for row in rows_of(alone)] == [row["ids"] for row in rows_of(whole)]
    for key in "loss", "grad_norm":
        assert [row[key] for row in rows_of(alone)] == pytest.approx([row[key] for row in rows_of(whole)], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_runs_killed_at_random_moments(ranks, flags, tmp_path):
    chance, kills = random.Random(ranks), 0
    flags = (of_two_ranks(flags, tmp_path) if ranks == 2 else flags) | {"save_steps": 1}

    def begin(out):
        port = ports(1)[0]
        return [process("", (port, flags | {"output_dir": out}), rank=rank if ranks == 2 else None)
                for rank in range(ranks)]

    for run in begin(tmp_path / "straight"):
        assert run.wait(120) == 0, run.stderr.read()
    for number in range(20):
        out = tmp_path / f"{number}"
        for _ in range(2):
            before, runs = stamp(out), begin(out)
            while stamp(out) == before and runs[0].poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1))  # about as long as the eight steps take
            for run in chance.sample(runs, ranks):
                kills += run.poll() is None
                run.kill()
                run.wait()
        for run in begin(out):
            assert run.wait(120) == 0, run.stderr.read()
        assert_same_run(out, tmp_path / "straight")
    assert kills > 20 * ranks


def stamp(out):
    """What changes when a run writes into its log.jsonl."""
    log = out / "log.jsonl"
    return log.stat().st_mtime_ns if log.exists() else None


# ------------------------------------------------------------------------------------------------- stopped and finished


def test_ctrl_c_saves_and_the_same_command_goes_on(flags, straight, stopped, half):
    assert names(stopped) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"] and len(rows_of(stopped)) == 7
    assert (stopped / "model.safetensors").exists()
    assert start(half, flags) == 0
    assert_same_run(half, straight)


def test_sigterm_saves_a_checkpoint_only(flags, straight, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start(tmp_path, flags) == 143
    assert "SIGTERM: finishing this step" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"] and not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    assert start(tmp_path, flags) == 0
    assert_same_run(tmp_path, straight)  # also the evaluation of step 3, put off by the stop


@pytest.mark.parametrize("step, saved", [(0, []), (3, [2, 3]), (6, [2, 4, 6])])
def test_a_signal_ends_an_evaluation(step, saved, flags, straight, tmp_path, monkeypatch, capsys):
    def loss(judge, records, loss=evaluation.Judge.loss):
        if now[-1] == step and len(found) == 0:
            found.append(names(out))
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(judge, records)

    def rows(judge, step, rows=evaluation.Judge.rows):
        now.append(step)
        return rows(judge, step)

    out, now, found = tmp_path / "out", [], []
    monkeypatch.setattr(evaluation.Judge, "rows", rows)
    monkeypatch.setattr(evaluation.Judge, "loss", loss)
    assert start(out, flags) == 143
    assert names(out) == [f"checkpoint-{number}" for number in saved] and not (out / "config.json").exists()
    assert found == [[f"checkpoint-{number}" for number in saved if number % 2 == 0]]  # a due one was written before
    assert f"stopped after step {step} of 8; the same command" in capsys.readouterr().out
    assert not [row for row in rows_of(out) if row["step"] == step and "eval_loss" in row]
    assert start(out, flags) == 0
    assert_same_run(out, straight)


def test_a_killed_evaluation_is_written_once(flags, straight, tmp_path, monkeypatch):
    def evaluate(loop, evaluate=train.Loop.evaluate):
        evaluate(loop)
        if loop.step == 6:
            shutil.copytree(tmp_path / "before", tmp_path / "out" / "checkpoint-6", dirs_exist_ok=True)
            raise KeyboardInterrupt

    def save(folder, *rest, save=checkpoint.save):
        save(folder, *rest)
        if str(folder).endswith("checkpoint-6"):
            shutil.copytree(folder, tmp_path / "before")

    monkeypatch.setattr(train.Loop, "evaluate", evaluate)
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "out", flags)
    assert checkpoint.read_state(tmp_path / "out" / "checkpoint-6")["owed"]
    monkeypatch.undo()
    assert start(tmp_path / "out", flags) == 0
    assert_same_run(tmp_path / "out", straight)
    assert not checkpoint.read_state(tmp_path / "out" / "checkpoint-6")["owed"]


def test_an_error_leaves_what_was_reached(flags, straight, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("out of luck")

    at_step(monkeypatch, 5, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        start(tmp_path, flags)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    monkeypatch.undo()
    assert start(tmp_path, flags) == 0
    assert_same_run(tmp_path, straight)


def test_a_finished_run_says_so(flags, straight, capsys):
    before = course(straight)
    assert start(straight, flags, logging_steps=7) == 0
    assert "finished after 8 steps; --overwrite_output_dir begins anew" in capsys.readouterr().out
    assert course(straight) == before
    said = refusal(straight, flags, learning_rate=0.5)
    assert "straight" in said and "with other flags: learning_rate was 0.01, is 0.5" in said


def test_a_finished_run_goes_on_when_asked(flags, straight, tmp_path):
    out = Path(shutil.copytree(straight, tmp_path / "out"))
    assert start(out, flags, max_steps=10, resume_anyway=True) == 0
    steps = [row["step"] for row in rows_of(out) if "loss" in row]
    assert steps == list(range(1, 11)) and names(out)[-1] == "checkpoint-10"


def test_beginning_anew_sets_the_old_run_aside(flags, straight, half, capsys):
    assert start(half, flags, overwrite_output_dir=True) == 0
    assert_same_run(half, straight)
    assert names(half) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    old = {path.name for path in half.glob("*.old*")}
    assert old == {"checkpoint-2.old", "checkpoint-4.old", "checkpoint-5.old", "log.jsonl.old"}
    assert "is of another run and set aside as checkpoint-5.old" in capsys.readouterr().err


def test_a_named_checkpoint_is_gone_on_from(flags, straight, half):
    assert start(half, flags, resume=half / "checkpoint-2") == 0
    assert_same_run(half, straight)
    assert (half / "checkpoint-5.old").exists() and not (half / "checkpoint-2.old").exists()


@pytest.mark.parametrize("others, words", [
    ({"learning_rate": 0.5, "seed": 1}, ["checkpoint-5", "learning_rate was 0.01, is 0.5", "seed was 42, is 1",
                                         "--resume_anyway"]),
    ({"max_steps": 9}, ["max_steps was 8, is 9"]),
    ({"gradient_accumulation_steps": 1}, ["records per step was 4, is 2"]),
    ({"resume": "never"}, ["already holds a model", "--overwrite_output_dir"]),
    ({"resume": "nowhere"}, ["--resume nowhere", "complete checkpoint-N"]),
    ({"resume": "nowhere", "overwrite_output_dir": True}, ["drop one"])])
def test_a_run_that_does_not_fit_is_refused_and_nothing_is_touched(flags, half, others, words):
    before = sorted((path, path.stat().st_mtime_ns) for path in half.rglob("*") if path.is_file())
    said = refusal(half, flags, **others)
    assert all(word in said for word in words), said
    assert sorted((path, path.stat().st_mtime_ns) for path in half.rglob("*") if path.is_file()) == before


def test_a_checkpoint_past_the_end_is_said_and_written(flags, half, tmp_path, capsys):
    assert start(tmp_path / "short", flags, resume=half / "checkpoint-5", resume_anyway=True, max_steps=4) == 0
    said = capsys.readouterr().out
    assert "5 of 4 steps are done; it is past --max_steps 4 already, and nothing is left to learn" in said
    assert not [row for row in rows_of(tmp_path / "short") if "loss" in row] and "ETA" not in said
    assert (tmp_path / "short" / "model.safetensors").exists()


def test_other_flags_go_on_when_asked(flags, half, capsys):
    assert start(half, flags, learning_rate=1e-3, resume_anyway=True) == 0
    assert "WARNING" in (said := capsys.readouterr().err) and "learning_rate was 0.01, is 0.001" in said
    assert rows_of(half)[-2]["step"] == 8


# ------------------------------------------------------------------------------------------------------ what is written


def mend(folder, **others):
    """Put other values into state.json."""
    (folder / "state.json").write_text(json.dumps(checkpoint.read_state(folder) | others))


@pytest.mark.parametrize("damage, words", [
    (lambda folder: os.truncate(folder / "__0_0.distcp", 100), "__0_0.distcp has 100 of"),
    (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    (lambda folder: (folder / "state.json").unlink(), "no readable state.json"),
    (lambda folder: (folder / "state.json").write_text('{"step": 5, "fi'), "no readable state.json"),
    (lambda folder: (folder / "state.json").write_text('{"files": {}}'), "state.json has no proper step, epoch"),
    (lambda folder: mend(folder, step="2"), "state.json has no proper step"),
    (lambda folder: mend(folder, files={"x": "y"}), "incomplete, x is missing")])
def test_a_torn_checkpoint_is_skipped_with_a_word(stopped, tmp_path, capsys, damage, words):
    out = Path(shutil.copytree(stopped, tmp_path / "out"))
    damage(out / "checkpoint-5")
    assert checkpoint.newest(out) == out / "checkpoint-4"
    said = capsys.readouterr().err
    assert "checkpoint-5 is skipped: incomplete" in said and words in said


def test_the_limit_keeps_the_newest(flags, tmp_path):
    assert start(tmp_path, flags, save_total_limit=2, max_steps=7) == 0
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("limit, kept", [(None, 3), (0, 3), (-1, 3), (1, 1), (9, 3)])
def test_no_limit_deletes_all(limit, kept, tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.thin_out(tmp_path, limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3)][-kept:]


def test_epochs_end_where_their_records_do(flags, tmp_path):
    options = flags | {"eval_steps": None, "max_steps": None, "gradient_accumulation_steps": 1}
    options = {key: value for key, value in options.items() if value is not None}
    assert start(tmp_path, options, num_train_epochs=2.5, save_strategy="epoch", evaluation_strategy="epoch") == 0
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert [row["step"] for row in rows_of(tmp_path) if "eval_loss" in row] == [0, 3, 6, 8]


@pytest.mark.parametrize("strategy, expected", [("no", []), ("epoch", ["checkpoint-1", "checkpoint-2"])])
def test_checkpoints_by(strategy, expected, flags, tmp_path):
    assert start(tmp_path, flags, save_strategy=strategy, max_steps=2) == 0
    assert names(tmp_path) == expected


def test_frozen_parts_are_not_in_a_checkpoint(flags, tmp_path):
    assert start(tmp_path, flags, tune_mm_mlp_adapter=True, max_steps=2) == 0
    table = checkpoint.Reader(tmp_path / "checkpoint-2").read_metadata().state_dict_metadata
    stems = {name.split(".")[1] for name in table}
    leaves = {name.rpartition(".")[2] for name in table if name.startswith("optimizer")}
    assert stems == {"mm_projector"} and leaves == {"step", "exp_avg", "exp_avg_sq"}


def test_the_log_is_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 0, "eval_loss": 1}, {"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1}, {"step": 3}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert checkpoint.cut_log(log, 2) == 2
    assert rows_of(tmp_path) == rows[:4] and checkpoint.cut_log(log, 2) == 0
    assert checkpoint.cut_log(tmp_path / "none.jsonl", 2) == 0
    log.write_text('{"step": "x"}\n[5]\n5\n{"loss": 1}\nnull\n{"step": 1, "eval_set": "a"}\n'
                   '{"step": 2, "loss": 1}\n{"step": 2, "eval_set": "a"}\n')
    assert checkpoint.cut_log(log, 2) == 5 and checkpoint.cut_log(log, 2, owed=True) == 1
    assert rows_of(tmp_path) == [{"step": 1, "eval_set": "a"}, {"step": 2, "loss": 1}]


# ------------------------------------------------------------------------------------------------- what must not happen


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def table_of(folder):
    """.metadata as Python's own pickle reads it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def bomb(folder):
    return Bomb(folder.parent / "was-run")


def hidden_bomb(folder):
    table = table_of(folder)
    table.planner_data = Bomb(folder.parent / "was-run")
    return table


def pickled_object(folder):
    table = table_of(folder)
    table.state_dict_metadata["model.mm_projector.0.bias"] = metadata.BytesStorageMetadata()
    return table


def other_file(folder):
    table = table_of(folder)
    next(iter(table.storage_data.values())).relative_path = "../../etc/passwd"
    return table


@pytest.mark.parametrize("attack, words", [
    (bomb, "system"), (hidden_bomb, "system"), (pickled_object, "is no tensor"), (other_file, "../../etc/passwd"),
    (lambda folder: "text", "refused")])
def test_a_malicious_table_is_refused_and_nothing_of_it_is_run(half, attack, words):
    folder = half / "checkpoint-5"
    (folder / ".metadata").write_bytes(pickle.dumps(attack(folder)))
    with pytest.raises(ValueError, match="nothing in it was run") as error:
        checkpoint.Reader(folder).read_metadata()
    assert words in str(error.value) and ".metadata is refused" in str(error.value)
    assert not (half / "was-run").exists()


def test_the_unpickler_does_not_follow_dots(tmp_path):
    for module, name in (("torch", "os.system"), ("torch", "Size.__init__"), ("builtins", "eval"),
                         ("torch.distributed.checkpoint.metadata", "os"), ("pathlib", "PosixPath")):
        code = pickle.PROTO + b"\x04" + b"".join(
            pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name))
        (tmp_path / ".metadata").write_bytes(code + pickle.STACK_GLOBAL + pickle.STOP)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            checkpoint.Reader(tmp_path).read_metadata()


def test_too_little_room_is_said_before_the_first_step(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 300_000)
    said = refusal(tmp_path, flags, max_steps=100)
    assert "50 checkpoints of 0." in said and "and a model of 0." in said and "0.000 GB are free" in said
    assert "--save_total_limit 1" in said and not (tmp_path / "log.jsonl").exists()
    assert not (tmp_path / "test-save").exists()


def test_a_disk_that_fills_up_costs_a_checkpoint_not_the_run(flags, straight, tmp_path, monkeypatch, capsys):
    free = files.free_bytes
    at_step(monkeypatch, 3, lambda: monkeypatch.setattr(files, "free_bytes", lambda folder: 1000))
    at_step(monkeypatch, 5, lambda: monkeypatch.setattr(files, "free_bytes", free))
    assert start(tmp_path, flags) == 0
    assert "checkpoint-4 could not be written: it needs 0.0" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert_same_run(tmp_path, straight)


def test_a_write_that_fails_leaves_nothing_behind(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    at_step(monkeypatch, 3, lambda: monkeypatch.setattr(checkpoint.Writer, "write_data", full))
    assert start(tmp_path, flags, max_steps=5) == 0
    assert "rank 0: [Errno 28] No space left on device; training goes on" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-2"] and not list(tmp_path.glob("*.tmp"))


def test_a_model_that_cannot_be_written_is_found_out_before_the_first_step(flags, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("llava-hf has no words for this")

    monkeypatch.setattr(train.weights.layouts, "llava_hf_config", fail)
    assert "no words for this" in refusal(tmp_path, flags)
    assert not (tmp_path / "log.jsonl").exists()


def make_odd(patch, step, loss=1.0, gradient=1.0):
    """Multiply a step's loss, or only its gradient, with what is no number."""
    true = train.Loop.forward_backward

    def odd(loop, batch):
        losses, *rest = true(loop, batch)
        if loop.step + 1 == step:
            losses = losses * loss
            for p in loop.trained.values():
                p.grad = None if p.grad is None else p.grad * gradient
        return losses, *rest

    patch.setattr(train.Loop, "forward_backward", odd)


@pytest.mark.parametrize("odd, words", [({"loss": float("nan")}, "the loss is nan"),
                                        ({"gradient": float("inf")}, "the gradient is nan")])
def test_no_number_stops_with_the_records(flags, straight, tmp_path, monkeypatch, odd, words):
    make_odd(monkeypatch, 4, **odd)
    said = refusal(tmp_path, flags)
    ids = next(row for row in rows_of(straight) if row["step"] == 4 and "ids" in row)["ids"]
    assert said.startswith(f"step 4: {words} on records {', '.join(sum(ids, []))};") and "--skip_nonfinite 1" in said
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    monkeypatch.undo()
    assert start(tmp_path, flags) == 0
    assert_same_run(tmp_path, straight)


def test_skip_nonfinite_passes_over(flags, straight, tmp_path, monkeypatch, capsys):
    make_odd(monkeypatch, 2, loss=float("nan"))
    make_odd(monkeypatch, 4, gradient=float("nan"))
    assert start(tmp_path, flags, skip_nonfinite=2, max_steps=5) == 0
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [row["loss"] is None for row in rows] == [False, True, False, False, False]
    assert [row["grad_norm"] is None for row in rows] == [False, False, False, True, False]
    assert "passed over, 2 of --skip_nonfinite 2" in capsys.readouterr().out
    other = tmp_path / "other"
    assert "--skip_nonfinite 2" in refusal(other, flags, skip_nonfinite=1, max_steps=5)


def test_a_step_with_nothing_to_learn_says_why(flags, tmp_path):
    said = refusal(tmp_path, flags, model_max_length=3)
    assert said.startswith("step 1: nothing to learn in records ")
    assert "(cut at model_max_length: nothing to learn is left); raise --model_max_length" in said
