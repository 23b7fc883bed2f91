"""The miniature's world shows what it says, asks fairly, keeps the withheld combinations to itself, and is the same
again for the same seed; its towers are public checkpoints that load like any other."""

import json
import random
import re
from collections import Counter

import pytest
import torch

import data
from miniature import records, towers, words
from miniature.__main__ import main
from miniature.world import (
    ALLOWED,
    COLORS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    WITHHELD,
    draw,
    make_scene,
    training_scene,
    with_other_shapes,
)
from model import IMAGE_TOKEN_INDEX
from tokenizer import SPACE
from weights import load

SEED = 0  # of the shipped world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small world and its towers, untrained but for two steps."""
    folder = tmp_path_factory.mktemp("miniature")
    small = ["--captions", "6", "--conversations", "120", "--questions", "4"]
    assert not main(["world", str(folder), *small])
    assert not main(["towers", str(folder / "towers"), "--clip_steps", "2", "--llama_steps", "2"])
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder / "towers" / "llm", vision_tower=folder / "towers" / "vision", mm_projector_type="mlp2x_gelu")


def read(path):
    return json.loads(path.read_text())


def turns_of(record):
    values = [turn["value"] for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2]))


# ------------------------------------------------------------------------------------------ withheld combinations


def combinations_in(text, answer=""):
    """Every (color, shape) that a text names, in any of the world's ways of saying it; answer: to a question `text`."""
    found = set()
    for color in COLORS:
        for shape in SHAPES:
            ways = (f"{color} {shape}", f"{shape} {color}", f"{shape} is {color}")
            asked = ((f"color is the {shape}?", color), (f"shape is the {color} object?", shape))
            if any(way in text for way in ways) or any(q in text and a == answer for q, a in asked):
                found.add((color, shape))
    return found


def scene_pairs(scenes):
    return {(thing.color, thing.shape) for scene in scenes for thing in scene.objects if thing.color}


def test_the_scan_finds_what_it_looks_for():
    pair = {("red", "cross")}
    for text in ("a small red cross at the top", "color cross red", "the cross is red", "Is there a red cross?"):
        assert combinations_in(text) == pair
    assert combinations_in("What color is the cross?", "red") == pair
    assert combinations_in("What shape is the red object?", "cross") == pair
    assert not combinations_in("What color is the cross?", "blue") & pair
    assert combinations_in("color circle red shape cross blue") == {("red", "circle"), ("blue", "cross")}


def test_withheld_combinations_are_in_no_training_picture():
    for maker, count in ((records.caption_records, 6000), (records.finetune_records, 12000)):
        found = scene_pairs(maker(SEED, count)[1])
        assert found == set(ALLOWED) and not found & set(WITHHELD)
    rng = random.Random(0)
    clip = [make_scene(rng) for _ in range(3000)] + [training_scene(rng) for _ in range(3000)]
    assert not scene_pairs(clip + [with_other_shapes(scene, rng) for scene in clip]) & set(WITHHELD)


def test_withheld_combinations_are_in_no_training_text(loaded):
    seen = set()
    for seed in (SEED, f"tokenizer {SEED}"):
        for record in records.caption_records(seed, 1000)[0] + records.finetune_records(seed, 3000)[0]:
            for question, answer in turns_of(record):
                seen |= combinations_in(question, answer) | combinations_in(answer)
    rng = random.Random(SEED)
    for made in [towers.text(loaded.tokenizer, rng) for _ in range(1000)]:
        text = loaded.tokenizer.decode(made.ids)
        seen |= combinations_in(text)
        for question, answer in re.findall(r"USER: (?:[^\n]*\n)?([^?]*\?) ASSISTANT: (\w+)", text):
            seen |= combinations_in(question, answer)
    for made in [towers.notes(loaded.tokenizer, rng) for _ in range(500)]:
        seen |= combinations_in(loaded.tokenizer.decode(made.ids))
    assert set(ALLOWED) <= seen and not seen & set(WITHHELD)


def test_every_part_of_a_withheld_combination_is_known():
    for color, shape in WITHHELD:
        assert any(c == color for c, _ in ALLOWED) and any(s == shape for _, s in ALLOWED)


def test_unseen_questions_are_about_withheld_combinations():
    made, scenes = records.question_records(SEED, 40, withheld=True)
    for record, scene in zip(made, scenes):
        assert scene_pairs([scene]) & set(WITHHELD)
        question, answer = turns_of(record)[0]
        if record["kind"] in ("position", "presence"):
            named = {pair for pair in combinations_in(question)}
            assert named and named <= set(WITHHELD)
        elif record["kind"] in ("color", "shape"):
            asked = [t for t in scene.objects if (t.color, t.shape) in WITHHELD and answer in (t.color, t.shape)]
            assert asked and any(word in question for t in asked for word in (t.place, t.color, t.shape))


# ----------------------------------------------------------------------------------------------- fair questions


@pytest.mark.parametrize("withheld", [False, True])
def test_answers_are_balanced_within_a_kind(withheld):
    made, _ = records.question_records(SEED, 60, withheld)
    by_kind = {kind: Counter(turns_of(r)[0][1] for r in made if r["kind"] == kind) for kind in words.KINDS}
    for kind, answers in by_kind.items():
        assert answers.total() == 60
        groups = 4 if withheld and kind in ("color", "shape") else len(words.GROUPS[kind])
        most = answers["neither"] if kind == "comparison" else max(answers.values())
        assert most <= -(-60 // groups) + (groups == 6)  # what a constant guess gets right
    assert sum(r["kind"] == "description" for r in made) == 30


def test_training_answers_yes_as_often_as_no():
    rng, said = random.Random(0), Counter()
    for _ in range(3000):
        said.update(a for q, a in words.dialogue(training_scene(rng), rng, records.TURNS) if q.startswith("Is there"))
    assert set(said) == {"yes", "no"} and 0.4 < said["yes"] / said.total() < 0.6


def test_any_part_of_the_evaluation_holds_every_kind():
    made, _ = records.question_records(SEED, 40)
    assert {record["kind"] for record in made[:60]} == {*words.KINDS, "description"}


# ------------------------------------------------------------------------------------ pictures and what is said


def brightest_difference(pixel, rgb):
    return max(abs(a - b) for a, b in zip(pixel, rgb))


def test_pictures_show_what_the_scenes_say():
    rng = random.Random(1)
    for _ in range(300):
        scene = make_scene(rng, withheld=rng.random() < 0.3)
        picture = draw(scene)
        assert picture.size == (SIDE, SIDE) and picture.mode == "RGB"
        for thing in scene.objects:
            assert brightest_difference(picture.getpixel((round(thing.x), round(thing.y))), COLORS[thing.color]) <= 16
            row, column = divmod(PLACES.index(thing.place), 2)
            assert (thing.y > SIDE / 2, thing.x > SIDE / 2) == (bool(row), bool(column))
            assert abs(thing.radius / SIZES[thing.size] - 1) < 0.08
            assert thing.radius < min(thing.x, thing.y, SIDE - thing.x, SIDE - thing.y)
        empty = set(range(len(PLACES))) - {PLACES.index(thing.place) for thing in scene.objects}
        for place in empty:
            row, column = divmod(place, 2)
            pixel = picture.getpixel((round((column + 0.5) * SIDE / 2), round((row + 0.5) * SIDE / 2)))
            assert max(pixel) - min(pixel) <= 20  # wall and floor are nearly grey


def test_larger_pictures_are_the_same_scene():
    scene = make_scene(random.Random(2), count=3)
    small, large = draw(scene), draw(scene, side=6 * SIDE)
    for thing in scene.objects:
        at = (round(6 * thing.x), round(6 * thing.y))
        assert brightest_difference(large.getpixel(at), small.getpixel((round(thing.x), round(thing.y)))) <= 4


def test_answers_are_true():
    rng = random.Random(3)
    for _ in range(500):
        scene = make_scene(rng)
        for question, answer in words.dialogue(scene, rng, 7):
            fitting = [t for t in scene.objects if all(
                word in (t.color, t.shape, t.place, t.size) for word in re.findall(r"[\w-]+", question)
                if word in {*COLORS, *SHAPES, *PLACES})]
            if question.startswith("What color"):
                assert [t.color for t in fitting] == [answer]
            elif question.startswith("What shape"):
                assert [t.shape for t in fitting] == [answer]
            elif question.startswith("Where"):
                assert [t.place for t in fitting] == [answer]
            elif question.startswith("Is there"):
                assert ("yes" if fitting else "no") == answer
            elif question.startswith("How many objects"):
                assert words.NUMBERS[len(scene.objects)] == answer
            elif question.startswith("Which is bigger"):
                big = [words.name(t) for t in scene.objects if t.size == "big" and words.name(t) in question]
                assert answer == (f"the {big[0]}" if len(big) == 1 else "neither")
        for thing in scene.objects:
            assert words.full(thing) in words.caption(scene) and words.full(thing) in words.description(scene)


# --------------------------------------------------------------------------------------------- files of the world


def test_the_same_seed_draws_the_same_world(folder, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for out, seed in ((again, 0), (other, 1)):
        assert not main(["world", str(out), "--captions", "6", "--conversations", "120", "--questions", "4",
                         "--seed", str(seed)])
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) > 150
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in files)
    assert (again / "finetune.json").read_bytes() != (other / "finetune.json").read_bytes()


@pytest.mark.parametrize("name", ["pretrain", "finetune", "eval", "unseen"])
def test_records_are_what_training_reads(folder, loaded, name):
    version = "plain" if name == "pretrain" else "v1"
    made = data.Records(folder / f"{name}.json", folder, loaded, version, 1024)
    batch = made.pack([made[i] for i in range(6)])
    slots = int((batch.input_ids == IMAGE_TOKEN_INDEX).sum())
    assert slots == len(batch.pixel_values) * loaded.config.image_tokens and 9 <= loaded.config.image_tokens <= 16
    assert torch.isfinite(loaded.model.loss(batch)) and not made.report()


def test_the_mix_holds_every_sort_of_record():
    made, scenes = records.finetune_records(SEED, 12000)
    pairs = [record for record in made if isinstance(record.get("image"), list)]
    assert 60 < len(pairs) < 180 and all(len(record["image"]) == 2 for record in pairs)
    assert 240 < sum("image" not in record for record in made) < 480
    assert sum(len(turns_of(record)) == records.TURNS for record in made) > 0.75 * len(made)
    shown = {record["image"] for record in made if isinstance(record.get("image"), str)}
    shown |= {name for record in pairs for name in record["image"]}
    assert shown == {records.picture("finetune", i) for i in range(len(scenes))}
    asked = " ".join(question for record in made for question, _ in turns_of(record))
    for form in ("in detail", "taken away", "plus", "second picture", "Which is bigger", "Where is"):
        assert form in asked


# ------------------------------------------------------------------------------------------------------ the towers


def test_pieces_do_not_span_words(loaded):
    pieces = json.loads(loaded.tokenizer.folder_files["tokenizer.json"])["model"]["vocab"]
    assert all(piece.rfind(SPACE) <= 0 for piece in pieces)
    for word in (*COLORS, *SHAPES, *PLACES, *SIZES, *words.NUMBERS[1:], "ASSISTANT", "USER", "yes", "no"):
        assert len(loaded.tokenizer.encode(word, bos=False)) == 1, word
    text = "A small red circle, ünïcode too?"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    ids = loaded.tokenizer.encode("no</s>USER: hi")
    assert ids[:3] == [1, loaded.tokenizer.token_to_id(SPACE + "no"), 2]
    assert ids[3] == loaded.tokenizer.token_to_id("USER")  # legacy false: no space after a special token


def test_towers_are_public_checkpoints(folder, loaded):
    text, vision = read(folder / "towers/llm/config.json"), read(folder / "towers/vision/config.json")
    assert text["model_type"] == "llama" and text["num_key_value_heads"] < text["num_attention_heads"]
    assert vision["model_type"] == "clip_vision_model" and vision["hidden_act"] == "quick_gelu"
    assert len(loaded.model.vision_tower.vision_model["encoder"]["layers"]) == vision["num_hidden_layers"] - 1
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder / "towers/llm")
    ids = torch.tensor([loaded.tokenizer.encode("What color is the circle?")])
    ours = loaded.model.language_model
    places = torch.arange(ids.shape[1])
    hidden = ours.model(ours.model.embed_tokens(ids[0]), places, towers.Packing.equal(1, len(places), "cpu"))
    torch.testing.assert_close(ours.lm_head(hidden), peer(ids).logits[0], atol=5e-5, rtol=0)
    eyes = transformers.CLIPVisionModel.from_pretrained(folder / "towers/vision")
    pixels = loaded.image_processor(draw(make_scene(random.Random(4))))
    theirs = eyes(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(loaded.model.vision_tower(pixels), theirs, atol=5e-5, rtol=0)


def test_examples_are_drawn(tmp_path):
    assert not main(["examples", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "scene.png", "unseen.png"}
