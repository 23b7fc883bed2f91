"""Records at size: read where they stand, mixtures, processes that read ahead, broken pictures, and the whole check."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn import draw, record, rows_of, run_train, words, write
from PIL import Image

import data
from formats import command
from formats.records import find_records, read_records, write_records

RECORDS = [{"id": i, "conversations": [{"from": "human", "value": text}]} for i, text in enumerate(
    ["plain", 'é "quoted" \\ } { [', "", "日本 𝄞 \u2028 line", "x" * 300, "\\u00e9\ud83d"])] + [{"image": "no id"}]


# ------------------------------------------------------------------------------------------------- where records stand


@pytest.mark.parametrize("piece", [3, 7, 1 << 22])
@pytest.mark.parametrize("layout", [
    json.dumps, lambda x: json.dumps(x[:5], ensure_ascii=False, indent=2),
    lambda x: "\ufeff" + json.dumps(x) + "\r\n\n",
    lambda x: "\n".join(map(json.dumps, x)), lambda x: "\r\n\r\n".join(map(json.dumps, x)) + "\n"])
def test_records_are_those_that_json_reads(tmp_path, monkeypatch, piece, layout):
    """However the file is laid out and wherever the pieces end that it is read in."""
    monkeypatch.setattr("formats.records.PIECE", piece)
    (tmp_path / "r.json").write_bytes(layout(RECORDS).encode())
    records = read_records(tmp_path / "r.json")
    expected = [{"id": str(i)} | record for i, record in enumerate(RECORDS)]
    assert list(records) == expected[: len(records)] and len(records) in (5, 7)


@pytest.mark.parametrize("piece", [3, 1 << 22])
@pytest.mark.parametrize("text, line", [
    ('[{"a": 1},\n {"a": 2}', 2), ('[{"a": 1},\n {"a": }]', 2), ('[{"a": 1},]', 1), ('[{"a": 1}] x', 1),
    ('{"a": 1}\n\n{"a":\n', 3), ('{"a": 1}\nx\n{"a": 1}', 2), ('{"a": 1}]', 1)])
def test_broken_files_are_named_with_the_line(tmp_path, monkeypatch, piece, text, line):
    monkeypatch.setattr("formats.records.PIECE", piece)
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.json, line {line}: expected a JSON array or one JSON object per line"):
        find_records(tmp_path / "r.json")


def test_a_file_that_changes_is_noticed_and_processes_get_no_objects(tmp_path):
    path = write(tmp_path / "r.json", RECORDS * 1000)
    records = read_records(path)
    assert len(pickle.dumps(records)) < 40 * len(records)
    assert pickle.loads(pickle.dumps(records))[-1] == records[-1]
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"r\.json has changed since it was opened"):
        records[0]


def test_mixtures(tmp_path):
    """A share is drawn by the seed and keeps the file's order and the numbers that stand for missing ids."""
    a, b = write(tmp_path / "a.json", [{"k": i} for i in range(10)]), write(tmp_path / "b.json", [{"k": "b"}])
    half = [record["id"] for record in read_records(f"{a}:0.5")]
    assert len(half) == 5 and half == sorted(half) and half == [r["id"] for r in read_records([f"{a}:0.5"], 42)]
    assert half != [r["id"] for r in read_records(f"{a}:0.5", 1)]
    assert [r["k"] for r in read_records([f"{b},{a}:1.0", b])] == ["b", *range(10), "b"]
    assert len(read_records(f"{a}:0.01")) == 1
    for share in "0", "1.5", "1.2.3", "-1", "half", "nan", "":
        with pytest.raises(ValueError, match=rf"a\.json:{share}: a share of a file, like 0\.5, is a number"):
            read_records(f"{a}:{share}")


# ----------------------------------------------------------------------------------------------------- while training


@pytest.fixture(scope="module")
def flags(tiny_llama, tiny_clip, tmp_path_factory):
    """Stage 1 with a tiny model on ten drawn captions."""
    folder = draw(tmp_path_factory.mktemp("pictures"), captions=10)
    return {"model_name_or_path": tiny_llama(), "vision_tower": tiny_clip, "data_path": folder / "captions.json",
            "image_folder": folder, "version": "plain", "tune_mm_mlp_adapter": True, "model_max_length": 64,
            "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-3, "log_samples": True,
            "save_projector_only": True, "save_strategy": "no", "mm_projector_type": "linear"}


def numbers(rows):
    return [(row["ids"], row["loss"], row["grad_norm"]) for row in rows]


def test_any_number_of_processes_reads_the_same(flags, tmp_path):
    rows = [numbers(run_train(tmp_path / str(n), dataloader_num_workers=n, **flags)) for n in (0, 1, 3)]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_the_run_or_is_replaced(flags, tmp_path, capsys, workers):
    folder = draw(tmp_path, captions=10)
    (folder / "c.png").write_bytes(b"no picture")  # of cap2 and cap7
    own = flags | {"image_folder": folder, "data_path": folder / "captions.json", "dataloader_num_workers": workers}
    with pytest.raises(ValueError, match=r"^record 'cap[27]': picture \S*c.png cannot be read \([^\n]*its record out$"):
        run_train(tmp_path / "stopped", **own)
    capsys.readouterr()
    rows = run_train(tmp_path / "run", on_bad_image="skip", **own)
    whole = run_train(tmp_path / "whole", **flags | {"dataloader_num_workers": workers})
    stands = {"cap2": "cap3", "cap7": "cap8"}
    assert [row["ids"] for row in rows] == [
        [[stands.get(name, name) for name in ids] for ids in row["ids"]] for row in whole]
    out = capsys.readouterr().out
    assert f"2 records: {data.REPLACED} (" in out and "cap2" in out and "cap7" in out


def test_a_mixture_is_trained_on(flags, tmp_path):
    path = flags["data_path"]
    out = [f"--{name}={value}" for name, value in flags.items() if name != "data_path"]
    import train
    assert train.main(["--use_cpu", "--output_dir", str(tmp_path), *out, "--data_path", f"{path}:0.4", str(path)]) == 0
    assert sum(len(ids) for row in rows_of(tmp_path) for ids in row["ids"]) == 14


def test_ctrl_c_leaves_no_process_behind(flags, tmp_path):
    """The group gets the signal, as from a terminal: one line, the step finished, no traceback of a reader."""
    line = [sys.executable, "train.py", *words(use_cpu=True, output_dir=tmp_path / "out", dataloader_num_workers=2,
                                               **flags | {"num_train_epochs": 100000})]
    run = subprocess.Popen(line, cwd=Path(data.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    try:
        while "step " not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        os.killpg(run.pid, signal.SIGINT)
        _, error = run.communicate(timeout=60)
        assert run.returncode == 130 and "Traceback" not in error, error
        for _ in range(50):
            try:
                os.killpg(run.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a process of the run is still there")
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------ the check


@pytest.fixture
def check(monkeypatch, capsys, tmp_path, tiny_tokenizer):
    """check(records, *flags) -> (exit status, the report, stderr) of `data.py check --json`."""
    draw(tmp_path)

    def check(records, *flags):
        path = records if isinstance(records, Path) else write(tmp_path / "r.json", records)
        monkeypatch.setattr("sys.argv", ["data.py", "check", "--data_path", str(path), "--image_folder", str(tmp_path),
                                         "--model_name_or_path", str(tiny_tokenizer), "--version", "v1", "--json",
                                         *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            command.run(data.main)
        out, error = capsys.readouterr()
        return end.value.code or 0, json.loads(out), error

    return check


def faulty(tmp_path):
    """One record of each fault, and good ones."""
    (tmp_path / "broken.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "really.jpg", "PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "nameless", "PNG")
    Image.new("I;16", (8, 8), 1000).save(tmp_path / "deep.png")
    ask = ("human", "<image>\nWhat?")
    return [
        record("good", "a.png", ask, ("gpt", "A circle.")), record("text", None, ("human", "Hi"), ("gpt", "Hello.")),
        record("gone", "gone.png", ask, ("gpt", "x")), record("broken", "broken.png", ask, ("gpt", "x")),
        record("jpg", "really.jpg", ask, ("gpt", "y")), record("nameless", "nameless", ask, ("gpt", "z")),
        record("deep", "deep.png", ask, ("gpt", "white")),
        record("tag", None, ask, ("gpt", "no picture")), record("untold", "b.png", ("human", "What?"), ("gpt", "B.")),
        record("nothing", None, ("human", "Hi")), record("empty", None, ("human", "Hi"), ("gpt", "")),
        record("good", "b.png", ask, ("gpt", "Another.")), record("twin", "a.png", ask, ("gpt", "A circle.")),
        record("long", None, ("human", "Hi " * 400), ("gpt", "x"))]


@pytest.mark.parametrize("workers", [0, 3])
def test_check_finds_every_fault_and_fix_leaves_none(check, tmp_path, workers):
    status, report, _ = check(faulty(tmp_path), "--dataloader_num_workers", workers, "--fix", tmp_path / "clean.json",
                              "--model_max_length", 200)
    assert status == 1 and report["records"] == 14 and report["clean"] == 8
    assert report["errors"] == {
        "missing picture": ["gone"], "broken picture": ["broken"], "nothing to learn": ["nothing"]}
    assert report["notes"] == {
        data.SUFFIX: ["jpg"], data.DEEP: ["deep"], data.SAME_ID: ["good"], data.SAME: ["twin"],
        "empty answer": ["empty"],
        "an <image> tag without a picture: it is plain text": ["tag"],
        "a picture without an <image> tag: it is not shown": ["untold"],
        "cut at model_max_length: nothing to learn is left": ["long"]}
    status, report, _ = check(tmp_path / "clean.json")
    assert status == 0 and report["records"] == report["clean"] == 8
    assert set(report["notes"]) == {
        data.SUFFIX, data.DEEP, data.SAME_ID, "an <image> tag without a picture: it is plain text"}
    fixed = {r["id"]: r for r in json.loads((tmp_path / "clean.json").read_text())}
    assert list(fixed) == ["good", "text", "jpg", "nameless", "deep", "tag", "untold"]
    assert fixed["untold"]["conversations"][0]["value"] == "<image>\nWhat?"


def test_fix_puts_the_tag_where_the_template_shows_it(check, tmp_path):
    turns = ("gpt", "Hello."), ("human", "What?"), ("gpt", "A circle.")
    assert check([record("late", "a.png", *turns)], "--fix", tmp_path / "clean.json")[0] == 0
    fixed, = json.loads((tmp_path / "clean.json").read_text())
    assert [turn["value"] for turn in fixed["conversations"]] == ["Hello.", "<image>\nWhat?", "A circle."]
    assert not check([fixed])[1]["notes"].keys() & {"a picture without an <image> tag: it is not shown"}


def test_fix_names_no_flag_that_is_none(check, tmp_path):
    status, _, error = check([record("n", None, ("human", "Hi"), ("gpt", "Hello."))], "--fix", tmp_path)
    assert status == 2 and error.endswith(f"error: {tmp_path} is a folder; name a file\n")


def test_nothing_is_written_where_nothing_is_good(check, tmp_path):
    status, report, error = check([record("n", None, ("human", "Hi"))], "--fix", tmp_path / "clean.json")
    assert status == 2 and report["clean"] == 0 and "clean.json is not written: no record would be in it" in error
    assert not list(tmp_path.glob("*clean*"))


def test_the_snippet_of_the_training_guide(check, tmp_path, monkeypatch, gold):
    """"Prepare your data", as printed: it puts an <image> into every question of a picture."""
    guide = (gold.parent / "reference" / "seed_000_training_guide.txt").read_text()
    snippet = guide.split("### Prepare your data\n\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    pairs = [("What is it?", "A circle."), ("Its color?", "Red.")]
    exec(snippet, {"your_dataset": [("a.png", pairs), ("b.png", pairs[:1])]})  # noqa: S102
    status, report, _ = check(tmp_path / "custom_data.json")
    assert status == 0 and report["clean"] == 2
    assert report["notes"] == {"several <image> tags for one picture: it is shown once per message": ["0"]}


def test_written_whole_or_not_at_all(tmp_path):
    def failing():
        yield {"id": 1}
        raise ValueError("oh")

    (tmp_path / "r.json").write_text("before")
    with pytest.raises(ValueError, match="oh"):
        write_records(tmp_path / "r.json", failing())
    assert (tmp_path / "r.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    write_records(tmp_path / "r.json", RECORDS[:3])
    assert json.loads((tmp_path / "r.json").read_text()) == RECORDS[:3]
