"""sampling/looking.py: whose attention it is, to the patch, layer and word; that it lies where one asks."""

import json
import random
import sys

import pytest
import torch
from drawn import draw
from PIL import Image, ImageChops, ImageStat

import data
import sample
from miniature import words, world
from model import IMAGE_TOKEN_INDEX
from sample import Answer, Request, generate
from sampling import looking
from weights import load, save


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def loaded(tiny_llava):
    return load(tiny_llava, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def miniature():
    return load(sample.MINIATURE, device="cpu", dtype="float32")


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def theirs(tiny_llava, loaded, scenes):
    """A prompt with two pictures, an answer, and transformers' attentions (layers, T, T), mean over heads."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tiny_llava, dtype=torch.float32, attn_implementation="eager")
    example, answer = two_pictures(loaded, scenes), [17, 300, 42, 5, 2]
    whole = two_pictures(loaded, scenes)
    whole.ids, whole.labels = whole.ids + answer, [-100] * (len(whole.ids) + len(answer))
    batch = data.pack([whole], loaded.config)
    slots = batch.input_ids == IMAGE_TOKEN_INDEX
    with torch.no_grad():
        attentions = model(input_ids=batch.input_ids.masked_fill(slots, 400)[None], pixel_values=batch.pixel_values,
                           output_attentions=True).attentions  # layers of (1, H, T, T)
    return example, answer, slots, torch.stack(attentions)[:, 0].mean(1)


def two_pictures(loaded, scenes):
    request = Request([("human", "First <image> then <image> .")], [scenes / "a.png", scenes / "b.png"])
    return sample.encode(loaded, request)


def rolled_out(attentions):
    """Attention rollout as the paper writes it: the product of (A + I) / 2 over the layers."""
    product = torch.eye(attentions.shape[-1])
    for layer in attentions:
        product = (0.5 * layer + 0.5 * torch.eye(len(layer))) @ product
    return product


@pytest.mark.parametrize("layers, expected", [
    ("mean", lambda layers: layers.mean(0)), ("last", lambda layers: layers[2]), ("2", lambda layers: layers[1]),
    ("2-3", lambda layers: layers[1:].mean(0)), ("1-3", lambda layers: layers.mean(0)), ("rollout", rolled_out)])
def test_maps_are_transformers_attentions(loaded, theirs, layers, expected):
    example, answer, slots, attentions = theirs
    maps = looking.picture_attention(loaded, example, answer, layers)
    assert [m.shape for m in maps] == [(5, 4), (5, 4)] and all((m > 0).all() for m in maps)
    assert torch.allclose(torch.cat(maps, 1), expected(attentions)[-6:-1][:, slots], atol=1e-6)


def test_nothing_listens_on_and_the_prompt_stays_as_it_was(loaded, theirs):
    example, answer, *_ = theirs
    before = list(example.ids)
    looking.picture_attention(loaded, example, answer)
    assert example.ids == before
    assert not any(layer.self_attn._forward_pre_hooks for layer in loaded.model.language_model.model.layers)


@pytest.mark.parametrize("layers", ["first", "0", "4", "3-2", "2-4", "-1", "1-", ""])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match=f"--attention_layers {layers}: expected mean, last, rollout, .* 1 to 3"):
        looking.layer_range(layers, 3)


# --------------------------------------------------------------------------------------------------------------- words


def answer_of(loaded, text, *more):
    return Answer(text.split("###")[0].strip(), [*loaded.tokenizer.encode(text, bos=False), *more], [])


def test_tokens_join_to_the_words_of_the_text(loaded):
    text = "The circle's color is d\u00e9j\u00e0 red, \u4f60\u597d (really)!"
    answer = answer_of(loaded, text, loaded.tokenizer.eos_token_id)
    found = looking.words_of(loaded.tokenizer, answer)
    assert [word for word, _ in found] == text.split()
    assert len(answer.token_ids) > 3 * len(found)  # so that there is something to join
    said = [loaded.tokenizer.decode([answer.token_ids[i] for i in tokens]).strip() for _, tokens in found]
    assert said == text.split()
    left = set(range(len(answer.token_ids))) - {i for _, tokens in found for i in tokens}  # the end, a mere space
    assert not any(loaded.tokenizer.decode([answer.token_ids[i]]).strip() for i in left)


def test_a_stop_string_is_no_word(loaded):
    found = looking.words_of(loaded.tokenizer, answer_of(loaded, "A circle. ### Human"))
    assert [word for word, _ in found] == ["A", "circle."]


def test_an_answer_of_no_word(loaded):
    assert looking.words_of(loaded.tokenizer, Answer("", [loaded.tokenizer.eos_token_id], [])) == []


# --------------------------------------------------------------------------------------------------------------- sheet


def brightest(lit):
    """The middle of the brighter pixels of a picture, as shares of its width and height."""
    grey = lit.convert("L")
    bright = grey.point(lambda value: 255 * (value > 0.8 * grey.getextrema()[1]))
    left, top, right, bottom = bright.getbbox()
    return (left + right) / 2 / lit.width, (top + bottom) / 2 / lit.height


@pytest.mark.parametrize("place, corner", [
    (0, (0.25, 0.25)), (1, (0.75, 0.25)), (2, (0.25, 0.75)), (3, (0.75, 0.75))])
def test_the_attended_patch_is_lit(loaded, place, corner):
    white, attention = Image.new("RGB", (40, 40), "white"), torch.zeros(4)  # four patches
    attention[place] = 0.3
    lit, = looking.light_up(loaded.config, [white.resize((80, 80))], [white], [attention])
    assert lit.size == (80, 80)
    assert brightest(lit) == pytest.approx(corner, abs=0.15)


def test_of_two_pictures_only_the_attended_one_is_lit(loaded):
    white = Image.new("RGB", (40, 40), "white")
    attentions = [torch.full((4,), 0.01), torch.full((4,), 0.1)]
    one, other = looking.light_up(loaded.config, [white, white], [white, white], attentions)
    assert ImageStat.Stat(one).mean[0] < 110 and ImageStat.Stat(other).mean[0] > 250


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_picture_is_shown_as_the_tower_sees_it(miniature, scenes, aspect, monkeypatch):
    monkeypatch.setattr(miniature.config, "image_aspect_ratio", aspect)
    picture, processor = Image.open(scenes / "a.png").convert("RGB"), miniature.image_processor
    seen = processor.resize_and_crop(processor.views(picture, aspect)[0])
    large = looking.as_seen(miniature, picture, 4 * seen.width)
    assert large.size == (192, 192)
    assert max(ImageStat.Stat(ImageChops.difference(large.resize(seen.size), seen)).mean) < 3


def cells(count, pictures=1, side=160):
    return [[(f"word{i}", None if i == 0 else 0.25, Image.new("RGB", (side, side), "white")) for i in range(count)]
            for _ in range(pictures)]


@pytest.mark.parametrize("count, pictures, columns, lines", [(2, 1, 2, 1), (8, 1, 8, 1), (9, 1, 8, 2), (17, 3, 8, 9)])
def test_cells_stand_in_lines_with_their_words_below(count, pictures, columns, lines):
    sheet = looking.contact_sheet(cells(count, pictures), "What is it?", "a note")
    assert sheet.size == (columns * 172 + 12, lines * 196 + 80)
    for line in range(lines):
        for column in range(columns):
            left, top = 12 + 172 * column, 76 + 196 * line
            held = line % -(-count // columns) * columns + column < count
            assert (sheet.crop((left, top, left + 160, top + 160)).getextrema() == ((255, 255),) * 3) == held
            caption = sheet.crop((left, top + 161, left + 160, top + 195)).convert("L").getextrema()
            assert (caption[1] > 200) == held


def test_what_is_too_long_for_its_line_ends_in_dots():
    font = looking.ImageFont.load_default(16)
    assert looking.shortened("red,", font, 100) == "red,"
    short = looking.shortened("antidisestablishmentarianism " * 3, font, 100)
    assert short.endswith("\u2026") and len(short) > 5 and font.getlength(short) <= 100


def test_a_cell_per_word_behind_the_picture_and_the_whole_answer(loaded, scenes):
    pictures = [Image.open(scenes / name).convert("RGB") for name in ("a.png", "b.png")]
    maps = [torch.rand(4, 4, generator=torch.Generator().manual_seed(i)) / 8 for i in range(2)]
    rows = looking.galleries(loaded, pictures, maps, [("red", [0]), ("circle.", [1, 2])])  # token 3 is the end
    for row, of_picture in zip(rows, maps, strict=True):
        assert [caption for caption, _, _ in row] == ["the picture", "the answer", "red", "circle."]
        shares = [float(of_picture[tokens].sum()) / len(tokens) for tokens in ([0, 1, 2], [0], [1, 2])]
        assert row[0][1] is None and [share for _, share, _ in row[1:]] == pytest.approx(shares)
        assert len({lit.tobytes() for _, _, lit in row}) == 4
    alone, = looking.galleries(loaded, pictures[:1], maps[:1], [("red", [0])])  # which is the whole answer
    assert [caption for caption, _, _ in alone] == ["the picture", "red"]
    silent, = looking.galleries(loaded, pictures[:1], maps[:1], [])
    assert [caption for caption, _, _ in silent] == ["the picture", "the answer"]


# ------------------------------------------------------------------------------------------------------- the miniature


def mass_inside(attention, place):
    """The share of attention (16,) to a picture's 4 x 4 patches that lies in a quarter."""
    row, column = divmod(world.PLACES.index(place), 2)
    grid = attention.view(4, 4)
    return float(grid[2 * row: 2 * row + 2, 2 * column: 2 * column + 2].sum() / grid.sum())


def test_asked_what_is_there_it_looks_there(miniature):
    """200 pictures of 1 to 4 objects: what share of the attention to the picture lies in the quarter that was asked
    about; chance is 0.25. The miniature reads it in its second layer of three; the last has less use for it."""
    rng, requests, places = random.Random(0), [], []
    for _ in range(200):
        scene = world.make_scene(rng)
        places.append(rng.choice(scene.objects).place)
        question = f"What shape is the object at the {places[-1]}?"
        requests.append(Request([("human", question)], [world.draw(scene)], max_new_tokens=8))
    mass, opposite = dict.fromkeys(("mean", "last", "rollout", "2"), 0.0), 0.0
    for request, answer, place in zip(requests, generate(miniature, requests), places):
        (_, tokens), *_ = looking.words_of(miniature.tokenizer, answer)
        for layers in mass:
            attention, = looking.picture_attention(
                miniature, sample.encode(miniature, request), answer.token_ids, layers)
            mass[layers] += mass_inside(attention[tokens].mean(0), place) / 200
        opposite += mass_inside(attention[tokens].mean(0), world.PLACES[3 - world.PLACES.index(place)]) / 200
    print({layers: round(share, 2) for layers, share in mass.items()})
    assert mass["2"] > 0.9 and mass["mean"] > 0.7 and mass["rollout"] > 0.5 and mass["last"] > 0.4 and opposite < 0.1


def test_each_word_of_a_description_looks_at_its_own_object(miniature):
    rng = random.Random(1)
    scenes = [world.make_scene(rng, count=2) for _ in range(20)]
    requests = [Request([("human", words.DETAIL_REQUESTS[0])], [world.draw(scene)], max_new_tokens=60)
                for scene in scenes]
    own, others = [], []
    for scene, request, answer in zip(scenes, requests, generate(miniature, requests)):
        attention, = looking.picture_attention(miniature, sample.encode(miniature, request), answer.token_ids)
        for word, tokens in looking.words_of(miniature.tokenizer, answer):
            about = [thing for thing in scene.objects if word.strip(".,") in (thing.color, thing.shape, thing.place)]
            if len(about) == 1:
                other = next(thing for thing in scene.objects if thing is not about[0])
                own.append(mass_inside(attention[tokens].mean(0), about[0].place))
                others.append(mass_inside(attention[tokens].mean(0), other.place))
    assert len(own) > 80 and sum(own) / len(own) > 0.5 > 0.25 > sum(others) / len(others)


# -------------------------------------------------------------------------------------------------------- command line


def say(folder, *words):
    """sample.py's command line, within this process."""
    assert sample.main(list(map(str, ["--model_name_or_path", folder, "--device", "cpu", *words]))) == 0


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("llava")
    save(loaded, out)
    return out


@pytest.mark.parametrize("names, layers", [(["a.png"], "mean"), (["a.png", "b.png"], "rollout")])
def test_attention_is_drawn_into_a_file(folder, scenes, tmp_path, capsys, names, layers):
    out = tmp_path / "map.png"
    say(folder, "--image", *(scenes / name for name in names), "--prompt", "What?", "--max_new_tokens", 30,
        "--attention", out, "--attention_layers", layers, "--json")
    said, err = capsys.readouterr()
    count = 1 + len(json.loads(said)["text"].split()) + (len(json.loads(said)["text"].split()) != 1)
    columns, side = min(count, 8), 1280 // min(max(count, 4), 8)
    assert Image.open(out).size == (columns * (side + 12) + 12, len(names) * -(-count // 8) * (side + 36) + 80)
    assert err.endswith(f"attention over the patches written to {out}\n")


def test_of_a_long_answer_the_first_words_are_drawn_and_that_is_said(loaded, scenes, tmp_path, capsys, monkeypatch):
    text = " ".join(["word"] * 70)
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [answer_of(loaded, text)])
    monkeypatch.setattr(sample, "load", lambda *_, **__: loaded)
    say("", "--image", scenes / "a.png", "--prompt", "What?", "--attention", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == (8 * 172 + 12, 8 * 196 + 80)  # 64 cells
    assert capsys.readouterr().err.endswith("map.png, the first 62 of 70 words\n")


def test_layers_are_checked_before_the_answer(folder, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: pytest.fail("answered"))
    with pytest.raises(ValueError, match="--attention_layers 9: expected mean, last, rollout, or layers of 1 to 3"):
        say(folder, "--image", scenes / "a.png", "--prompt", "What?", "--attention", tmp_path / "map.png",
            "--attention_layers", 9)


def test_a_terminal_shows_as_many_cells_as_fit(folder, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "90")  # three cells of 28
    say(folder, "--image", scenes / "a.png", "--prompt", "What?", "--max_new_tokens", 30, "--attention",
        tmp_path / "map.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-15][:38].split("  ")[0] == "the picture"
    assert all(line.count("\u2580") == 84 for line in lines[-14:])
