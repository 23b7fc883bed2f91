"""training/evaluation.py: the sight meter, held against answerers of which we know what they see."""

from types import SimpleNamespace

import pytest
import torch
from drawn import COLOURS, draw, record, write
from PIL import Image

import data
from model import IGNORE_INDEX
from sample import Answer
from training import evaluation
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
                 "model_max_length": 512, "image_folder": str(scenes), "eval_data_path": str(path)}
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
