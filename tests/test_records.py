"""Other data sets into LLaVA's JSON: deterministic, every picture shown, unknown layouts refused; the output checks."""

import json
from functools import partial

import pytest
from PIL import Image

import data
from formats.records import ASKED, SAID

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def run(run_main):
    """run(*arguments) of data.py -> (exit status, stdout, stderr)."""
    return partial(run_main, data)


@pytest.fixture
def convert(run, tmp_path, tiny_tokenizer):
    """convert(kind, source, *flags) -> records, made twice alike, which `check` passes."""
    def convert(kind, source, *flags):
        out = tmp_path / "out.json"
        texts = []
        for _ in range(2):
            status, _, error = run("convert", kind, source, out, *flags)
            assert status == 0, error
            texts.append(out.read_text())
        assert texts[0] == texts[1]
        status, report, _ = run("check", "--data_path", out, "--image_folder", tmp_path, "--model_name_or_path",
                                tiny_tokenizer, "--version", "v1", "--json")
        assert status == 0 and json.loads(report)["clean"] == len(json.loads(texts[0]))
        assert not [what for what in json.loads(report)["notes"] if "<image>" in what]
        return json.loads(texts[0])
    return convert


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def values(record):
    return [turn["value"] for turn in record["conversations"]]


PROBLEM = {"question": "Which  is  it?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "", "image": "image.png",
           "lecture": "Animals.\\nTwo.", "solution": "It barks."}


@pytest.fixture
def scienceqa(tmp_path):
    problems = {"7": PROBLEM, "3": PROBLEM | {"image": None, "hint": "A yard.", "lecture": "", "answer": 0}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7", "3"], "val": ["3"]}))
    picture(tmp_path / "7" / "image.png")
    return tmp_path


def test_scienceqa(convert, scienceqa):
    """As the original's script writes it (LLAVA.md 9.3)."""
    first, second = convert("scienceqa", scienceqa)
    assert first == {"id": "7", "image": "7/image.png", "conversations": [
        {"from": "human", "value": "Which is it?\nContext: N/A\nOptions: (A) a cat (B) a dog\n<image>"},
        {"from": "gpt", "value": "Animals.\nTwo. It barks. The answer is B."}]}
    assert second == {"id": "3", "conversations": [
        {"from": "human", "value": "Which is it?\nContext: A yard.\nOptions: (A) a cat (B) a dog"},
        {"from": "gpt", "value": "It barks. The answer is A."}]}
    assert convert("scienceqa", scienceqa, "--set", "split=val", "prompt_format=CQM-A")[0]["conversations"] == [
        {"from": "human", "value": "Context: A yard.\nQuestion: Which is it?\nOptions: (A) a cat (B) a dog"},
        {"from": "gpt", "value": "The answer is A."}]


def test_scienceqa_has_every_format(convert, scienceqa):
    """AL gives the solution and AE the lecture: the original's names are swapped, and its data have it so."""
    said = {said: values(convert("scienceqa", scienceqa, "--set", f"prompt_format=QCM-{said}")[0])[1] for said in SAID}
    assert said == {
        "A": "The answer is B.", "AL": "The answer is B. BECAUSE: It barks.",
        "AE": "The answer is B. BECAUSE: Animals.\nTwo.", "ALE": "The answer is B. BECAUSE: Animals.\nTwo. It barks.",
        "AEL": "The answer is B. BECAUSE: It barks. Animals.\nTwo.", "LA": "Animals.\nTwo. The answer is B.",
        "EA": "It barks. The answer is B.", "LEA": "Animals.\nTwo. It barks. The answer is B.",
        "ELA": "It barks. Animals.\nTwo. The answer is B.",
        "LEPA": "LECTURE: Animals.\nTwo.\nSOLUTION: It barks.\n###\nANSWER: B."}
    asked = {asked: values(convert("scienceqa", scienceqa, "--set", f"prompt_format={asked}-A")[0])[0]
             for asked in ASKED}
    assert asked["QCLEM"] == ("Which is it?\nContext: N/A\nBECAUSE: Animals.\nTwo. It barks.\n"
                              "Options: (A) a cat (B) a dog\n<image>")
    assert asked["QCME"].endswith("Options: (A) a cat (B) a dog\nBECAUSE: It barks.\n<image>")
    without = convert("scienceqa", scienceqa, "--set", "split=val", "prompt_format=QCML-AE")[0]
    assert values(without) == ["Which is it?\nContext: A yard.\nOptions: (A) a cat (B) a dog", "The answer is A."]


def test_okvqa(convert, tmp_path):
    """The answer of most people; and the article's dataset.json gets the `<image>` that it lacks."""
    (tmp_path / "OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(
        {"questions": [{"image_id": 42, "question": "What sport?", "question_id": 420}]}))
    answers = [{"answer": answer} for answer in ("ski", "race", "race", "ski", "sled")]
    (tmp_path / "mscoco_train2014_annotations.json").write_text(json.dumps(
        {"annotations": [{"question_id": 420, "image_id": 42, "answers": answers}]}))
    picture(tmp_path / "COCO_train2014_000000000042.jpg")
    assert convert("okvqa", tmp_path) == [{
        "id": "420", "image": "COCO_train2014_000000000042.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nWhat sport?{SHORT}"}, {"from": "gpt", "value": "ski"}]}]
    talk = [{"from": "human", "value": "What sport?"}, {"from": "gpt", "value": "ski, race"}]
    (tmp_path / "dataset.json").write_text(json.dumps(
        [{"id": "u", "image": "COCO_train2014_000000000042.jpg", "conversations": talk}]))
    assert values(convert("okvqa", tmp_path / "dataset.json")[0]) == ["<image>\nWhat sport?", "ski, race"]


def test_csv(convert, run, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text('\ufeffimage,question,answer\na.png,"What, here?","A\nsquare"\n,Hi,Hello\n')
    first, second = convert("csv", tmp_path / "t.csv")
    assert first["image"] == "a.png" and values(first) == ["<image>\nWhat, here?", "A\nsquare"]
    assert second["id"] == "1" and "image" not in second
    (tmp_path / "t.tsv").write_text("Bild\tFrage\tAntwort\na.png\tWas?\tRot\n")
    assert values(convert("csv", tmp_path / "t.tsv", "--set", "image=Bild", "question=Frage", "answer=Antwort")[0]) == [
        "<image>\nWas?", "Rot"]
    status, _, error = run("convert", "csv", tmp_path / "t.tsv", tmp_path / "o.json")
    assert status == 2 and "is no csv source as known here (KeyError: 'question')" in error and "--set" in error


def test_csv_holds_long_texts(convert, tmp_path):
    (tmp_path / "t.csv").write_text(f"question,answer,image\nHi,{'long ' * 40000}\n")  # and no last field
    assert len(values(convert("csv", tmp_path / "t.csv")[0])[1]) == 200000


@pytest.mark.parametrize("content, sentence", [
    (b"question,answer\nq,a\nonly a question\n", "t.csv, line 3: not as many fields as the head line names, 2"),
    (b"question,answer\nq,no quotes, so cut\n", "t.csv, line 2: not as many fields as the head line names, 2; what"),
    ("question,answer\nWie?,Sch\u00f6n\n".encode("latin-1"),
     "t.csv is no csv source as known here (UnicodeDecodeError: 'utf-8' codec")])
def test_a_csv_with_a_fault_is_named(run, tmp_path, content, sentence):
    (tmp_path / "t.csv").write_bytes(content)
    status, _, error = run("convert", "csv", tmp_path / "t.csv", tmp_path / "o.json")
    assert status == 2 and sentence in error and error.count("\n") == 1 and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("names", [
    {}, {"annotation": "tokens", "id": "token_start", "label": "entityLabel"},
    {"documentName": "file", "annotation": "ents", "label": "kind", "QUESTION": "Q", "head": "from", "child": "to"}])
def test_ubiai(convert, tmp_path, capsys, names):
    """Linked questions of a document become the turns of one record, the first with the picture, in their order."""
    picture(tmp_path / "form.png")

    def of(name):
        return names.get(name, name)

    entities = [(1, "QUESTION", "Name?"), (2, "ANSWER", "Ada"), (3, "QUESTION", "Open?"), (4, "OTHER", "x"),
                (5, "QUESTION", "Born?"), (6, "ANSWER", "1815"), (7, "ANSWER", "London")]
    links = [(6, 5), (1, 2), (5, 7), (1, 4)]
    (tmp_path / "export.json").write_text(json.dumps([{
        of("documentName"): "form.png",
        of("annotation"): [{of("id"): i, of("label"): of(label), "text": text} for i, label, text in entities],
        "relations": [{of("head"): a, of("child"): b} for a, b in links]}]))
    flags = ["--set", "image=file", "entities=ents", "label=kind", "question=Q", "head=from", "child=to"]
    records = convert("ubiai", tmp_path / "export.json", *(flags if "documentName" in names else []))
    assert records == [{"id": "0", "image": "form.png", "conversations": [
        {"from": "human", "value": "<image>\nName?"}, {"from": "gpt", "value": "Ada"},
        {"from": "human", "value": "Born?"}, {"from": "gpt", "value": "1815 London"}]}]


def test_questions_without_answers_are_told(run, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps([{"documentName": "a.png", "relations": [], "annotation": [
        {"id": 1, "label": "QUESTION", "text": "Who?"}]}]))
    status, out, error = run("convert", "ubiai", tmp_path / "e.json", tmp_path / "o.json")
    assert status == 2 and "a.png: 1 questions without a linked answer are left out" in out
    assert "o.json is not written" in error


@pytest.mark.parametrize("kind, content, sentence", [
    ("ubiai", '[{"data": 1}]', "is no ubiai source as known here (KeyError: 'annotation,tokens')"),
    ("ubiai", '{"a": 1}', "is no ubiai source as known here"), ("ubiai", "x", "is no ubiai source as known here"),
    ("okvqa", '[{"image": "a"}]', "is no okvqa source as known here (KeyError: 'conversations')"),
    ("scienceqa", "{}", "is no scienceqa source as known here")])
def test_what_is_laid_out_otherwise_is_refused(run, tmp_path, kind, content, sentence):
    (tmp_path / "s.json").write_text(content)
    status, _, error = run("convert", kind, tmp_path / "s.json", tmp_path / "o.json")
    assert status == 2 and sentence in error and error.count("\n") == 1 and not (tmp_path / "o.json").exists()


def test_mistaken_settings(run, scienceqa):
    status, _, error = run("convert", "scienceqa", scienceqa, scienceqa / "o.json", "--set", "splt=val")
    assert status == 2 and "--set splt: scienceqa knows split, prompt_format" in error
    status, _, error = run("convert", "scienceqa", scienceqa, scienceqa / "o.json", "--set", "prompt_format=QCM")
    assert status == 2 and "prompt_format QCM: expected one of" in error
