"""sampling/questions.py: questions and answers byte by byte; stopped runs, many ranks, bad lines, full disks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from drawn import draw, ports, record, words
from PIL import Image

import sample
from formats import command
from sampling import questions, web
from sampling.questions import answer_file
from weights import load, save

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("scenes"))
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama, tiny_clip, tmp_path_factory):
    """A random LLaVA for the command line."""
    loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                  image_aspect_ratio="pad", device="cpu")
    save(loaded, tmp_path_factory.mktemp("models") / "tiny-llava")
    return tmp_path_factory.getbasetemp() / "models0" / "tiny-llava"


def asked(count=6, **others):
    """Questions, the longer the later."""
    return [{"question_id": i, "image": "abcde"[i % 5] + ".png", "text": "What color is it? " * (i + 1)} | others
            for i in range(count)]


def write(path, rows):
    """Write JSONL. -> path"""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Engine:
    """Stands for the model: answers "<prompt> !", the first prompt last. error_at: prompts that cannot be asked; stop:
    KeyboardInterrupt after so many answers."""

    tokenizer, image_processor = SimpleNamespace(encode=str.split), "a tower"
    config = SimpleNamespace(tokens_of=lambda size: 5, image_aspect_ratio="pad")

    def __init__(self, error_at=(), stop=None):
        self.error_at, self.stop, self.asked, self.loads = error_at, stop, [], 0

    def load(self):
        self.loads += 1
        return self

    def ask(self, loaded, todo, on_answer):
        assert loaded is self
        for count, i in enumerate([*range(1, len(todo)), 0]):
            if count == self.stop:
                raise KeyboardInterrupt
            self.asked.append(todo[i])
            error = "it is broken" if todo[i].id in self.error_at else None
            on_answer(i, SimpleNamespace(text=f"{todo[i].prompt} !", error=error))


@pytest.fixture
def ask(scenes, tmp_path):
    """ask(engine, flag=value, …) -> exit status; --out is tmp_path/answers.jsonl."""
    def run(engine, data_path=None, **flags):
        args = {"image_folder": str(scenes), "out": str(tmp_path / "answers.jsonl"), "num_chunks": 1, "chunk_idx": 0,
                "allow_urls": False, "adapter": None, "model_name_or_path": "models/tiny-llava/",
                "data_path": str(data_path or tmp_path / "questions.jsonl")} | flags
        return answer_file(SimpleNamespace(**args), engine.load, engine.ask)
    return run


# -------------------------------------------------------------------------------------------------------------- formats


def test_the_bytes_of_an_answer(ask, tmp_path):
    write(tmp_path / "questions.jsonl", [{"question_id": 7, "image": "a.png", "text": "Is it r\u00e9d?\nOr not?"}])
    assert ask(Engine()) == 0
    line = (tmp_path / "answers.jsonl").read_bytes()
    name = re.search(rb'"answer_id": "([2-9A-HJ-NP-Za-km-z]{22})"', line)[1]
    assert line == (b'{"question_id": 7, "prompt": "Is it r\\u00e9d?\\nOr not?", '
                    b'"text": "Is it r\\u00e9d?\\nOr not? !", '
                    b'"answer_id": "' + name + b'", "model_id": "tiny-llava", "metadata": {}}\n')


@pytest.mark.parametrize("path, name", [
    ("models/tiny-llava/", "tiny-llava"), ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"), ("here", "here"),
    ("runs/finetune/checkpoint-100", "finetune_checkpoint-100"), ("checkpoint-7", "checkpoint-7")])
def test_the_model_is_called_by_its_paths_end(ask, tmp_path, path, name):
    write(tmp_path / "questions.jsonl", asked(1))
    assert ask(Engine(), model_name_or_path=path) == 0
    assert rows(tmp_path / "answers.jsonl")[0]["model_id"] == name


def test_answers_end_up_in_the_questions_order_and_long_prompts_are_asked_first(ask, tmp_path):
    write(tmp_path / "questions.jsonl", asked(6))
    engine = Engine()
    assert ask(engine) == 0
    assert [row["question_id"] for row in rows(tmp_path / "answers.jsonl")] == list(range(6))
    assert [question.id for question in engine.asked] == [4, 3, 2, 1, 0, 5]  # this engine answers the first one last
    assert [row["text"] for row in rows(tmp_path / "answers.jsonl")] == [row["text"] + " !" for row in asked(6)]


def test_training_records_are_asked_as_science_questions_are(ask, tmp_path, scenes):
    talks = [record("q1", "a.png", ("human", "What? <image>\n"), ("gpt", "A circle."), ("human", "Its color?")),
             record("q2", None, ("human", "What is an <image> tag?"), ("gpt", "Text.")),
             record("q3", ["a.png", "b.png"], ("human", "First <image> then <image> : which?"), ("gpt", "b"))]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    engine = Engine()
    assert ask(engine, path) == 0
    by_id = {question.id: question for question in engine.asked}
    assert by_id["q1"].prompt == "<image>\nWhat?" and by_id["q1"].images == [str(scenes / "a.png")]
    assert by_id["q2"].prompt == "What is an <image> tag?" and by_id["q2"].images == []
    assert by_id["q3"].prompt == "First <image> then <image> : which?" and len(by_id["q3"].images) == 2
    assert [row["question_id"] for row in rows(tmp_path / "answers.jsonl")] == ["q1", "q2", "q3"]


def test_one_id_may_ask_two_things(ask, tmp_path):
    """As in TextVQA and MME."""
    path = write(tmp_path / "questions.jsonl", [{"question_id": "a/1.png", "text": text} for text in ("One?", "Two?")])
    assert ask(Engine()) == 0
    assert [row["text"] for row in rows(tmp_path / "answers.jsonl")] == ["One? !", "Two? !"]
    engine = Engine()
    assert ask(engine, path) == 0 and not engine.loads


# -------------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("rest", [b"", b'{"ques', b'{"question_id": 1, "prompt": "Wh', b'{'])
def test_a_stopped_run_is_continued(ask, tmp_path, capsys, rest):
    """Ctrl-C after four of six answers; perhaps the machine dies within a fifth."""
    out = tmp_path / "answers.jsonl"
    write(tmp_path / "questions.jsonl", asked(6))
    assert ask(Engine(stop=4)) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    before = rows(out)
    assert len(before) == 4
    with open(out, "ab") as file:
        file.write(rest)
    engine = Engine()
    assert ask(engine) == 0
    assert "4 of 6 questions are answered" in capsys.readouterr().err
    assert {question.id for question in engine.asked} == set(range(6)) - {row["question_id"] for row in before}
    after = rows(out)
    assert [row["question_id"] for row in after] == list(range(6)) and all(row in after for row in before)
    content, engine = out.read_bytes(), Engine()
    assert ask(engine) == 0 and not engine.loads and out.read_bytes() == content


def test_what_is_written_is_on_the_disk_at_once(ask, tmp_path):
    write(tmp_path / "questions.jsonl", asked(3))
    seen = []

    class Watching(Engine):
        def ask(self, loaded, todo, on_answer):
            super().ask(loaded, todo, lambda *answer: (on_answer(*answer), seen.append(
                len(rows(tmp_path / "answers.jsonl")))))

    assert ask(Watching()) == 0 and seen == [1, 2, 3]


def test_a_question_that_fails_keeps_its_place_and_is_asked_again(ask, tmp_path, capsys):
    write(tmp_path / "questions.jsonl", asked(4))
    assert ask(Engine(error_at=(0, 2))) == 1
    said = capsys.readouterr().err
    assert "2 answers are in" in said and "2 questions without one (it is broken)" in said
    first = rows(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in first] == list(range(4))
    assert [(row["text"] == "", row["metadata"]) for row in first] == [
        (True, {"error": "it is broken"}), (False, {}), (True, {"error": "it is broken"}), (False, {})]
    engine = Engine(error_at=(0,))
    assert ask(engine) == 1 and {question.id for question in engine.asked} == {0, 2}
    assert ask(Engine()) == 0
    last = rows(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in last] == list(range(4)) and all(row["text"] for row in last)
    assert last[1] == first[1]


def test_a_full_disk(ask, tmp_path, monkeypatch):
    """Half of the third line still fits."""
    write(tmp_path / "questions.jsonl", asked(5))
    out, room = tmp_path / "answers.jsonl", [700]

    class Disk:
        def __init__(self, *args, **options):
            self.file = open(*args, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = self.file.write(line[:room[0]])
            room[0] -= written
            return written

    monkeypatch.setattr(questions, "open", Disk, raising=False)
    with pytest.raises(ValueError, match=r"answers.jsonl cannot be written \(No space left on device\); the answers"):
        ask(Engine())
    kept = rows(out)
    assert 1 < len(kept) < 5 and out.read_bytes().endswith(b"}\n")
    monkeypatch.undo()
    engine = Engine()
    assert ask(engine) == 0 and len(engine.asked) == 5 - len(kept) and len(rows(out)) == 5


def test_two_runs_do_not_write_to_one_file(ask, tmp_path):
    write(tmp_path / "questions.jsonl", asked(3))

    class Twice(Engine):
        def ask(self, loaded, todo, on_answer):
            with pytest.raises(ValueError, match="answers.jsonl: another run writes to it"):
                ask(Engine(), num_chunks=3, chunk_idx=1)
            super().ask(loaded, todo, on_answer)

    assert ask(Twice()) == 0 and len(rows(tmp_path / "answers.jsonl")) == 3


# --------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("count, chunks, expected", [
    (10, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]), (4, 2, [[0, 1], [2, 3]]), (5, 4, [[0, 1], [2, 3], [4]])])
def test_chunks_are_the_originals(ask, tmp_path, count, chunks, expected):
    write(tmp_path / "questions.jsonl", asked(count))
    for index, ids in enumerate(expected):
        out = tmp_path / f"{index}.jsonl"
        assert ask(Engine(), num_chunks=chunks, chunk_idx=index, out=str(out)) == 0
        assert [row["question_id"] for row in rows(out)] == ids
    for index in (len(expected), chunks + 3, -1):
        with pytest.raises(ValueError, match=f"--chunk_idx {index}: there is no such chunk; {count} questions make "
                                             f"{len(expected)} of {len(expected[0])}, counted from 0"):
            ask(Engine(), num_chunks=chunks, chunk_idx=index)
    with pytest.raises(ValueError, match="--num_chunks 0"):
        ask(Engine(), num_chunks=0)


def test_chunks_may_share_a_file(ask, tmp_path):
    write(tmp_path / "questions.jsonl", asked(5))
    assert ask(Engine(), num_chunks=2, chunk_idx=1) == 0
    assert [row["question_id"] for row in rows(tmp_path / "answers.jsonl")] == [3, 4]
    assert ask(Engine(), num_chunks=2, chunk_idx=0) == 0
    assert [row["question_id"] for row in rows(tmp_path / "answers.jsonl")] == list(range(5))


RANK = """
import os, sys, time
from types import SimpleNamespace
from sampling.questions import answer_file

class Engine:
    tokenizer, image_processor = SimpleNamespace(encode=str.split), "a tower"
    config = SimpleNamespace(tokens_of=lambda size: 5, image_aspect_ratio="pad")

def ask(loaded, todo, on_answer):
    for i, question in enumerate(todo):
        if i == int(os.environ.get("DIE_AT", -1)):
            os.kill(os.getpid(), 9)
        time.sleep(0.4 * (os.environ["RANK"] == "1") * (i == 0))  # the others have to wait for this one
        on_answer(i, SimpleNamespace(text=f"rank {os.environ['RANK']}", error=None))

args = SimpleNamespace(image_folder="", num_chunks=1, chunk_idx=0, allow_urls=False, adapter=None,
                       model_name_or_path="m", data_path=sys.argv[1], out=sys.argv[2])
sys.exit(answer_file(args, Engine, ask))
"""


def ranks(count, *arguments, **environment):
    """Run RANK on `count` processes. -> their exit statuses"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost", "MASTER_PORT": str(ports(1)[0]),
                        "WORLD_SIZE": str(count)} | environment
    processes = [subprocess.Popen([sys.executable, "-c", RANK, *map(str, arguments)], cwd=ROOT,
                                  env=env | {"RANK": str(rank)}) for rank in range(count)]
    try:
        return [process.wait(60) for process in processes if "DIE_AT" in environment or not process.wait(60)]
    finally:
        for process in processes:
            process.kill()


def test_two_ranks_share_the_questions(tmp_path):
    path = write(tmp_path / "questions.jsonl", [{"question_id": i, "text": f"Is it {i}?"} for i in range(7)])
    assert ranks(2, path, tmp_path / "out.jsonl") == [0, 0]
    answers = rows(tmp_path / "out.jsonl")
    assert [row["question_id"] for row in answers] == list(range(7))
    assert [row["text"] for row in answers] == [f"rank {i % 2}" for i in range(7)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "questions.jsonl"]


def test_what_dead_ranks_have_left_is_taken_up_by_any_number(tmp_path):
    path = write(tmp_path / "questions.jsonl", [{"question_id": i, "text": f"Is it {i}?"} for i in range(9)])
    out = tmp_path / "out.jsonl"
    assert ranks(3, path, out, DIE_AT="2") == [-9, -9, -9]
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["out.jsonl", "out.jsonl.rank-1", "out.jsonl.rank-2", "questions.jsonl"]
    with open(tmp_path / "out.jsonl.rank-2", "ab") as file:
        file.write(b'{"question_id": 8, "pro')
    assert ranks(1, path, out) == [0]
    answers = rows(out)
    assert [row["question_id"] for row in answers] == list(range(9))
    assert [row["text"] for row in answers][:6] == [f"rank {i % 3}" for i in range(6)]
    assert {row["text"] for row in answers[6:]} == {"rank 0"} and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(ask, **flags):
    """The sentence with which a run is refused before anything is loaded."""
    engine = Engine()
    with pytest.raises(ValueError) as error:
        ask(engine, **flags)
    assert not engine.loads and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("line, said", [
    ('{"question_id": 2, "text": ', "expected a JSON array or one JSON object per line"),
    ("[1]", "expected an object"),
    ('{"question_id": 2}', 'line 3: expected {"question_id": …, "image": file name, "text": …}, or'),
    ('{"text": "What?"}', "line 3: expected"),
    ('{"question_id": 2.5, "text": "What?"}', "line 3: expected"),
    ('{"question_id": 2, "text": ["What?"]}', "line 3: expected"),
    ('{"question_id": 2, "text": "What?", "image": 5}', "line 3: expected"),
    ('{"question_id": 2, "text": "What?", "image": ["a.png", 5]}', "line 3: expected"),
    ('{"id": "x", "conversations": []}', "line 3: expected"),
    ('{"id": "x", "conversations": ["a"]}', "line 3: expected"),
    ('{"id": "x", "conversations": [{"from": "human"}]}', "line 3: expected"),
    ('{"question_id": 0, "text": "What color is it? "}', "line 3: question 0 is asked a second time"),
    ('{"question_id": 2, "text": "W", "image": "http://x/y.png"}', "line 3: picture http://x/y.png is a URL; add")])
def test_a_bad_line_is_named_before_anything_is_loaded(ask, tmp_path, line, said):
    good = json.dumps(asked(1)[0])
    (tmp_path / "questions.jsonl").write_text(f"{good}\n\n{line}\n")
    sentence = refused(ask)
    assert f"{tmp_path / 'questions.jsonl'}" in sentence and said in sentence
    assert "line 3" in sentence or line == "[1]"
    assert not (tmp_path / "answers.jsonl").exists()


def test_wrong_files(ask, tmp_path, scenes):
    path = write(tmp_path / "questions.jsonl", asked(2))
    content = path.read_bytes()
    assert "nowhere.jsonl does not exist" in refused(ask, data_path="nowhere.jsonl")
    assert "--data_path needs a file for the answers" in refused(ask, out=None)
    assert "--out nowhere/a.jsonl: --data_path needs a file" in refused(ask, out="nowhere/a.jsonl")
    assert f"--out {tmp_path}: --data_path needs a file" in refused(ask, out=str(tmp_path))
    assert "is the file of questions" in refused(ask, out=str(tmp_path / "." / "questions.jsonl"))
    assert "--image_folder nowhere: none of the 2 pictures" in refused(ask, image_folder="nowhere")
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [
    b"notes", b"notes\n", b'{"question_id": 3, "text": "a question"}', b'{"question_id": 3, "text": "a question"}\n',
    b"[1]\n", b"\xff\n", b"\n",
    b'{"question_id": 0, "prompt": "other words", "text": "a", "model_id": "tiny-llava", "metadata": {}}\n',
    b'{"question_id": 0, "prompt": "What color is it? ", "text": "a", "model_id": "another", "metadata": {}}\n',
    b'{"question_id": [0], "prompt": "What color is it? ", "text": "a", "model_id": "tiny-llava", "metadata": {}}\n'])
def test_a_file_of_anything_else_is_left_as_it_is(ask, tmp_path, content):
    write(tmp_path / "questions.jsonl", asked(2))
    (tmp_path / "answers.jsonl").write_bytes(content)
    assert "answers.jsonl, line 1 is no answer of tiny-llava to one of these questions; name another" in refused(ask)
    assert (tmp_path / "answers.jsonl").read_bytes() == content


@pytest.mark.parametrize("aspect, first", [("pad", "long"), ("anyres", "wide")])
def test_the_longest_prompt_with_its_pictures_is_asked_first(ask, tmp_path, scenes, aspect, first):
    """With anyres a picture's places depend on its size; that of a URL or of a broken file is not known yet."""
    Image.new("RGB", (90, 30)).save(tmp_path / "wide.png")
    write(tmp_path / "questions.jsonl", [
        {"question_id": "wide", "image": str(tmp_path / "wide.png"), "text": "What is it?"},
        {"question_id": "broken", "image": str(scenes / "broken.png"), "text": "What?"},
        {"question_id": "url", "image": "https://x.example/a.png", "text": "What is it?"},
        {"question_id": "long", "image": str(scenes / "a.png"), "text": "What is it? " * 3}])
    engine = Engine()
    engine.config = SimpleNamespace(image_aspect_ratio=aspect, tokens_of={"pad": lambda _: 7, "anyres": max}[aspect])
    assert ask(engine, allow_urls=True) == 0
    lengths = [question.length(engine) for question in [engine.asked[-1], *engine.asked[:-1]]]
    assert lengths == sorted(lengths, reverse=True) and engine.asked[-1].id == first


def test_each_rank_takes_its_own_gpu(ask, tmp_path, monkeypatch):
    taken = []
    write(tmp_path / "questions.jsonl", asked(4))
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(questions, "dist", SimpleNamespace(init_process_group=lambda *_, **__: None, barrier=str,
                                                           destroy_process_group=str))
    monkeypatch.setattr(questions.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(questions.torch.cuda, "set_device", taken.append)
    engine = Engine()
    assert ask(engine) == 0 and taken == [1] and {question.id for question in engine.asked} == {1, 3}


def test_a_model_without_a_tower_is_asked_nothing_with_pictures(ask, tmp_path):
    blind = Engine()
    blind.image_processor = None
    write(tmp_path / "questions.jsonl", asked(2))
    with pytest.raises(ValueError, match="the model has no vision tower"):
        ask(blind)
    write(tmp_path / "questions.jsonl", [{"question_id": 1, "text": "What?"}])
    assert ask(blind) == 0


# ------------------------------------------------------------------------------------------------ with a model, and all


def answer(folder, path, scenes, *flags):
    """sample.py --data_path. -> exit status"""
    return sample.main([*words(model_name_or_path=folder, device="cpu", data_path=path, image_folder=scenes,
                               max_new_tokens=5), *map(str, flags)])


def test_the_command_line_answers_as_generate_does(folder, scenes, tmp_path):
    path = write(tmp_path / "q.jsonl", [*asked(4), {"question_id": "t", "text": "Hi"}])
    assert answer(folder, path, scenes, "--out", tmp_path / "a.jsonl", "--batch_size", 2) == 0
    loaded = load(folder, device="cpu")
    requests = [sample.Request([("human", row["text"])], [scenes / row["image"]] if "image" in row else [], 5)
                for row in rows(path)]
    assert [row["text"] for row in rows(tmp_path / "a.jsonl")] == [a.text for a in sample.generate(loaded, requests)]
    assert rows(tmp_path / "a.jsonl")[0]["model_id"] == "tiny-llava"


def test_a_broken_picture_fails_its_own_question_only(folder, scenes, tmp_path, capsys):
    path = write(tmp_path / "q.jsonl", [*asked(2), {"question_id": "b", "image": "broken.png", "text": "What?"},
                                        {"question_id": "n", "image": "none.png", "text": "What?"},
                                        {"question_id": "l", "text": "What? " * 400},
                                        {"question_id": "c", "image": ["a.png", "b.png"], "text": "One <image> tag?"}])
    assert answer(folder, path, scenes, "--out", tmp_path / "a.jsonl") == 1
    errors = {row["question_id"]: row["metadata"].get("error", "") for row in rows(tmp_path / "a.jsonl")}
    assert list(errors) == [0, 1, "b", "n", "l", "c"] and not errors[0] and not errors[1]
    assert "broken.png cannot be read" in errors["b"] and "none.png does not exist" in errors["n"]
    assert "tokens, but the model reads 512 at most" in errors["l"] and "2 pictures for 1 <image> tags" in errors["c"]
    assert "2 answers are in" in capsys.readouterr().err


def test_ctrl_c_and_going_on_from_the_shell(folder, scenes, tmp_path):
    path, out = write(tmp_path / "q.jsonl", asked(200, text="What is it?")), tmp_path / "a.jsonl"
    command_line = [sys.executable, "sample.py", *words(
        model_name_or_path=folder, device="cpu", data_path=path, image_folder=scenes, max_new_tokens=60, batch_size=2,
        out=out)]
    process = subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while (not out.exists() or out.read_bytes().count(b"\n") < 4) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    kept = rows(out)
    assert 4 <= len(kept) < 200
    process = subprocess.Popen(command_line, cwd=ROOT, stderr=subprocess.DEVNULL)
    while out.read_bytes().count(b"\n") < len(kept) + 4 and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    more = rows(out) if out.read_bytes().endswith(b"\n") else rows(out)[:-1]
    assert more[:len(kept)] == kept and len(kept) + 4 <= len(more) < 200
    assert len({row["question_id"] for row in more}) == len(more)


def test_urls_in_questions(folder, scenes, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(web, "fetch", lambda url: fetched.append(url) or sample.open_picture(scenes / "a.png"))
    path = write(tmp_path / "q.jsonl", [{"question_id": 1, "image": "https://x.example/a.png", "text": "What?"},
                                        {"question_id": 2, "image": "a.png", "text": "What?"}])
    assert answer(folder, path, scenes, "--out", tmp_path / "a.jsonl", "--allow_urls") == 0
    first, second = rows(tmp_path / "a.jsonl")
    assert first["text"] == second["text"] and fetched == ["https://x.example/a.png"]


def test_a_text_that_is_none_fails_its_own_question(folder, scenes, tmp_path):
    questions = [{"question_id": 1, "text": "half a pair \ud800"}, {"question_id": 2, "text": "Hi"}]
    path = write(tmp_path / "q.jsonl", questions)
    assert answer(folder, path, scenes, "--out", tmp_path / "a.jsonl") == 1
    first, second = rows(tmp_path / "a.jsonl")
    assert "half a surrogate pair" in first["metadata"]["error"] and second["metadata"] == {}


def test_a_url_that_fails_fails_its_own_question(folder, scenes, tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question_id": 1, "image": "http://127.0.0.1:1/a.png", "text": "What?"},
                                        {"question_id": 2, "image": "a.png", "text": "What?"}])
    assert answer(folder, path, scenes, "--out", tmp_path / "a.jsonl", "--allow_urls") == 1
    first, second = rows(tmp_path / "a.jsonl")
    assert "127.0.0.1, which is no public address" in first["metadata"]["error"] and second["metadata"] == {}


@pytest.mark.parametrize("flags, said", [
    (["--data_path", "q.jsonl", "--prompt", "Hi"], "--prompt goes without --data_path"),
    (["--data_path", "q.jsonl", "--image", "a.png"], "--image goes without --data_path"),
    (["--data_path", "q.jsonl", "--json"], "--json goes without --data_path"),
    (["--prompt", "Hi", "--out", "a.jsonl"], "--out goes with --data_path"),
    (["--prompt", "Hi", "--image_folder", "a"], "--image_folder goes with --data_path"),
    (["--prompt", "Hi", "--logprobs", "2"], "--logprobs goes with --json"),
    (["--prompt", "Hi", "--num_chunks", "2"], "--num_chunks goes with --data_path"),
    (["--prompt", "Hi", "--quant_type", "fp4"], "--quant_type goes with --bits"),
    (["--prompt", "Hi", "--attention_layers", "last"], "--attention_layers goes with --attention"),
    (["--data_path", "/"], "--data_path /: there is no such file"), (["--data_path", ""], "there is no such file"),
    (["--image-file", "a.png,b.png"], "a.png,b.png does not exist; several pictures in one word go with --sep ,"),
    (["--data_path", "q.jsonl", "--logprobs", "2"], "--logprobs goes with --json"),
    (["--prompt", "Hi", "--image", "."], "--image . is a folder"),
    (["--prompt", "Hi", "--max_pixels", "0"], "--max_pixels 0"),
    (["--data_path", "q.jsonl", "--out", "a.jsonl", "--batch_size", "0"], "--batch_size 0"),
    (["--prompt", "Hi", "--image", "http://x/y.png"], "picture http://x/y.png is a URL; add --allow_urls"),
    (["--prompt", "Hi", "--image", "http://127.0.0.1/y.png", "--allow_urls"], "no public address")])
def test_flags_that_do_not_go_together(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=re.escape(said)):
        sample.main(flags)


def test_a_picture_from_the_web_and_one_beside_it(folder, scenes, monkeypatch, capsys):
    monkeypatch.setattr(web, "fetch", lambda url: sample.open_picture(scenes / "b.png"))
    said = []
    for second in "http://x.example/b.png", scenes / "b.png":
        flags = words(model_name_or_path=folder, device="cpu", prompt="Compare.", max_new_tokens=6)
        assert sample.main([*flags, "--allow_urls", "--json", "--image", str(scenes / "a.png"), str(second)]) == 0
        said.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert said[0] == said[1]


def test_max_pixels_of_the_command_line(folder, scenes, monkeypatch):
    monkeypatch.setattr(sample.Image, "MAX_IMAGE_PIXELS", sample.Image.MAX_IMAGE_PIXELS)  # put back at the end
    monkeypatch.setattr(sample, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="a.png has more than 1,000 pixels"):
        sample.main(["--prompt", "Hi", "--image", str(scenes / "a.png"), "--max_pixels", "1000"])


def test_pictures_between_separators(scenes, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="none.png does not exist"):
        sample.main(["--prompt", "Hi", "--sep", ",", "--image", f"{scenes / 'a.png'},none.png"])


def test_progress_says_the_rate(monkeypatch, capsys):
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    command.Progress("answering", 1200, of_bytes=False).advance(300)
    assert capsys.readouterr().err == "answering: 25 % of 1,200, 15.0/s, 1:00 left\n"
