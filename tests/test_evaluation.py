"""training/evaluation.py: the sight meter, held against answerers of which we know what they see; the best model."""

import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from drawn import COLOURS, draw, record, rows_of, words, write
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import at_step, make_odd, names, ports, process

import data
import train
from model import IGNORE_INDEX
from sample import Answer
from training import checkpoint, evaluation, flags
from training.evaluation import Judge, plain
from weights import load


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_clip):
    return load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                device="cpu")


@pytest.fixture
def judge(loaded, scenes, tmp_path):
    """judge(*records, **flags) -> the Judge of one file with these records."""
    def make(*records, **options):
        path = write(tmp_path / "held_out.json", records)
        flags = {"eval_pictures": "true,shuffled,blank", "eval_generate": 100, "per_device_eval_batch_size": 2,
                 "model_max_length": 512, "image_folder": str(scenes), "eval_data_path": str(path),
                 "on_bad_record": "stop", "on_bad_image": "stop"}
        return Judge(SimpleNamespace(**flags | options), loaded)
    return make


@pytest.fixture
def rigged(monkeypatch):
    """rigged(answer) puts answer(question, pictures) in the model's place; -> the list of all requests as they come."""
    def rig(answer):
        asked = []

        def generate(loaded, requests, batch_size):
            asked.extend(requests)
            return [Answer(answer(r.messages[-1][1], [name_of(image) for image in r.images]), [], []) for r in requests]

        monkeypatch.setattr(evaluation, "generate", generate)
        return asked
    return rig


def name_of(image):
    """A picture's file name, or grey."""
    return "grey" if isinstance(image, Image.Image) else image.rpartition("/")[2]


def see(question, pictures):
    """One who sees: names the colour of the first picture."""
    return COLOURS.get(pictures[0], "nothing") if pictures else "words"


def question(name, image, answer, kind="color"):
    tags = "<image>\n" * (len(image) if isinstance(image, list) else 1 if image else 0)
    return record(name, image, ("human", tags + "What color?"), ("gpt", answer), kind=kind)


COLOURED = [question(name, name, f"{colour}.") for name, colour in COLOURS.items()]


def test_who_sees_is_right_with_the_true_picture_only(judge, rigged):
    rigged(see)
    row, = judge(*COLOURED).rows(7)
    assert (row["step"], row["eval_set"]) == (7, "held_out")
    assert (row["eval_match"], row["eval_match_shuffled"], row["eval_match_blank"]) == (1, 0, 0)
    assert row["eval_answers"][0] == {"id": "a.png", "kind": "color", "question": "<image>\nWhat color?",
                                      "expected": "red.", "answer": "red"}


def test_who_guesses_is_as_good_without_the_picture(judge, rigged):
    rigged(lambda question, pictures: "Red")
    row, = judge(*COLOURED).rows(0)
    assert row["eval_match"] == row["eval_match_shuffled"] == row["eval_match_blank"] == 0.2


def test_shuffled_never_shows_a_question_its_own_picture(judge, rigged):
    records = [question(str(i), image, "x") for i, image in enumerate(
        ["a.png", "a.png", "b.png", ["a.png", "b.png"], ["b.png", "c.png"], ["c.png", "d.png"], ["e.png"]])]
    asked = rigged(see)
    list(judge(*records, eval_pictures="true").rows(0))
    true = [[name_of(image) for image in request.images] for request in asked]
    asked.clear()
    list(judge(*records, eval_pictures="shuffled").rows(0))
    shuffled = [[name_of(image) for image in request.images] for request in asked]
    true.remove(["b.png", "c.png"])  # both other pairs share a picture with it: it cannot be asked
    assert len(shuffled) == len(true)
    assert all(len(a) == len(b) and not set(a) & set(b) for a, b in zip(true, shuffled))


def test_blank_shows_as_many_grey_pictures(judge, rigged):
    asked = rigged(see)
    list(judge(question("one", "a.png", "x"), question("two", ["a.png", "b.png"], "x"), eval_pictures="blank").rows(0))
    assert [len(request.images) for request in asked] == [1, 2]
    assert asked[0].images[0].getextrema() == ((122, 122), (116, 116), (104, 104))


def test_questions_without_a_picture_count_with_the_true_one_only(judge, rigged):
    asked = rigged(see)
    row, = judge(question("text", None, "Words"), *COLOURED[:2]).rows(0)
    assert row["eval_match"] == 1 and row["eval_match_shuffled"] == row["eval_match_blank"] == 0
    assert sum(not request.images for request in asked) == 1


def test_a_meter_that_cannot_be_read_is_null(judge, rigged):
    rigged(see)
    row, = judge(question("only", "a.png", "red")).rows(0)
    assert row["eval_match"] == 1 and row["eval_match_shuffled"] is None and row["eval_match_blank"] == 0
    assert "shuffled" not in evaluation.line(row)


def test_each_short_kind_weighs_the_same_and_long_answers_stand_apart(judge, rigged):
    rigged(see)
    records = [question("a", "a.png", "red"), question("b", "b.png", "green"), question("c", "c.png", "wrong"),
               question("d", "d.png", "yellow", "other"), question("f", "a.png", "red", "description"),
               question("e", "e.png", "A black circle, drawn.", "description")]
    row, = judge(*records).rows(0)
    assert row["eval_match_by_kind"] == {"color": pytest.approx(2 / 3), "other": 1, "description": 0.5}
    assert row["eval_match"] == pytest.approx((2 / 3 + 1) / 2)


def test_answers_that_are_all_long_are_the_meter_themselves(judge, rigged):
    rigged(lambda question, pictures: "a red circle on white")
    answers = "A red circle on white.", "A red one, no more."
    row, = judge(*(question(name, "a.png", answer, None) for name, answer in zip("ab", answers))).rows(0)
    assert row["eval_match"] == 0.5 and row["eval_match_by_kind"] == {"answers": 0.5}


def test_the_last_question_with_an_answer_is_asked_and_empty_ones_are_left_out(judge, rigged):
    asked = rigged(see)
    row, = judge(question("empty", "a.png", ""), question("b", "b.png", "green"), record(
        "talk", "c.png", ("human", "<image>\nWhat?"), ("gpt", "a circle"), ("human", "Its color?"), ("gpt", "blue"),
        ("human", "Sure?"), ("gpt", "")), eval_pictures="true").rows(0)
    assert [answer["id"] for answer in row["eval_answers"]] == ["b", "talk"] and row["eval_match"] == 1
    assert [role for role, _ in asked[1].messages] == ["human", "gpt", "human"]
    assert row["eval_loss"] > 0  # also with a batch that has nothing to learn


def test_nothing_to_ask_is_no_crash(judge, rigged):
    rigged(see)
    row, = judge(question("empty", "a.png", "")).rows(0)
    assert row["eval_match"] is None and row["eval_answers"] == [] and row["eval_loss"] == 0
    evaluation.line(row)


def test_only_the_first_records_are_asked(judge, rigged):
    asked = rigged(see)
    list(judge(*COLOURED, eval_generate=2, eval_pictures="true").rows(0))
    assert len(asked) == 2
    row, = judge(*COLOURED, eval_generate=0).rows(0)
    assert row.keys() == {"step", "eval_set", "eval_loss", "eval_seconds"} and len(asked) == 2


@pytest.mark.parametrize("size", [1, 3, 8])
def test_loss_is_the_mean_over_learned_tokens_whatever_the_batch(judge, loaded, scenes, size):
    records = [*COLOURED, question("long", "a.png", "A red circle on white paper.")]
    row, = judge(*records, eval_generate=0, per_device_eval_batch_size=size).rows(0)
    with torch.no_grad():
        batch = data.collate(records, loaded, str(scenes))
        rows = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        expected = torch.nn.functional.cross_entropy(loaded.model.logits(batch)[rows - 1], batch.labels[rows])
    assert row["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_share_the_batches_and_agree(judge, scenes, ranks):
    """Every rank learns what one alone finds, and computes as many batches as the others (5 of them on 2, 3, 9 ranks:
    3, 2, 1 each), also where one has nothing to learn or a broken picture."""
    (scenes / "bad.png").write_bytes(b"no picture")
    records = [question("bad", "bad.png", "red"), *COLOURED, *(question(f"empty{i}", "a.png", "") for i in range(4))]
    flags = {"eval_generate": 0, "on_bad_image": "skip"}
    alone = judge(*records, **flags)
    expected, noted = alone.loss(alone.sets["held_out"]), alone.sets["held_out"].notes
    counts, found = [0] * ranks, [[] for _ in range(ranks)]
    for last in False, True:  # first what each of them has for the others is collected
        for rank in range(ranks):
            made = judge(*records, **flags)
            made.place = rank, ranks
            made.gather = lambda own, rank=rank: found.__setitem__(rank, own) or [x or own for x in found]
            made.pause = lambda rank=rank: counts.__setitem__(rank, counts[rank] + 1)
            loss = made.loss(made.sets["held_out"])
            assert not last or (loss == expected and made.sets["held_out"].notes == noted)
    assert counts == [2 * -(-5 // ranks)] * ranks and len(noted) == 2


def test_what_is_wrong_with_held_out_records_is_passed_over_when_asked(judge, scenes, capsys, tmp_path, rigged):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    records = [question("broken", str(tmp_path / "bad.png"), "red"), question("missing", "none.png", "red"),
               *COLOURED[:2], record("silent", "a.png", ("human", "<image>"))]
    with pytest.raises(ValueError, match="missing picture"):
        judge(*records)
    asked = rigged(see)
    made = judge(*records, on_bad_record="skip", on_bad_image="skip", eval_pictures="true")
    row, _ = *made.rows(0), list(made.rows(1))
    assert row["eval_match"] == 1 and len(asked) == 4 and math.isfinite(row["eval_loss"])
    said = capsys.readouterr().err
    assert said.count("2 records: broken picture") == said.count("1 records: left out, nothing to learn") == 1


def test_several_files_give_a_row_each(judge, tmp_path):
    (tmp_path / "more").mkdir()
    paths = [tmp_path / name for name in ("held_out.json", "other.json", "more/other.json")]
    for path in paths:
        write(path, COLOURED)
    made = judge(*COLOURED, eval_generate=0, eval_data_path=",".join(map(str, paths)))
    assert [row["eval_set"] for row in made.rows(0)] == ["held_out", "other", str(paths[2])]


@pytest.mark.parametrize("said, expected, same", [
    ("Red.", "red", True), (" the  Red\ncircle ", "the red circle.", True), ("red", "green", False), ("3", "3 .", True),
    ("yes, it is", "yes it is", False), ("", ".", True)])
def test_answers_are_compared_without_case_spaces_and_full_stop(said, expected, same):
    assert (plain(said) == plain(expected)) is same


# ------------------------------------------------------------------------------------------------------- the best model

LOSSES = {0: 0.1, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.0, 12: 9.0}  # 4 is best: 0 was before training, 10 no better


@pytest.fixture
def start(tiny_llama, tiny_clip, scenes, tmp_path, monkeypatch):
    """start(losses, **flags) trains stage 1 for 12 steps, evaluations told from a list. -> exit status"""
    given = dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, image_folder=scenes, version="plain",
                 data_path=scenes / "captions.json", tune_mm_mlp_adapter=True, per_device_train_batch_size=2,
                 learning_rate=1e-2, use_cpu=True, output_dir=tmp_path / "out", save_projector_only=True, max_steps=12,
                 lr_scheduler_type="constant", eval_data_path=scenes / "talks.json", eval_steps=2, save_steps=2,
                 eval_generate=1)

    def run(losses=LOSSES, metric="eval_loss", **options):
        def rows(judge, step):
            for name in judge.sets:
                yield {"step": step, "eval_set": name, "eval_loss": 0.0, "eval_seconds": 0.0} | (
                    {metric: losses[step] if name == "talks" else -step})

        monkeypatch.setattr(Judge, "rows", rows)
        monkeypatch.setattr(evaluation, "line", str)
        return train.main(words(**given | options))
    return run


def projector(out):
    """The weights that a run has written."""
    return {name: tensor.tolist() for name, tensor in torch.load(out / "mm_projector.bin").items()}


@pytest.fixture
def after(start, tmp_path):
    """after(N): the weights after N steps."""
    def weights(steps):
        assert start(max_steps=steps, output_dir=tmp_path / f"plain{steps}", save_strategy="no") == 0
        return projector(tmp_path / f"plain{steps}")
    return weights


def test_the_best_evaluated_checkpoint_is_written_at_the_end(start, after, tmp_path, capsys):
    assert start(load_best_model_at_end=True) == 0
    said = capsys.readouterr().out
    assert "eval_loss of talks decides which evaluation is best" in said
    assert "the weights of step 4 are written, of the best eval_loss, 3.0000" in said
    assert projector(tmp_path / "out") == after(4) != after(12)
    assert [row["step"] for row in rows_of(tmp_path / "out") if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("options, best", [
    ({"metric": "eval_match", "metric_for_best_model": "match"}, 12),
    ({"metric": "eval_match", "metric_for_best_model": "eval_match", "greater_is_better": False}, 4),
    ({"metric_for_best_model": "loss", "greater_is_better": True}, 12), ({"save_steps": 6}, 6),
    ({"losses": LOSSES | {4: None, 10: float("nan")}}, 8)])
def test_what_is_best(options, best, start, tmp_path, capsys):
    assert start(load_best_model_at_end=True, **options) == 0
    assert f"the weights of step {best} are written" in capsys.readouterr().out


def test_the_first_file_decides(start, scenes, tmp_path, capsys):
    more = write(tmp_path / "more.json", COLOURED)
    assert start(load_best_model_at_end=True, eval_data_path=f"{scenes / 'talks.json'},{more}") == 0
    assert "the weights of step 4 are written" in capsys.readouterr().out


def test_the_limit_spares_the_best(start, tmp_path):
    assert start(load_best_model_at_end=True, save_total_limit=1) == 0
    assert names(tmp_path / "out") == ["checkpoint-4", "checkpoint-12"]
    assert start(save_total_limit=1, output_dir=tmp_path / "plain") == 0
    assert names(tmp_path / "plain") == ["checkpoint-12"]


def test_a_killed_run_remembers_its_best(start, after, tmp_path, capsys):
    options = {"load_best_model_at_end": True, "save_total_limit": 1, "early_stopping_patience": 3}
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(**options)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(**options) == 143
    assert checkpoint.read_state(tmp_path / "out" / "checkpoint-9")["best"] == {"step": 4, "value": 3.0, "since": 2}
    capsys.readouterr()
    assert start(**options) == 0
    said = capsys.readouterr().out
    assert "10 steps of 12, since 3 evaluations in a row were no better" in said and "the weights of step 4" in said
    assert projector(tmp_path / "out") == after(4)


def test_patience_ends_the_run_for_good(start, after, tmp_path, capsys):
    assert start(early_stopping_patience=2) == 0
    assert "8 steps of 12, since 2 evaluations in a row were no better" in capsys.readouterr().out
    assert projector(tmp_path / "out") == after(8)  # the last step's, nothing else was asked for
    assert start(early_stopping_patience=2) == 0
    assert "finished after 8 steps" in capsys.readouterr().out
    (tmp_path / "out" / "trainer_state.json").unlink()  # killed before all was written
    assert start(early_stopping_patience=2) == 0
    assert "8 steps of 12" in capsys.readouterr().out and rows_of(tmp_path / "out")[-1]["step"] == 8
    assert start(early_stopping_patience=9, resume_anyway=True) == 0
    assert rows_of(tmp_path / "out")[-1]["step"] == 12


def test_a_best_model_that_is_not_there_is_said(start, after, tmp_path, capsys):
    assert start({step: None for step in LOSSES}, load_best_model_at_end=True) == 0
    assert "WARNING: no evaluation told eval_loss; the last step is written" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 9, lambda: shutil.rmtree(tmp_path / "out" / "checkpoint-4"))
        assert start(load_best_model_at_end=True, overwrite_output_dir=True) == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "checkpoint-4 had the best eval_loss, but is incomplete" in said
    assert projector(tmp_path / "out") == after(12)


def test_the_best_model_may_be_from_before_the_optimizer_had_a_state(start, tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        make_odd(monkeypatch, step, loss=float("nan"))
    assert start(LOSSES | {2: 1.0}, load_best_model_at_end=True, skip_nonfinite=2) == 0
    assert "the weights of step 2 are written, of the best eval_loss, 1.0000" in capsys.readouterr().out
    names = {name.split(".")[0] for name in checkpoint.Reader(
        tmp_path / "out" / "checkpoint-2").read_metadata().state_dict_metadata}
    assert names == {"model"} and projector(tmp_path / "out")


def test_the_time_left_does_not_take_evaluations_for_steps(start, capsys):
    class Slow(dict):
        def __getitem__(self, step):
            time.sleep(1)
            return super().__getitem__(step)

    assert start(Slow(LOSSES), eval_steps=6) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step  1/12"))
    assert first.rpartition("ETA ")[2] in ("0:02", "0:03", "0:04")  # two evaluations to come


@pytest.mark.parametrize("given, sentence", [
    ("--load_best_model_at_end", "--load_best_model_at_end goes by evaluations while training; give --eval_data_path"),
    ("--early_stopping_patience 2 EVAL", "--early_stopping_patience goes by evaluations"),
    ("--early_stopping_patience 0 EVAL --eval_steps 2", "--early_stopping_patience 0 is too small"),
    ("--load_best_model_at_end EVAL --eval_steps 2 --metric_for_best_model match", "--eval_generate"),
    ("--early_stopping_patience 3 EVAL --eval_steps 2 --metric_for_best_model match --eval_generate 5 "
     "--eval_pictures blank", "true among --eval_pictures"),
    ("--load_best_model_at_end EVAL --eval_steps 2 --save_strategy no", "give --save_strategy steps"),
    ("--load_best_model_at_end EVAL --eval_steps 2 --save_strategy epoch", "give --save_strategy steps"),
    ("--load_best_model_at_end EVAL --eval_steps 3", "a multiple of 3 for --save_steps"),
    ("--load_best_model_at_end EVAL --evaluation_strategy epoch", "give --save_strategy epoch")])
def test_flags_that_contradict_the_best_model(given, sentence):
    with pytest.raises(ValueError) as error:
        flags.parse(asked(given))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def asked(given):
    """A command line."""
    given = given.replace("EVAL", "--eval_data_path e.json")
    return f"--model_name_or_path m --data_path d --output_dir o {given}".split()


@pytest.mark.parametrize("given", ["--eval_steps 5 --save_steps 10", "--evaluation_strategy epoch --save_strategy epoch"
                                   ])
def test_flags_that_fit_the_best_model(given):
    flags.parse(asked(f"--load_best_model_at_end --early_stopping_patience 3 EVAL {given}"))


def test_two_ranks_stop_early_and_write_the_best_together(tiny_llama, tiny_clip, scenes, tmp_path):
    """The highest loss is wanted, so that the first evaluation is the best."""
    write(tmp_path / "four.json", COLOURED[:4])
    shared = dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, image_folder=scenes, version="v1",
                  data_path=tmp_path / "four.json", learning_rate=1e-2, max_steps=8, per_device_train_batch_size=1,
                  eval_data_path=tmp_path / "four.json", eval_steps=2, save_steps=2, save_total_limit=1,
                  load_best_model_at_end=True, early_stopping_patience=2, greater_is_better=True,
                  lr_scheduler_type="constant")
    port, = ports(1)
    runs = [process("", (port, shared | {"output_dir": tmp_path / "two"}), rank=rank) for rank in (0, 1)]
    assert train.main(words(use_cpu=True, output_dir=tmp_path / "one", gradient_accumulation_steps=2, **shared)) == 0
    assert [run.wait(180) for run in runs] == [0, 0], [run.stderr.read() for run in runs]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    losses = {row["step"]: row["eval_loss"] for row in rows_of(tmp_path / "two") if "eval_loss" in row}
    assert names(tmp_path / "two") == names(tmp_path / "one") == ["checkpoint-2", "checkpoint-6"]
    assert [*losses] == [0, 2, 4, 6]
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
    best = checkpoint.read_state(tmp_path / "two" / "checkpoint-6")["best"]
    assert best == {"step": 2, "value": losses[2], "since": 2}
