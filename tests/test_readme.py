"""The README tells the truth: its files exist, its commands parse, those marked fast run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from training import flags

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """(words, whether it is marked fast) of every shell command in the README; a backslash continues a line."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words, bool(re.search(r"#\s*fast\b", line))


COMMANDS = list(commands())
PYTHON = [words for words, _ in COMMANDS if words[0] in ("python", "torchrun")]


def test_there_are_commands_of_every_kind():
    assert {"make", "python", "torchrun"} <= {words[0] for words, _ in COMMANDS}
    assert any(fast for _, fast in COMMANDS)


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_a_command_s_flags_exist(words):
    if "train.py" in words:
        flags.parse(words[words.index("train.py") + 1:])
    elif "sample.py" in words:
        sample.build_parser().parse_args(words[words.index("sample.py") + 1:])
    else:
        script = words[1: 3] if words[1] == "-m" else words[1: 2]
        assert subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("target", sorted({w for words, _ in COMMANDS if words[0] == "make" for w in words[1:]}))
def test_a_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", [words for words, fast in COMMANDS if fast], ids=" ".join)
def test_a_fast_command_runs(words, tmp_path):
    words = [str(tmp_path / w) if w.endswith(".png") and "/" not in w else w for w in words]  # nothing into the project
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def runs_here(words):
    """Whether a command needs nothing that is not in the repository or made by the commands above it."""
    files = [word for word in " ".join(words[1:]).replace(",", " ").split() if re.search(r"[/.]\w", word)]
    own = re.compile(r"(runs|miniature|examples)/|\w+\.(py|png)$|(miniature|benches)\.?\w*$")
    ours = all(map(own.match, files))
    return words[1] in ("demo", "towers", "demo-smollm") if words[0] == "make" else words[0] == "python" and ours


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words, fast in COMMANDS if not fast and runs_here(words)], ids=" ".join)
def test_a_slow_command_runs(words, tmp_path):
    """In the README's order, since some need what others made; what is not the repository's own cannot be run here."""
    words = [sys.executable if w == "python" else str(tmp_path / w) if w.endswith(".png") and "/" not in w else w
             for w in words]
    again = ["--overwrite_output_dir"] if "--recipe" in words and "--plan" not in words else []
    done = subprocess.run(words + again, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    if words[0] == "make" and words[1] != "towers":  # the sight meter that the README promises
        run = ROOT / "runs" / ("finetune" if words[1] == "demo" else "smollm2-finetune")
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        row = [row for row in rows if row.get("eval_set") == "eval"][-1]
        seen, guessed = row["eval_match"], max(row["eval_match_shuffled"], row["eval_match_blank"])
        if words[1] == "demo":
            assert seen >= 0.80 and guessed <= seen - 0.40
        else:
            assert seen >= row["eval_match_shuffled"] + 0.25


def test_the_files_it_names_exist():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_its_python_runs(monkeypatch, capsys):
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block]
    monkeypatch.chdir(ROOT)
    for block in blocks:
        names = {}
        exec(block, names)
        assert [bool(answer.text) for answer in names["answers"]] == [True, True]
    assert blocks


def test_the_number_of_lines_it_promises():
    promised = int(re.search(r"in ([\d,]+) lines", README)[1].replace(",", ""))
    rooms = ("formats", "training", "sampling", "kernels")
    files = [*ROOT.glob("*.py"), *(f for room in rooms for f in (ROOT / room).glob("*.py"))]
    lines = sum(f.read_text(encoding="utf-8").count("\n") for f in files)
    assert promised * 0.95 < lines <= promised
