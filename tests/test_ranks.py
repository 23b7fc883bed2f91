"""Many ranks: four of them give the curve of one, in every mixture of records; a rank that dies is named by the others.

The ranks are processes on the CPU that talk through gloo. They are started once for all runs that are to be compared:
starting takes longer than these runs do.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from drawn import draw, ports, record, rows_of, words, write

import train
from training.sampler import BatchOrder
from weights import load, save

ROOT = Path(__file__).resolve().parent.parent
RANKS = 4
RUNS = """
import faulthandler, json, os, sys
import train

faulthandler.dump_traceback_later(90)
for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    assert train.main(argv) == 0
"""
DIES = """
import json, os, signal, sys, time
import train
from formats import command
from training import ranks

def forward_backward(loop, batch, go_on=train.Loop.forward_backward):
    result = go_on(loop, batch)
    if loop.step + 1 == 3:
        DOES
    return result

train.Loop.forward_backward = forward_backward
"""


def together(runs, count=RANKS, code=RUNS):
    """Train on `count` ranks, one run after the other; runs: the flags of each. -> the ranks' processes"""
    todo = json.dumps([(port, words(use_cpu=True, **flags)) for port, flags in zip(ports(len(runs)), runs)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost",
                        "WORLD_SIZE": str(count), "MASTER_PORT": str(json.loads(todo)[0][0])}
    return [subprocess.Popen([sys.executable, "-c", code, todo], cwd=ROOT, env=env | {"RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(count)]


def finish(ranks, timeout=120):
    """Wait for them, but not for ever. -> what each said: (stdout, stderr)"""
    late = threading.Timer(timeout, lambda: [rank.kill() for rank in ranks])
    late.start()
    said = [rank.communicate() for rank in ranks]
    late.cancel()
    return said


class DealtToAll:
    """The order of RANKS ranks, for one that accumulates as often: rank after rank."""

    def __init__(self, count, batch, seed, rank, world, lengths, accumulate, accelerate):
        self.orders = [BatchOrder(count, batch, seed, rank, RANKS, lengths, accumulate // RANKS, accelerate)
                       for rank in range(RANKS)]

    def __len__(self):
        return sum(map(len, self.orders))

    def epoch(self):
        return [batch for together in zip(*(order.epoch() for order in self.orders)) for batch in together]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Files of records: mixed (13, some without a picture), seldom (4, one with a picture), few (3)."""
    folder = draw(tmp_path_factory.mktemp("scenes"))
    talks = json.loads((folder / "talks.json").read_text())
    texts = [record(f"text{i}", None, ("human", f"Tell me {i}."), ("gpt", "the circle " * i + "is red"))
             for i in range(8)]
    write(folder / "mixed.json", talks + texts)
    write(folder / "seldom.json", [talks[0], *texts[:3]])
    write(folder / "few.json", talks[:3])
    return folder


@pytest.fixture(scope="module")
def options(tiny_llama, tiny_clip, scenes):
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, version="v1", learning_rate=2e-3, model_max_length=256, log_samples=True,
                save_strategy="no")


CASES = {  # name -> flags; every one of the four ranks has --per_device_train_batch_size records
    "uneven": {"data_path": "mixed", "per_device_train_batch_size": 2, "num_train_epochs": 2},  # 13 records, 16 places
    "replicas": {"data_path": "mixed", "per_device_train_batch_size": 2, "num_train_epochs": 2, "fsdp_replicas": 2,
                 "save_strategy": "steps", "save_steps": 2},
    "replicas_zero2": {"data_path": "mixed", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
                       "max_steps": 2, "fsdp_replicas": 2, "deepspeed": "zero2.json", "max_grad_norm": 1.0},
    "one_picture": {"data_path": "seldom", "per_device_train_batch_size": 1, "max_steps": 3},
    "tower_too": {"data_path": "seldom", "per_device_train_batch_size": 1, "max_steps": 3, "fsdp_replicas": 2,
                  "unfreeze_mm_vision_tower": True, "loss_average": "tokens"},
    "fewer_than_ranks": {"data_path": "few", "per_device_train_batch_size": 1, "max_steps": 3},
    "evaluated": {"data_path": "few", "per_device_train_batch_size": 1, "max_steps": 2, "eval_data_path": "mixed",
                  "per_device_eval_batch_size": 2, "eval_generate": 3, "evaluation_strategy": "steps", "eval_steps": 9},
}


def flags_of(case, options, scenes, out):
    files = {name: scenes / f"{value}.json" for name, value in CASES[case].items() if name.endswith("data_path")}
    return options | CASES[case] | files | {"output_dir": out / case}


@pytest.fixture(scope="module")
def four(options, scenes, tmp_path_factory):
    """The folder of the runs of CASES on four ranks, and what rank 0 said."""
    out = tmp_path_factory.mktemp("four")
    resumed = {"output_dir": out / "resumed", "resume": out / "replicas" / "checkpoint-2"}
    ranks = together([*(flags_of(case, options, scenes, out) for case in CASES),
                      flags_of("uneven", options, scenes, out) | resumed])
    said = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0] * RANKS, [errors for _, errors in said]
    assert not any(text for text, _ in said[1:])  # rank 0 speaks for all
    return out, said[0][0]


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_have_the_curve_of_one(case, four, options, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BatchOrder", DealtToAll)
    flags = flags_of(case, options, scenes, tmp_path) | {"fsdp_replicas": 1}
    flags["gradient_accumulation_steps"] = RANKS * flags.get("gradient_accumulation_steps", 1)
    assert train.main(words(use_cpu=True, **flags)) == 0
    ours, theirs = ([row for row in rows_of(out / case) if "loss" in row] for out in (four[0], tmp_path))
    assert [row["ids"] for row in ours] == [row["ids"] for row in theirs] and len(ours) > 1
    for key in "loss", "grad_norm", "learned_tokens", "tokens", "learning_rate", "epoch":
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5), key


def test_four_ranks_evaluate_as_one(four, options, scenes, tmp_path):
    """Seven batches of 13 records: in the second turn one rank repeats the last batch."""
    assert train.main(words(use_cpu=True, **flags_of("evaluated", options, scenes, tmp_path) | {"max_steps": 1})) == 0
    ours, theirs = ([row for row in rows_of(out / "evaluated") if "eval_loss" in row][0] for out in (four[0], tmp_path))
    for row in ours, theirs:
        row.pop("eval_seconds")
    assert ours == theirs and ours["step"] == 0 and len(ours["eval_answers"]) == 3


def test_a_row_of_four_goes_on_where_two_rows_of_two_stopped(four):
    rows, others = rows_of(four[0] / "resumed"), rows_of(four[0] / "uneven")[2:]
    assert "checkpoint-2: 2 of 4 steps are done" in four[1] and [row["ids"] for row in rows] == [
        row["ids"] for row in others]
    for key in "step", "loss", "grad_norm":
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=1e-5), key


def test_the_cases_are_what_they_are_called(four):
    ids = {case: [row["ids"] for row in rows_of(four[0] / case) if "ids" in row] for case in CASES}
    assert [len(step) for step in ids["uneven"]] == [RANKS] * 4  # two steps an epoch, sixteen places for 13 records
    assert len({name for step in ids["uneven"][:2] for batch in step for name in batch}) == 13
    assert all(sum("one" in batch for batch in step) == 1 for step in ids["one_picture"])
    assert all(len(step) == RANKS and len({name for batch in step for name in batch}) == 3
               for step in ids["fewer_than_ranks"])


def test_rows_that_do_not_divide_the_ranks_are_refused(options, scenes, tmp_path):
    with pytest.raises(ValueError, match="--fsdp_replicas 2 does not divide 1 ranks"):
        train.main(words(use_cpu=True, **flags_of("replicas", options, scenes, tmp_path)))


# --------------------------------------------------------------------------------------------------- what is held where

COUNTS = """
import json, os, sys, weakref
import train
from formats import files
from torch.distributed.tensor import DTensor

held = [0]  # bytes of gathered tensors, at each change

def full_tensor(self, gather=DTensor.full_tensor):
    tensor = gather(self)
    held.append(held[-1] + tensor.nbytes)
    weakref.finalize(tensor, lambda size=tensor.nbytes: held.append(held[-1] - size))
    return tensor

numbers = [0]  # read and cast, all together

def cast_pieces(*tensor, cast=files.cast_pieces):
    result = cast(*tensor)
    numbers.append(numbers[-1] + result.numel())
    return result

DTensor.full_tensor, files.cast_pieces = full_tensor, cast_pieces
""" + RUNS + """
    sys.stdout.write(f"MOST {max(held)} CAST {numbers[-1]}\\n")
"""


def test_no_rank_holds_the_whole_model(options, tmp_path):
    """A rank reads its own rows only; saving gathers one tensor at a time, and writes what one rank writes: after a
    step at a rate of 0 the weights are the same to the last bit on any number of ranks."""
    half = load(options["model_name_or_path"], dtype="bfloat16")  # so that reading is casting, which can be counted
    save(half, tmp_path / "half")
    full = options | {"data_path": options["image_folder"] / "few.json", "max_steps": 1, "warmup_steps": 1,
                      "per_device_train_batch_size": 1, "max_shard_size": "60KB"}
    stage1 = full | {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True}
    half_flags = full | {"model_name_or_path": tmp_path / "half"}
    runs = {"full": full, "stage1": stage1, "cast": half_flags}
    pair = together([flags | {"output_dir": tmp_path / f"two-{name}"} for name, flags in runs.items()], 2, COUNTS)
    said = finish(pair)
    assert [rank.returncode for rank in pair] == [0, 0], said
    for name, flags in runs.items():
        flags = flags | {"gradient_accumulation_steps": 2, "output_dir": tmp_path / f"one-{name}"}
        assert train.main(words(use_cpu=True, **flags)) == 0
        one, two = ({file.name: file.read_bytes() for file in (tmp_path / f"{count}-{name}").iterdir()
                     if file.name not in ("log.jsonl", "training_args.json")} for count in ("one", "two"))
        assert one.keys() == two.keys() and len([n for n in one if n.startswith("model-")]) > 3
        assert [name for name in one if one[name] != two[name]] == []
        assert ("mm_projector.bin" in one) == (name == "stage1")
        rows, others = (rows_of(tmp_path / f"{count}-{name}")[0] for count in ("one", "two"))
        assert [rows[key] for key in ("loss", "grad_norm")] == pytest.approx(
            [others[key] for key in ("loss", "grad_norm")], rel=1e-5)
    row, own = 32 * 4, sum(p.numel() for p in half.model.parameters()) // 2
    for text, _ in said:  # most: the embeddings, then with <im_start> and <im_end>
        counts = [(int(most), int(cast)) for most, cast in re.findall(r"MOST (\d+) CAST (\d+)", text)]
        assert counts == [(400 * row, 0), (402 * row, 0), (402 * row, own)]


# ------------------------------------------------------------------------------------------------------- a rank is gone

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
ENDS = {  # what happens in step 3: what the ranks do, which one is gone, how that is said
    # rank 0 keeps it where torchrun does not; what the others have heard may be a second old
    "killed_with_the_store": (f"loop.mesh.get_rank() or (time.sleep(3), {KILL})", 0, "has died"),
    "error": ("assert loop.mesh.get_rank() == 0, 'out of luck'", 1, "has stopped"),
    "waiting_in_vain": (f"{KILL} if loop.mesh.get_rank() else time.sleep(100)", 1, "has died"),
}


def at_work(scenes, rank):
    """The records of a rank of two in step 3."""
    records = json.loads((scenes / "mixed.json").read_text())
    return ", ".join(records[i]["id"] for i in BatchOrder(len(records), 2, 42, rank, 2).epoch()[2])


@pytest.mark.parametrize("end", [pytest.param("killed_with_the_store", marks=pytest.mark.slow), *list(ENDS)[1:]])
def test_the_others_say_which_rank_is_gone_and_its_records(end, options, scenes, tmp_path):
    does, gone, says = ENDS[end]
    code = DIES.replace("DOES", does) + "command.run(lambda: train.main(json.loads(sys.argv[1])[0][1]))"
    if end == "waiting_in_vain":
        code = code.replace("command.run", "ranks.LONG, ranks.SHORT = 6, 2\ncommand.run")
    pair = together([flags_of("uneven", options, scenes, tmp_path)], 2, code)
    said = [errors for _, errors in finish(pair, 60)]
    line = said[1 - gone].strip().splitlines()[-1]
    assert pair[1 - gone].returncode == 2, said
    assert line.startswith(f"error: rank {gone} of 2 (process {pair[gone].pid} on {socket.gethostname()}) {says}")
    assert f" in step 3, at work on records {at_work(scenes, gone)}" in line
    if end == "error":
        assert line.endswith(": out of luck; the same command goes on from the newest checkpoint")
        assert "out of luck" in said[gone]
    else:
        assert pair[gone].returncode == -signal.SIGKILL


def test_torchrun_leaves_the_survivors_the_time_to_say_so(options, scenes, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES.replace("DOES", f"loop.mesh.get_rank() == 1 and {KILL}") + "command.run(train.main)")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    run = subprocess.run([*command, *words(use_cpu=True, **flags_of("uneven", options, scenes, tmp_path))], cwd=ROOT,
                         env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert re.search(rf"error: rank 1 of 2 \(process \d+ on .*\) has died in step 3, at work on records "
                     rf"{at_work(scenes, 1)}; the same command goes on", run.stderr), run.stderr
