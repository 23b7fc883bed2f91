"""Data: the original's ids and labels for every recorded conversation, pictures in records, packing, and bad input."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlamaConfig, LlavaConfig
from tokenizer import Tokenizer
from vision import ClipVisionConfig, ImageProcessor

# Records in which the original's token counting loses its way and masks everything; ours: the text that is learned.
MISMATCHED = {
    "empty_answer": [],
    "plain_caption_empty": [],
    "empty_question": [" You said nothing.</s>"],
    "ends_with_human": [" Two.</s>"],
    "answer_contains_role_word": [" I am an ASSISTANT: a helper. USER: you.</s>"],
    "answer_contains_separator": [" The end token is </s> and the start is <s>. ### Human: x</s>"],
    "answer_contains_sep_and_role": [" x ASSISTANT: y</s>"],
    "literal_special_tokens_text": [" [/INST] They are tokens <|im_end|>.</s>"],
}


@pytest.fixture
def loaded(tiny_tokenizer):
    """What data.py needs of a loaded model: a tower with 4 places per picture of 28 pixels."""
    vision = ClipVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                              image_size=28, patch_size=14)
    config = LlavaConfig(LlamaConfig(vocab_size=400), vision, image_aspect_ratio="pad")
    return SimpleNamespace(tokenizer=Tokenizer.from_folder(tiny_tokenizer), config=config, conv_mode="v1",
                           image_processor=ImageProcessor(28))


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures, red.png and blue.png, and a broken one."""
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return tmp_path


def talk(*texts, **more):
    """A record whose turns alternate, beginning with the human."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r", "conversations": turns} | more


def learned(example):
    """The learned text, one string per stretch of learned tokens."""
    stretches, before = [], IGNORE_INDEX
    for (start, end), label in zip(example.spans, example.labels):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                stretches.append([start, end])
            stretches[-1][1] = end
        before = label
    return [example.prompt[start:end] for start, end in stretches]


# ------------------------------------------------------------------------------------------ as the original renders


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_every_recorded_conversation(gold, version):
    """ids and prompts always equal the original's, labels wherever it did not lose count."""
    tokenizer = Tokenizer.from_folder(gold / "ckpt/lm_mha")
    recorded = json.loads((gold / f"conversations/{version}__slow_legacy_false__2048.json").read_text())
    records = data.read_records(gold / "data/conversations.json")
    assert [record["id"] for record in records] == [sample["id"] for sample in recorded["samples"]]
    for record, sample in zip(records, recorded["samples"]):
        if "error" in sample:
            with pytest.raises(ValueError, match="not for template plain"):
                data.render_record(record, tokenizer, version, model_max_length=2048)
            continue
        example = data.render_record(record, tokenizer, version, model_max_length=2048)
        assert example.ids == sample["input_ids"], record["id"]
        assert example.prompt == sample.get("prompt", example.prompt), record["id"]
        if "warning" in sample:
            assert learned(example) == MISMATCHED[record["id"]], record["id"]
        else:
            assert example.labels == sample["labels"], record["id"]


def test_the_records_of_the_training_runs(gold):
    """First batches of both stages, after the original's collator: equal ids and labels, padding aside."""
    tokenizer = Tokenizer.from_folder(gold / "ckpt/lm_mha")
    for run, version, file in (("stage1_mha", "plain", "captions"), ("stage2_mha_lr1e-3", "v1", "instruct")):
        records = {record["id"]: record for record in data.read_records(gold / f"data/{file}.json")}
        training = json.loads((gold / f"train/{run}.json").read_text())
        for step, batch in zip(training["steps"], training["first_batches"]):
            for record_id, ids, labels in zip(sum(step["ids"], []), batch["input_ids"], batch["labels"]):
                example = data.render_record(records[record_id], tokenizer, version, model_max_length=192)
                length = min(len(example.ids), 192)  # the collator cuts what has a picture
                assert (example.ids[:192], example.labels[:192]) == (ids[:length], labels[:length]), record_id
                assert set(ids[length:]) <= {0} and set(labels[length:]) <= {IGNORE_INDEX}


@pytest.mark.parametrize("legacy", [False, True])
def test_prompts_with_pictures(gold, tmp_path, legacy):
    folder = tmp_path / "t"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((gold / "ckpt/lm_mha" / name).read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    rows = json.loads((gold / "conversations/tokenizer_image_token.json").read_text())
    rows = [row for row in rows if row["tokenizer"] == f"slow_legacy_{str(legacy).lower()}"]
    assert len(rows) == 12
    for row in rows:
        assert data.encode_prompt(row["prompt"], tokenizer)[0] == row["ids"], row["prompt"]


# ------------------------------------------------------------------------------------------------ pictures in a record


def test_a_string_is_shown_at_every_tag(loaded, pictures):
    """As the original: one <image> per message, moved to its front; more than one is noted."""
    record = talk("What <image> is <image> this ?", "a", "and <image>", "b", image="red.png")
    example = data.render_record(record, loaded.tokenizer, "v1")
    assert "USER: <image>\nWhat  is  this ? ASSISTANT: a</s>USER: <image>\nand ASSISTANT: b</s>" in example.prompt
    assert example.pictures == ["red.png", "red.png"] and example.ids.count(IMAGE_TOKEN_INDEX) == 2
    assert example.notes == ["several <image> tags for one picture: it is shown once per message"]
    data.load_pictures(example, loaded.image_processor, "pad", pictures)
    assert example.pixel_values.shape == (2, 3, 28, 28) and torch.equal(*example.pixel_values)


def test_a_list_is_shown_tag_by_tag(loaded, pictures):
    record = talk("left <image> right <image>", "two", image=["red.png", "blue.png"])
    example = data.render_record(record, loaded.tokenizer, "v1")
    data.load_pictures(example, loaded.image_processor, "pad", pictures)
    assert "USER: left <image> right <image> ASSISTANT:" in example.prompt and not example.notes
    red, blue = (loaded.image_processor(Image.open(pictures / name).convert("RGB")) for name in ("red.png", "blue.png"))
    assert torch.equal(example.pixel_values, torch.cat([red, blue]))
    for images in ([], ["red.png"], ["red.png"] * 3):
        with pytest.raises(ValueError, match=f"pictures and tags differ: `image` lists {len(images)}, the text has 2"):
            data.render_record(record | {"image": images}, loaded.tokenizer, "v1")


def test_tags_without_pictures_and_pictures_without_tags(loaded):
    text = data.render_record(talk("what is <image> ?", "a tag"), loaded.tokenizer, "v1")
    assert IMAGE_TOKEN_INDEX not in text.ids and text.notes == ["an <image> tag without a picture: it is plain text"]
    unseen = data.render_record(talk("q", "a", image="red.png"), loaded.tokenizer, "v1")
    assert unseen.pictures == [] and unseen.notes == ["a picture without an <image> tag: it is not shown"]


def test_start_and_end_tokens_around_pictures(loaded, tiny_tokenizer):
    record = talk("<image>\nq", "a", image="red.png")
    with pytest.raises(ValueError, match="mm_use_im_start_end needs a tokenizer with the tokens"):
        data.render_record(record, loaded.tokenizer, "v1", mm_use_im_start_end=True)
    tokenizer = Tokenizer.from_folder(tiny_tokenizer, data.START_END)
    example = data.render_record(record, tokenizer, "v1", mm_use_im_start_end=True)
    place = example.ids.index(IMAGE_TOKEN_INDEX)
    assert example.ids[place - 1: place + 2] == [400, IMAGE_TOKEN_INDEX, 401]
    assert "USER: <im_start><image><im_end>\nq ASSISTANT:" in example.prompt


# ------------------------------------------------------------------------------------------------------------ packing


def test_a_batch_is_the_records_end_to_end(loaded, pictures):
    records = [talk("<image>\nq", "a", image="red.png"), talk("q", "a", id=7),
               talk("<image> or <image>", "b", image=["blue.png", "red.png"])]
    batch = data.collate(records, loaded, pictures)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32 and batch.ids == ["r", "7", "r"]
    assert batch.pixel_values.shape == (3, 3, 28, 28) and (batch.input_ids == IMAGE_TOKEN_INDEX).sum() == 3 * 4
    for k, record in enumerate(records):
        alone = data.collate([record], loaded, pictures)
        rows = slice(batch.cu_seqlens[k], batch.cu_seqlens[k + 1])
        assert torch.equal(batch.input_ids[rows], alone.input_ids) and torch.equal(batch.labels[rows], alone.labels)
        assert batch.position_ids[rows].tolist() == list(range(len(alone.input_ids)))
        kept = alone.labels != IGNORE_INDEX
        assert torch.equal(alone.labels[kept], alone.input_ids[kept]) and not kept[0]
    assert data.collate([talk("q", "a")], loaded).pixel_values.shape == (0, 3, 28, 28)
    assert batch.to("cpu").ids == batch.ids


def test_a_place_in_an_answer_is_not_learned(loaded, pictures):
    batch = data.collate([talk("q", "see <image> there", image="red.png")], loaded, pictures)
    assert (batch.labels[batch.input_ids == IMAGE_TOKEN_INDEX] == IGNORE_INDEX).all()


def test_cuts(loaded, pictures):
    """Never within a picture: at every limit the batch is the longest beginning that holds only whole pictures."""
    record = talk("<image>\nfirst", "a", "<image>\nsecond", "b", image="red.png")
    whole = data.collate([record], loaded, pictures)
    slots = (whole.input_ids == IMAGE_TOKEN_INDEX).tolist()
    for limit in range(1, len(slots) + 2):
        cut = data.collate([record], loaded, pictures, model_max_length=limit)
        length, kept = len(cut.input_ids), len(cut.pixel_values)
        assert torch.equal(cut.input_ids, whole.input_ids[:length]) and torch.equal(cut.labels, whole.labels[:length])
        assert sum(slots[:length]) == 4 * kept
        assert length == min(limit, len(slots)) or (length < limit and slots[length] and limit - length < 4)
        learned = bool((cut.labels != IGNORE_INDEX).any())
        note = "cut at model_max_length" + ("" if learned else ": nothing to learn is left")
        assert [what for what, _ in cut.notes if "cut" in what] == ([note] if length < len(slots) else [])


def test_text_only_is_cut_when_rendered_and_pictures_when_packed(loaded):
    text = data.render_record(talk("q " * 50, "a"), loaded.tokenizer, "v1", model_max_length=40)
    assert len(text.ids) == len(text.labels) == 40
    assert text.notes == ["cut at model_max_length: nothing to learn is left"]
    seen = data.render_record(talk("<image>" + "q " * 50, "a", image="x"), loaded.tokenizer, "v1", model_max_length=40)
    assert len(seen.ids) > 40 and not seen.notes


# ------------------------------------------------------------------------------------------------------ files, mistakes


def test_arrays_and_lines_are_both_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([talk("q", "a"), {"conversations": []}]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(talk("q", "a", id=i)) for i in range(3)) + "\n\n")
    assert [r["id"] for r in data.read_records([tmp_path / "a.json", tmp_path / "b.jsonl"])] == ["r", "1", 0, 1, 2]


@pytest.mark.parametrize("text, sentence", [
    ("[1]", "record 0 is '1'; expected an object"),
    ('[{"id": 1}', "expected a JSON array or one JSON object per line"),
    ('{"id": 1}\n{"id"', "line 2: expected a JSON array or one JSON object per line"),
    ("[]", "holds no records"),
])
def test_files_that_are_no_records(tmp_path, text, sentence):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json.*{sentence}"):
        data.read_records(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"y\.json does not exist; expected a file of records"):
        data.read_records(tmp_path / "y.json")


BAD = [
    ({"id": "r"}, "no conversations"),
    ({"id": "r", "conversations": []}, "no conversations"),
    ({"id": "r", "conversations": [{"from": "human"}]}, "turn without text: turn 1"),
    (talk("q", "a") | {"conversations": [{"from": "user", "value": "q"}]}, "unknown role: turn 1 is from 'user'"),
    (talk("q", "a") | {"conversations": [{"from": ["gpt"], "value": "q"}]}, r"unknown role: turn 1 is from \['gpt'\]"),
    (talk("q"), "nothing to learn"),
    (talk("q", "a", image=3), "image is no file name: 3"),
    (talk("<image>", "a", image=["red.png"] * 2), "pictures and tags differ"),
    (talk("<image>", "a", image="gone.png"), "missing picture: .*gone.png does not exist"),
]


@pytest.mark.parametrize("record, sentence", BAD)
def test_a_bad_record_stops_or_is_left_out(loaded, pictures, record, sentence):
    path = pictures / "records.json"
    path.write_text(json.dumps([talk("q", "good"), record]))
    with pytest.raises(ValueError, match=rf"records\.json: record 'r': {sentence}"):
        data.Records(path, pictures, loaded)
    records = data.Records([path], pictures, loaded, on_bad_record="skip")
    assert len(records) == 1 and records.report().startswith("1 records: left out, ")
    path.write_text(json.dumps([talk("q", "good"), record | {"id": 7}]))
    assert data.Records(path, pictures, loaded, on_bad_record="skip").report().endswith(" (7)")  # a number is a name
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="every record was left out"):
        data.Records(path, pictures, loaded, on_bad_record="skip")


@pytest.mark.parametrize("name", ["broken.png", "gone.png"])
def test_a_broken_picture(loaded, pictures, name):
    """It stops the run, or the next record with a picture stands in the place of its record, also around the end."""
    path = pictures / "records.json"
    path.write_text(json.dumps([talk("<image>", "a", image="red.png", id="first"), talk("<image>", "b", image=name),
                                talk("text", "c", id="text"), talk("<image>", "d", image=name, id="last")]))
    with pytest.raises(ValueError, match=f"record 'r': (missing picture|picture).*{name}"):
        data.Records(path, pictures, loaded)[1]
    records = data.Records(path, pictures, loaded, on_bad_image="skip")
    assert [records[i].id for i in range(4)] == ["first", "first", "text", "first"]
    batch = records.pack([records[1], records[2], records[3]])
    assert batch.notes == [(data.REPLACED, "r"), (data.REPLACED, "last"), (data.REPLACED, "last")]
    path.write_text(json.dumps([talk("<image>", "b", image=name)] * 2))
    with pytest.raises(ValueError, match="no picture can be read"):
        data.Records(path, pictures, loaded, on_bad_image="skip")[0]


def test_pictures_need_a_tower(loaded, pictures):
    path = pictures / "records.json"
    path.write_text(json.dumps([talk("<image>", "a", image="red.png")]))
    loaded.image_processor = None
    with pytest.raises(ValueError, match="picture without a tower"):
        data.Records(path, pictures, loaded)


def test_oddities_are_counted(loaded, pictures):
    path = pictures / "records.json"
    first = talk("q", "a", id="gpt first")
    first["conversations"].insert(0, {"from": "gpt", "value": "hi"})
    path.write_text(json.dumps([first, talk("q", "a", "more", id="open"), talk("q", "", id="empty")]))
    records = data.Records(path, pictures, loaded)
    assert len(records) == 3 and set(records[2].labels) == {IGNORE_INDEX} and records.question(2) is None
    assert records.report().splitlines() == [
        "1 records: first turn from gpt: it is left out (gpt first)",
        "1 records: last turn from human: it has no answer to learn (open)", f"1 records: {data.MENDED} (open)",
        "1 records: empty answer (empty)"]


def test_the_question_of_a_record(loaded, pictures):
    path = pictures / "records.json"
    path.write_text(json.dumps([talk("<image>\nq1", "a1", "<image>\nq2", "a2", "q3", image="red.png", kind="colour"),
                                talk("<image> <image>", "both", image=["red.png", "blue.png"])]))
    records = data.Records(path, pictures, loaded)
    asked = records.question(0)
    assert asked.messages == [("human", "<image>\nq1"), ("gpt", "a1"), ("human", "<image>\nq2")]
    assert (asked.answer, asked.kind, asked.images) == ("a2", "colour", [str(pictures / "red.png")] * 2)
    assert records.question(1).images == [str(pictures / "red.png"), str(pictures / "blue.png")]


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(run_main):
    """run(*arguments) of data.py -> (exit status, stdout, stderr)."""
    return partial(run_main, data)


def test_show(tiny_tokenizer, pictures, run):
    """A folder with tokenizer files alone will do; what cannot be rendered has an error, and the status stays 0."""
    path = pictures / "records.json"
    path.write_text(json.dumps([talk("<image>\nq", "a", image="gone.png"), {"id": 2}, talk("q", "x y", id="three")]))
    common = ["show", "--data-path", path, "--model-name-or-path", tiny_tokenizer, "--version", "v1"]
    status, out, _ = run(*common, "--json")
    rows = json.loads(out)
    assert status == 0 and [row["id"] for row in rows] == ["r", "2", "three"]
    assert set(rows[0]) == {"id", "prompt", "input_ids", "labels"}
    assert rows[0]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert set(rows[1]) == {"id", "error"} and rows[1]["error"].startswith("no conversations")
    status, out, _ = run(*common, "--index", "-1", "1")
    assert status == 0 and "three" in out and "x y</s>⟧" in out and "2: ERROR no conversations" in out
    status, _, error = run(*common, "--index", 3)
    assert status == 2 and "--index 3: the file holds 3 records" in error and "Traceback" not in error


def test_versions_of_the_first_models(tiny_tokenizer, tmp_path, run):
    """--version v0 is v1's text and the token [PAD], as the original does, said aloud; template_v0 is v0's text."""
    path = tmp_path / "records.json"
    path.write_text(json.dumps([talk("a [PAD] b", "c"), talk("q", "a")]))
    common = ["show", "--data_path", path, "--model_name_or_path", tiny_tokenizer, "--json"]
    _, out, said = run(*common, "--version", "v0")
    first, second = json.loads(out)
    assert first["input_ids"].count(400) == 1 and "USER: q ASSISTANT: a</s>" in second["prompt"]
    assert said.startswith("WARNING: --version v0 trains the text of v1") and "template_v0" in said
    _, out, said = run(*common, "--version", "v0", "--mm_use_im_start_end")
    assert json.loads(out)[0]["input_ids"].count(400) == 1
    _, out, said = run(*common, "--version", "template_v0")
    first, second = json.loads(out)
    assert 400 not in first["input_ids"] and not said
    assert second["prompt"].endswith("\n\n### Human: q\n### Assistant: a\n### ")
    status, _, error = run(*common, "--version", "v9")
    assert status == 2 and "'v9' is not known here; use one of plain, v1" in error


def test_strict_labels_on_the_command_line(tiny_tokenizer, tmp_path, run):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([talk("q", "a", "more", id="open")]))
    common = ["--data_path", path, "--model_name_or_path", tiny_tokenizer, "--version", "v1", "--json"]
    learns = [any(label != IGNORE_INDEX for label in json.loads(run("show", *common, *strict)[1])[0]["labels"])
              for strict in ([], ["--strict_labels"])]
    assert learns == [True, False]
    notes = [set(json.loads(run("check", *common, *strict)[1])["notes"]) for strict in ([], ["--strict_labels"])]
    last = "last turn from human: it has no answer to learn"
    assert notes == [{last, data.MENDED}, {last, data.MASKED}]


def test_check(tiny_tokenizer, pictures, run):
    path = pictures / "records.jsonl"
    good = talk("<image>\nq", "a", image="red.png")
    common = ["check", "--data_path", path, "--image_folder", pictures, "--model_name_or_path", tiny_tokenizer,
              "--version", "v1"]
    path.write_text(json.dumps(good))
    assert run(*common)[0] == 0
    bad = [good | {"image": "broken.png", "id": "b"}, good | {"image": "gone.png", "id": "g"}, {"id": "n"}]
    path.write_text("\n".join(json.dumps(record) for record in [good, *bad]))
    status, out, _ = run(*common, "--json", "--model_max_length", 20)
    report = json.loads(out)
    assert status == 1 and report["records"] == 4 and sum(report["tokens_up_to"].values()) == 2
    assert report["errors"] == {"broken picture": ["b"], "missing picture": ["g"], "no conversations": ["n"]}
    assert report["notes"] == {"cut at model_max_length: nothing to learn is left": ["r", "b"]}
    status, out, _ = run(*common)
    assert status == 1 and "ERROR       1  missing picture (g)" in out and "tokens per record:" in out
