"""The chat: question and answer in turn, until an empty line.

A turn's new pictures stand first in its question, an `<image>` line each, and stay there: what the model reads is what
it would be trained on as a record with pictures in several turns, and `/save` writes just that record. A line that
begins with / is a command; `/help` lists them. Ctrl-C stops an answer, and the chat goes on with what was said so far.
"""

import difflib
import os
import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import fields, replace
from typing import get_args

import data
from formats.records import read_records, write_records
from tokenizer import IMAGE_TAG

TAGS = (IMAGE_TAG, "<image-placeholder>")


class Chat:
    """One conversation after another, on the terminal. The engine stands below this room and is given as functions:

    ask(request, past, hear) -> Answer: prints the answer as it is written, handing each piece of text to hear(piece);
    new_past(): a memory of what the engine has read, which it keeps up by itself; request: the settings of every
    question; look(name) -> PIL picture, ValueError if the model cannot be shown it; first: [(name, picture)], shown
    with the first question; worn: folders of adapters, wear(folder): put one of them on.
    """

    def __init__(self, ask, new_past, request, look, first=(), worn=(), wear=None):
        self.ask, self.new_past, self.look, self.first, self.worn, self.wear = ask, new_past, look, first, worn, wear
        self.settings, self.saved = request, set()
        self.begin()

    def begin(self):
        """Nothing has been said. messages: [(role, text)]; shown, waiting: [(name, picture)] of the conversation, and
        those of the next question."""
        self.messages, self.shown, self.waiting, self.past = [], [], list(self.first), self.new_past()

    def run(self):
        """Read lines and do what they say until an empty one, or the end of the input. -> 0"""
        if sys.stdin.isatty():
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 (from here on input() has arrow keys and a history)
        shown = f" You show {len(self.first)} picture(s)." if self.first else ""
        print(f"Ask away; an empty line ends the chat, /help lists what else there is.{shown}")
        patience = 2
        while patience:
            try:
                line, patience = input("> ").strip(), 2
                if not line:
                    return 0
                self.command(line) if line.startswith("/") else self.question(line)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                patience -= 1
                print("\n[once more ends the chat, as an empty line does]" if patience else "")
            except (ValueError, OSError) as error:
                print(f"[{' '.join(str(error).split())}{'' if line.startswith('/') else '; /reset begins anew'}]")
        return 0

    def question(self, text):
        """Answer it. One that cannot be answered is forgotten, and its pictures wait for the next."""
        if not any(tag in text for tag in TAGS):
            text = f"{IMAGE_TAG}\n" * len(self.waiting) + text
        self.reply([*self.messages, ("human", text)], self.shown + self.waiting, waiting=[])

    def reply(self, messages, shown, waiting):
        """Answer the last of the messages; these and the answer, if there is one, are the conversation from then on."""
        request = replace(self.settings, messages=messages, images=[picture for _, picture in shown])
        said, stops = [], []

        def hear(piece):
            said.append(piece)
            if stops:  # between two tokens, where what the engine remembers is in order
                raise KeyboardInterrupt

        def stop(*_):
            stops.append(True)
            if not said or len(stops) > 1:  # at once, wherever it is
                self.past = self.new_past()
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, stop)
        try:
            text = self.ask(request, self.past, hear).text
        except KeyboardInterrupt:
            text = "".join(said).strip()
            print(f"\n[stopped; {'the chat goes on with what was said' if text else 'the question is forgotten'}]")
            if not text:
                return
        finally:
            signal.signal(signal.SIGINT, before)
        self.messages, self.shown, self.waiting = [*messages, ("gpt", text)], shown, waiting

    def command(self, line):
        """`/name the rest` does do_name("the rest")."""
        name, _, rest = line.partition(" ")
        known(name, [f"/{method.removeprefix('do_')}" for method in vars(Chat) if method.startswith("do_")])
        getattr(self, f"do_{name[1:]}")(rest.strip())

    def do_image(self, rest):
        """/image FILE [FILE …]: show pictures with the next question"""
        whole = os.path.expanduser(rest)  # a name with blanks, or several of them, quoted as in a shell
        names = [whole] if os.path.isfile(whole) else map(os.path.expanduser, shlex.split(rest))
        self.waiting += [(name, self.look(name)) for name in names]
        print(f"[the next question shows {len(self.waiting)} picture(s)]")

    def do_regenerate(self, _):
        """/regenerate: answer the last question again, with another seed"""
        if not self.messages:
            raise ValueError("nothing has been answered yet")
        if self.settings.temperature > 0:
            self.settings = replace(self.settings, seed=self.settings.seed + 1)
        else:
            print("[at temperature 0 the same words come again; /set temperature 0.7 draws others]")
        self.reply(self.messages[:-1], self.shown, self.waiting)

    def do_reset(self, _):
        """/reset: forget the conversation; the pictures of --image wait for the first question again"""
        self.begin()
        print("[nothing has been said]")

    def do_save(self, name):
        """/save FILE.json: write the conversation as a record to train on, with its settings"""
        path = os.path.abspath(os.path.expanduser(name))
        if not name or not self.messages:
            raise ValueError("/save takes the name of a file" if self.messages else "nothing has been said yet")
        if os.path.exists(path) and path not in self.saved:
            raise ValueError(f"{path} is there already; name another file")
        images = [file if "://" in file else os.path.abspath(file) for file, _ in self.shown]
        write_records(path, [{
            "id": os.path.splitext(os.path.basename(path))[0], **({"image": images} if images else {}),
            "conversations": [{"from": role, "value": text} for role, text in self.messages],
            "settings": {key: getattr(self.settings, key) for key in kinds(self.settings)}}])
        self.saved.add(path)
        print(f"[{len(self.messages)} turns saved in {path}]")

    def do_load(self, name):
        """/load FILE.json: go on with the first record of a file, such as /save writes"""
        messages, image, _ = data.messages_of(read_records(os.path.expanduser(name))[0])
        if messages[-1][0] != "gpt":
            raise ValueError(f"{name}: the record does not end with an answer")
        images = [image] * str(messages).count(IMAGE_TAG) if isinstance(image, str) else image or []
        self.shown, self.messages, self.waiting = [(file, self.look(file)) for file in images], messages, []
        print(f"[{len(messages)} turns and {len(images)} picture(s) loaded]")

    def do_set(self, rest):
        """/set NAME VALUE: change a setting, named as its flag; /set shows all"""
        name, _, value = rest.lstrip("-").replace("=", " ", 1).partition(" ")
        name, kind = name.replace("-", "_"), kinds(self.settings)
        if name:
            known(name, kind)
            self.settings = replace(self.settings, **{name: read(name, value.strip(), kind[name])})
        print("[" + ", ".join(f"{key} {getattr(self.settings, key)}" for key in ([name] if name else kind)) + "]")

    def do_adapter(self, name):
        """/adapter NAME: put on another of --adapter A,B,…, by the end of its path; the chat begins anew"""
        if len(self.worn) < 2:
            raise ValueError("/adapter switches between the folders of --adapter A,B,…; here there are no two")
        name = name.rstrip("/")
        found = [path for path in self.worn if name and f"/{path.rstrip('/')}".endswith(f"/{name}")]
        if not found:
            raise ValueError(f"/adapter and one of {', '.join(self.worn)}")
        try:
            self.wear(found[0])
        finally:  # stopped half-way, too: what was read belongs to another model
            self.begin()
        print(f"[{found[0]} answers from here on]")

    def do_help(self, _):
        """/help: this list"""
        print("\n".join(method.__doc__ for name, method in vars(Chat).items() if name.startswith("do_")))

    def do_exit(self, _):
        """/exit: end the chat, as an empty line, the end of the input, and Ctrl-C twice do"""
        raise EOFError


def kinds(request):
    """A request's settings -> {name: type}, such as int, or int | None"""
    return {f.name: f.type for f in fields(request) if f.name not in ("messages", "images", "logprobs")}


def read(name, text, kind):
    """A setting's value as text -> the value; several texts (stop) in quotes, side by side."""
    kind, *others = get_args(kind) or [kind]
    if others and text.lower() == "none":
        return None
    try:
        return kind(shlex.split(text) if kind is list else text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "texts in quotes") + " or none" * bool(others)
        raise ValueError(f"/set {name} {text}: expected {wanted}") from None


def known(name, names):
    """ValueError with the nearest of the names if there is none like this."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"there is no {name}; {hint}")
