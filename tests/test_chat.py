"""sampling/chat.py: what a conversation remembers, reads, shows, saves, and how it goes on after every mishap."""

import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from drawn import draw
from PIL import Image
from torch.nn.functional import one_hot

import data
import sample
from formats.records import read_records
from model import Llava
from sample import Request, generate
from sampling import web
from sampling.chat import Chat
from weights import load

SPEED = re.compile(r"^\[(\d+) tokens, first after [\d.]+ s, then [\d.]+ tokens/s, [\d.]+ GB/s of weights\]$", re.M)
SCENE, ONE = (str(Path(__file__).resolve().parent.parent / "examples" / name) for name in ("scene.png", "one.png"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("scenes"))
    (folder / "a b").mkdir()
    (folder / "c.png").rename(folder / "a b" / "it's c.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


class Heard:
    """What a chat asked the engine, what it got, and what it printed. turns: [(Request, Answer, rows known before)];
    speeds: tokens of the answers, from the lines on their speed"""

    def __init__(self):
        self.turns, self.lines, self.speeds = [], [], []

    def __getitem__(self, i):
        return self.turns[i][0]

    def answer(self, i):
        return self.turns[i][1]

    def said(self, text):
        """The one line that contains a text."""
        (line,) = [line for line in self.lines if text in line]
        return line


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """chat(lines, flags …, stop={turn: piece}) -> Heard; with `stop`, Ctrl-C comes when a turn has said so many
    pieces."""
    def run(lines, *flags, model=folder, stop=()):
        heard = Heard()

        def overhear(loaded, requests, on_token, past):
            turn, pieces = len(heard.turns), []

            def listen(i, piece):
                pieces.extend([piece] if pieces or piece.strip() else [])
                on_token(i, piece)
                if turn in stop and len(pieces) == stop[turn]:
                    signal.raise_signal(signal.SIGINT)

            heard.turns.append((*requests, None, None))
            if turn in stop and not stop[turn]:
                signal.raise_signal(signal.SIGINT)
            answers = generate(loaded, requests, listen, past=past)
            heard.turns[-1] = (*requests, *answers, past.reused)
            return answers

        monkeypatch.setattr(sample, "generate", overhear)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        words = ["--model_name_or_path", model, "--device", "cpu", "--max_new_tokens", 6, *flags]
        capsys.readouterr()
        assert sample.main(list(map(str, words))) == 0
        said, told = capsys.readouterr()
        heard.lines, heard.speeds = [line.removeprefix("> ") for line in said.splitlines()], SPEED.findall(told)
        return heard
    return run


# -------------------------------------------------------------------------------------------------------- conversations


def test_a_chat_remembers_what_was_said(chat, scenes):
    heard = chat(["What is it?", "Its color?", "", "never read"], "--image", scenes / "a.png")
    first, second = (request.messages for request, *_ in heard.turns)
    assert first == [("human", "<image>\nWhat is it?")]
    assert second == [*first, ("gpt", heard.answer(0).text), ("human", "Its color?")]
    assert len(heard[1].images) == 1 and heard.answer(0).text in "\n".join(heard.lines)
    assert heard.speeds == [str(len(heard.answer(i).token_ids)) for i in range(2)]


def test_a_chat_ends_with_its_input(chat):
    for lines in ([], ["/exit", "never read"], ["", "never read"]):
        assert chat(lines).turns == []


def test_only_the_new_turn_is_read(chat, monkeypatch):
    """With the shipped model, whose answers are read as they were written."""
    read, hidden = [], Llava.hidden
    monkeypatch.setattr(Llava, "hidden", lambda *args: (read.append(len(args[1].input_ids)), hidden(*args))[1])
    heard = chat(["what color is the circle ?", f"/image {ONE}", "what is it ?", "how many ?"], "--image", SCENE,
                 model=sample.MINIATURE)
    places, prompts = 16, [len(answer.prompt_ids) for _, answer, _ in heard.turns]
    rows = [length + (places - 1) * answer.prompt_ids.count(-200)
            for length, (_, answer, _) in zip(prompts, heard.turns)]
    assert [answer.prompt_ids.count(-200) for _, answer, _ in heard.turns] == [1, 2, 2]
    known = [0, *(length + len(answer.token_ids) - 1 for length, (_, answer, _) in zip(rows, heard.turns))]
    assert [reused for *_, reused in heard.turns] == known[:3]
    new = [length - before for length, before in zip(rows, known)]
    steps = [[count, *[1] * (len(answer.token_ids) - 1)] for count, (_, answer, _) in zip(new, heard.turns)]
    assert read == sum(steps, []) and new[2] < 20 < new[1] < new[0]


def test_what_is_read_is_what_a_record_of_it_would_train(chat, tmp_path):
    heard = chat(["what color is the circle ?", f"/image {ONE} {SCENE}", "is the first <image> or the second <image> ?",
                  "how many ?", f"/image {ONE}", "and here ?", f"/save {tmp_path / 'talk.json'}"], "--image", SCENE,
                 model=sample.MINIATURE)
    (record,) = read_records(tmp_path / "talk.json")
    assert record["image"] == [SCENE, ONE, SCENE, ONE] and record["settings"]["max_new_tokens"] == 6
    assert [turn["value"] for turn in record["conversations"][::2]] == [
        "<image>\nwhat color is the circle ?", "is the first <image> or the second <image> ?", "how many ?",
        "<image>\nand here ?"]
    loaded = load(sample.MINIATURE, device="cpu")
    ids = data.render_record(record, loaded.tokenizer, loaded.conv_mode).ids
    for _, answer, _ in heard.turns:
        assert ids[: len(answer.prompt_ids)] == answer.prompt_ids
    assert ids[len(answer.prompt_ids):] == answer.token_ids
    batch = data.collate([record], loaded)
    assert batch.input_ids.tolist().count(-200) == 4 * 16


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_by_every_kind_of_name(chat, scenes, monkeypatch):
    monkeypatch.setenv("HOME", str(scenes))
    odd = scenes / "a b" / "it's c.png"
    heard = chat([f"/image {odd}", "one", f'/image ~/a.png "{odd}" {scenes}/b.png', "/image ~/e.png", "four"])
    assert heard[0].messages[-1] == ("human", "<image>\none")
    assert heard[1].messages[-1] == ("human", "<image>\n" * 4 + "four")
    colours = [picture.getpixel((15, 15)) for picture in heard[1].images]
    assert colours == [(0, 0, 255), (255, 0, 0), (0, 0, 255), (0, 128, 0), (0, 0, 0)]
    assert heard.said("shows 4 picture(s)")


@pytest.mark.parametrize("words, sentence", [
    ("nowhere.png", r"nowhere\.png does not exist"), ("{}/broken.png", r"broken\.png cannot be read"),
    ("{0}/a.png {0}/nowhere.png", r"nowhere\.png does not exist"), ('"{}', "No closing quotation"),
    ("", r"the next question shows 0 picture\(s\)"), ("https://example.com/a.png", "is a URL; add --allow_urls")])
def test_a_picture_is_looked_at_at_once(chat, scenes, words, sentence):
    heard = chat([f"/image {words.format(scenes)}", "What?"])
    assert re.search(sentence, heard.lines[1]) and heard.lines[1].startswith("[")
    assert not heard[0].images and heard[0].messages == [("human", "What?")]


def test_pictures_from_the_web(chat, scenes, tmp_path, monkeypatch):
    """Fetched once, shown in every turn, saved by their address."""
    fetched, path, url = [], tmp_path / "talk.json", "https://example.com/a.png"
    monkeypatch.setattr(web, "fetch", lambda name: (fetched.append(name), Image.open(scenes / "a.png"))[1])
    heard = chat([f"/image {url}", "What?", "Where?", f"/save {path}"], "--allow_urls")
    assert heard[1].images[0].getpixel((15, 15)) == (255, 0, 0) and fetched == [url]
    assert json.loads(path.read_text())[0]["image"] == [url]
    assert chat([f"/load {path}"]).said(url) == f"[picture {url} is a URL; add --allow_urls to have it fetched]"


def test_pictures_and_tags_that_disagree(chat, scenes):
    """The question is forgotten, its pictures wait for the next."""
    heard = chat([f"/image {scenes}/a.png {scenes}/b.png", "Is it <image>?", "Compare.", "<image-placeholder>?"])
    assert heard.lines[2].startswith("[2 pictures for 1 <image> tags") and "/reset begins anew" in heard.lines[2]
    assert heard[1].messages == [("human", "<image>\n<image>\nCompare.")] and heard.answer(1)
    assert "2 pictures for 3 <image> tags" in heard.lines[-2]


def test_a_model_without_eyes(chat, tiny_llama, scenes):
    heard = chat([f"/image {scenes}/a.png", "What?"], model=tiny_llama("gqa"))
    assert heard.lines[1].startswith("[picture without a tower: ") and heard.answer(0)
    with pytest.raises(ValueError, match="picture without a tower"):
        chat(["What?"], "--image", scenes / "a.png", model=tiny_llama("gqa"))


# ------------------------------------------------------------------------------------------------------------- commands


def test_regenerate_draws_with_another_seed(chat, loaded, scenes):
    lines = ["Hi", f"/image {scenes}/a.png", "/regenerate", "/regenerate", "And?"]
    heard = chat(lines, "--temperature", 1, "--seed", 4)
    assert [request.seed for request, *_ in heard.turns] == [4, 5, 6, 6]
    expected = [generate(loaded, [Request([("human", "Hi")], max_new_tokens=6, temperature=1.0, seed=seed)])[0].text
                for seed in (4, 5, 6)]
    assert [heard.answer(i).text for i in range(3)] == expected and len(set(expected)) == 3
    assert heard[3].messages == [("human", "Hi"), ("gpt", expected[2]), ("human", "<image>\nAnd?")]
    greedy = chat(["/regenerate", "Hi", "/regenerate"])
    assert greedy.lines[1] == "[nothing has been answered yet]" and greedy.said("temperature 0")
    assert greedy.answer(0).text == greedy.answer(1).text and greedy[1].messages == [("human", "Hi")]


def test_reset_begins_anew_with_the_first_pictures(chat, scenes):
    heard = chat(["Hi", f"/image {scenes}/b.png", "/reset", "Ho"], "--image", scenes / "a.png")
    assert heard[1].messages == [("human", "<image>\nHo")] and len(heard[1].images) == 1


def test_saved_and_loaded_again(chat, scenes, tmp_path):
    path = tmp_path / "my talk.json"
    heard = chat(["/save", f"/save {path}", "Hi", "/set top_k 7", "/set stop '##' 'x y'", f"/save {path}", "And?",
                  f"/save {path}", "More?"], "--image", scenes / "a.png")
    assert heard.lines[1] == heard.lines[2] == "[nothing has been said yet]" and len(heard.turns) == 3
    (record,) = json.loads(path.read_text())
    assert record["image"] == [str(scenes / "a.png")] and len(record["conversations"]) == 4
    settings = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 7, "top_p": None, "stop": ["##", "x y"], "seed": 0}
    assert record["settings"] == record["settings"] | settings
    again = chat([f"/load {path}", "/set top_k 7", "/set stop '##' 'x y'", "More?", f"/save {path}"])
    assert again[0] == heard[2] and again.answer(0).token_ids == heard.answer(2).token_ids
    assert again.lines[-2] == f"[{path} is there already; name another file]"
    assert json.loads(path.read_text()) == [record]


def test_what_cannot_be_saved_or_loaded(chat, scenes, tmp_path):
    (tmp_path / "half.json").write_text('[{"id": 1, "conversations": [{"from": "human", "value": "a"}]}]')
    heard = chat(["Hi", "/save", f"/save {tmp_path}", f"/save {__file__}/x.json", f"/load {tmp_path}/half.json",
                  "/load nowhere.json", f"/load {scenes}/captions.json", "And?"])
    said = [line for line in heard.lines[2:] if line.startswith("[")]
    assert [bool(re.search(words, line)) for words, line in zip((
        "takes the name of a file", "is there already", "cannot be written", "does not end with an answer",
        "nowhere.json does not exist", "a.png does not exist"), said, strict=True)] == [True] * 6
    assert len(heard[1].messages) == 3


def test_settings_are_named_as_their_flags(chat):
    heard = chat(["/set", "/set temperature 0.7", "/set --max-new-tokens=3", "/set top_p 0.9", "/set top_k none",
                  "/set num_beams 1", "Hi", "/set top_p none", "Ho", "/set"], "--seed", 2)
    assert heard.lines[1].startswith("[max_new_tokens 6, temperature 0.0, top_k 50, top_p None")
    assert heard.lines[2:4] == ["[temperature 0.7]", "[max_new_tokens 3]"]
    assert heard[0] == Request([("human", "Hi")], [], 3, 0.7, None, 0.9, seed=2) and heard[1].top_p is None
    assert "top_k None" in heard.lines[-2] and "messages" not in heard.lines[-2]


@pytest.mark.parametrize("words, sentence", [
    ("temprature 1", "there is no temprature; did you mean temperature?"),
    ("zzz 1", "there is no zzz; there are max_new_tokens, temperature, "),
    ("temperature -1", "temperature -1.0: expected 0 (the likeliest token) or more"),
    ("temperature", "/set temperature : expected a number"), ("temperature none", "/set temperature none: expected"),
    ("top_k 2.5", "/set top_k 2.5: expected a whole number or none"),
    ("top_p much", "/set top_p much: expected a number or none"),
    ("stop '#", "/set stop '#: expected texts in quotes"), ("stop ''", "stop ['']: expected texts that are not empty"),
    ("messages 1", "there is no messages")])
def test_a_setting_that_cannot_be(chat, words, sentence):
    heard = chat([f"/set {words}", "Hi"])
    assert heard.lines[1].startswith(f"[{sentence}")
    assert heard[0] == Request([("human", "Hi")], max_new_tokens=6)


def test_an_unknown_command_is_no_question(chat):
    heard = chat(["/rest", "/usr/bin is what?", "/", "/help", "/reset now"])
    assert heard.lines[1] == "[there is no /rest; did you mean /reset?]" and not heard.turns
    assert heard.lines[2].startswith("[there is no /usr/bin; ")
    names = {line.split()[0].rstrip(":") for line in heard.lines if line.startswith("/")}
    assert names == {"/image", "/regenerate", "/reset", "/save", "/load", "/set", "/adapter", "/help", "/exit"}
    assert all(name in heard.lines[3] for name in names)


# -------------------------------------------------------------------------------------------- mishaps and interruptions


def test_a_conversation_that_outgrows_the_context(chat, loaded, folder, tmp_path):
    """One sentence; the last question is forgotten, and a short one, or a new conversation, goes on."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    length = len(sample.encode(loaded, Request([("human", "Hi")])).ids)
    config["text_config"]["max_position_embeddings"] = length + 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    heard = chat(["Hi", "What is it? " * 20, "Hm", "/reset", "Hi"], model=tmp_path)
    line = heard.said("tokens, but the model reads")
    assert line.startswith("[the prompt has ") and line.endswith("/reset begins anew]")
    assert [text for _, text in heard[2].messages] == ["Hi", heard.answer(0).text, "Hm"]
    assert heard.answer(3).token_ids == heard.answer(0).token_ids


@pytest.fixture
def script(loaded, monkeypatch):
    """What every model now says, whatever its scores are; with characters that take several tokens of a byte each."""
    text = "A d\u00e9j\u00e0 vu: \u4f60\u597d, \u00fcber red!"
    ids = [*loaded.tokenizer.encode(text, bos=False), loaded.tokenizer.eos_token_id]

    def say(self, logits, likeliest, push=sample.Growing.push):
        token = ids[len(self.token_ids)]
        return push(self, one_hot(torch.tensor(token), len(logits)).float(), token)

    monkeypatch.setattr(sample.Growing, "push", say)
    return text


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_stopped_answer_stays_and_the_chat_goes_on(chat, loaded, pieces):
    whole = chat(["Hi"], "--max_new_tokens", 20).answer(0).text
    heard = chat(["Hi", "And?", "/regenerate"], "--max_new_tokens", 20, stop={0: pieces})
    said = heard[1].messages[1][1]
    assert said and whole.startswith(said) and said != whole
    assert heard[1].messages == [("human", "Hi"), ("gpt", said), ("human", "And?")]
    assert heard.answer(1).token_ids == generate(loaded, [heard[1]])[0].token_ids  # what is remembered is in order
    assert heard.turns[1][2] > 20 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_answer_holds_no_half_character(chat, script):
    kept = set()
    for pieces in range(1, 12):
        heard = chat(["Hi", "And?"], "--max_new_tokens", 99, stop={0: pieces})
        kept.add(said := heard[1].messages[1][1])
        assert script.startswith(said)
        assert [line.strip() for line in heard.lines[1:3]] == [said, "[stopped; the chat goes on with what was said]"]
    assert len(kept) > 7 and any(said.endswith("\u4f60") for said in kept)


def test_stopped_before_the_first_word(chat, loaded):
    heard = chat(["Hi", "Ho", "And?", "/regenerate", "More?"], stop={0: 0, 2: 0, 3: 0})
    assert heard.lines.count("[stopped; the question is forgotten]") == 3
    assert heard[1].messages == [("human", "Ho")]
    assert heard[4].messages == [("human", "Ho"), ("gpt", heard.answer(1).text), ("human", "More?")]
    assert heard.answer(4).token_ids == generate(loaded, [heard[4]])[0].token_ids


def test_an_impatient_second_interrupt_ends_the_answer_at_once(loaded, capsys):
    asked = []

    def ask(request, past, hear):
        asked.append(past)
        hear("some ")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not stopped")

    talk = Chat(ask, object, Request([]), None)
    talk.question("Hi")
    assert talk.messages == [("human", "Hi"), ("gpt", "some")] and talk.past is not asked[0]


def test_interrupts_at_the_prompt(folder, monkeypatch, capsys):
    """The first is answered with a hint, the second in a row ends the chat."""
    lines = iter([KeyboardInterrupt, "/set seed 3", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def answer(_):
        if (line := next(lines)) is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    assert sample.main(["--model_name_or_path", str(folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("once more ends the chat") == 2 and next(lines) == "never read"


def test_an_adapter_that_is_stopped_half_way_begins_the_chat_anew():
    """What was read belongs to the model of before."""
    def stop(_):
        raise KeyboardInterrupt

    chat = Chat(None, object, Request([("human", "")]), None, worn=["one", "two"], wear=stop)
    chat.messages, before = [("human", "Hello")], chat.past
    with pytest.raises(KeyboardInterrupt):
        chat.do_adapter("two")
    assert not chat.messages and chat.past is not before
