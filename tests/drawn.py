"""Pictures and records drawn for the tests of training and answering, and train.py called from within the process."""

import json
import random
import socket

from PIL import Image, ImageDraw

import train

COLOURS = {"a.png": "red", "b.png": "green", "c.png": "blue", "d.png": "yellow", "e.png": "black"}
CAPTION = "a circle in the picture"


def draw(folder, captions=5):
    """Draw a circle of each colour into `folder`, and write captions.json (all equally long) and talks.json (one
    picture, several turns, two pictures, none) beside them. -> folder"""
    for name, colour in COLOURS.items():
        picture = Image.new("RGB", (40, 30), "white")
        ImageDraw.Draw(picture).ellipse((5, 5, 25, 25), colour)
        picture.save(folder / name)
    names = list(COLOURS)
    write(folder / "captions.json", [
        record(f"cap{i}", names[i % 5], ("human", "<image>\nDescribe."), ("gpt", CAPTION)) for i in range(captions)])
    write(folder / "talks.json", [
        record("one", "a.png", ("human", "<image>\nWhat color is it?"), ("gpt", "Red."), kind="color"),
        record("turns", "b.png", ("human", "What is it?\n<image>"), ("gpt", "A circle."), ("human", "Its color?"),
               ("gpt", "Green."), kind="color"),
        record("text", None, ("human", "How many colors are there?"), ("gpt", "Many."), kind="text"),
        record("two", ["c.png", "d.png"], ("human", "First <image> then <image> : which color is the first?"),
               ("gpt", "Blue."), kind="two"),
        record("long", "e.png", ("human", "<image>\nDescribe the picture."), ("gpt", "A black circle left of nothing."),
               kind="description"),
    ])
    return folder


def record(name, image, *turns, **others):
    """LLaVA's JSON of one conversation; turns: (role, text)."""
    picture = {} if image is None else {"image": image}
    return {"id": name, **picture, "conversations": [{"from": role, "value": text} for role, text in turns], **others}


def write(path, records):
    """Write records as JSON. -> path"""
    path.write_text(json.dumps(records))
    return path


def words(**flags):
    """Flags as a command line: words(max_steps=1, bf16=True) -> --max_steps 1 --bf16 True."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def rows_of(out):
    """log.jsonl of an output folder."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def ports(count):
    """Free ports of this machine, below those that it gives to outgoing connections: they stay free for a while."""
    found = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        try:
            socket.create_server(("localhost", port)).close()
            found += [port] * (port not in found)
        except OSError:
            pass
    return found


def run_train(out, **flags):
    """Train within this process. -> the rows of log.jsonl"""
    assert train.main(words(use_cpu=True, output_dir=out, **flags)) == 0
    return rows_of(out)
