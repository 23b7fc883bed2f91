"""The rules that keep the house readable: its rooms, their order, their size, what they import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room imports only from those before it.
ROOMS = ["kernels", "projector", "tokenizer", "vision", "quant", "lora", "model", "formats", "weights", "data",
         "sampling", "sample", "training", "train", "evals", "serving", "miniature", "benches"]
TOP = {"projector", "tokenizer", "vision", "quant", "lora", "model", "weights", "data", "sample", "train"}
CORE = TOP | {"formats", "training"}
RUN_TIME = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "huggingface_hub", "triton", "jinja2"}
ON_REQUEST = {"gguf", "wandb", "tensorboard"}  # imported inside the function that was asked for it
FILES = sorted([*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).glob("**/*.py"))])
TREES = {str(f.relative_to(ROOT)): ast.parse(f.read_text()) for f in FILES}


def room_of(name):
    """`training/flags.py` -> training, `model.py` -> model."""
    return name.split("/")[0].removesuffix(".py")


def imports(tree):
    """Every import of a file, wherever it stands -> (first name, line)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def lines(name):
    return len((ROOT / name).read_text().splitlines())


def test_only_the_ten_files_at_the_top():
    assert {f.stem for f in ROOT.glob("*.py")} <= TOP


def test_every_python_file_lives_in_a_room():
    folders = {f.parent.relative_to(ROOT).parts[0] for f in ROOT.glob("*/*.py") if not f.parent.name.startswith(".")}
    assert folders - {"runs", "out"} <= {*ROOMS, "tests"}


def test_the_core_is_small():
    """7,000 lines is the aim; adapters, quantised checkpoints, sharded loading, watching ranks and the engine took
    1,400 more. What stands beside the engine (chat, beams, files of questions, maps, placement) is counted apart."""
    core = {name: lines(name) for name in TREES if room_of(name) in CORE}
    assert sum(core.values()) <= 8400
    assert sum(lines(name) for name in TREES if room_of(name) == "sampling") <= 1500


@pytest.mark.parametrize("name", TREES)
def test_lengths(name):
    assert lines(name) <= 700
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 70, f"{name}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("name", TREES)
def test_imports(name):
    """Rooms import from rooms above them; everything else comes from Python or from the short list of dependencies."""
    room, at_top = room_of(name), {node.lineno for node in TREES[name].body}
    for imported, line in imports(TREES[name]):
        where = f"{name}:{line}: {room} imports {imported}"
        if imported in ROOMS:
            assert ROOMS.index(imported) <= ROOMS.index(room), f"{where}, which stands below it"
        elif room != "benches":  # which measures the peers
            assert imported in sys.stdlib_module_names | RUN_TIME | ON_REQUEST, f"{where}, which is not on the list"
            assert imported not in ON_REQUEST or line not in at_top, f"{where} though nobody asked for it yet"


@pytest.mark.parametrize("name", TREES)
def test_public_names_say_what_they_are(name):
    tree = TREES[name]
    assert ast.get_docstring(tree) or not tree.body, f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}:{node.lineno}: {node.name} has no docstring"
