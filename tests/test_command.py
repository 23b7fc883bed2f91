"""Every door's manner: flags with dashes or underscores, booleans, one line and exit status 2 for a mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats import command


def parser():
    """A command line with one flag of each kind and no positional argument, as train.py's is."""
    made = command.Parser(prog="train.py")
    made.add_argument("--model_name_or_path")
    made.add_argument("--mm_projector_lr", type=float)
    made.add_switch("--bf16", help="compute in bfloat16")
    made.add_switch("--lazy_preprocess", default=True)
    return made


def commands():
    """A command line with subcommands, as weights.py's is."""
    made = command.Parser(prog="weights.py")
    choices = made.add_subparsers(dest="command", required=True)
    inspect = choices.add_parser("inspect")
    inspect.add_argument("path", nargs="+")
    inspect.add_switch("--json")
    choices.add_parser("convert").add_argument("--to", choices=["llava-hf", "llava"])
    return made


def refusal(capsys, made, *words):
    """What `made` says on stderr when it stops at `words`: one line, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        made.parse_args(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_dash_and_underscore_are_the_same():
    for flag in ("--model_name_or_path", "--model-name-or-path", "--model-name_or-path"):
        assert parser().parse_args([flag, "a-b_c"]).model_name_or_path == "a-b_c"
        assert parser().parse_args([f"{flag}=--a-b=c-d"]).model_name_or_path == "--a-b=c-d"


def test_a_sentence_is_no_flag():
    args = parser().parse_args(["--model-name-or-path", "--well-known words"])
    assert args.model_name_or_path == "--well-known words"
    assert parser().parse_args(["--mm_projector_lr", "-0.5"]).mm_projector_lr == -0.5


@pytest.mark.parametrize("words, expected", [
    ([], False), (["--bf16"], True), (["--bf16", "True"], True), (["--bf16", "true"], True), (["--bf16", "1"], True),
    (["--bf16", "False"], False), (["--bf16=false"], False), (["--bf16", "--mm_projector_lr", "1"], True)])
def test_booleans(words, expected):
    assert parser().parse_args(words).bf16 is expected


def test_a_boolean_may_default_to_true():
    assert parser().parse_args([]).lazy_preprocess is True
    assert parser().parse_args(["--lazy-preprocess", "no"]).lazy_preprocess is False


def test_a_bare_boolean_leaves_the_argument_behind_it_alone():
    args = commands().parse_args(["inspect", "--json", "folder", "other"])
    assert args.json is True and args.path == ["folder", "other"]
    assert commands().parse_args(["inspect", "--json", "False", "folder"]).json is False
    assert commands().parse_args(["inspect", "folder", "--json"]).json is True
    assert commands().parse_args(["--debug", "inspect", "folder"]).path == ["folder"]


def test_not_a_boolean(capsys):
    assert "expected True or False, not 'maybe'" in refusal(capsys, parser(), "--bf16", "maybe")


@pytest.mark.parametrize("words, sentence", [
    (["--model-name-or-pth", "x"], "unknown argument --model_name_or_pth; did you mean --model_name_or_path?"),
    (["--model", "x"], "unknown argument --model; "),  # flags are never abbreviated
    (["-mm_projector_lr=1"], "unknown argument -mm_projector_lr; did you mean --mm_projector_lr?"),
    (["--zzzz"], "unknown argument --zzzz; --help lists the flags")])
def test_unknown_flag_names_the_nearest(capsys, words, sentence):
    assert sentence in refusal(capsys, parser(), *words)


def test_unknown_flag_of_a_subcommand(capsys):
    assert "did you mean --to?" in refusal(capsys, commands(), "convert", "--too", "llava")
    assert "unknown argument --to;" in refusal(capsys, commands(), "inspect", "x", "--to", "llava")
    assert "unknown argument --json; flags go behind inspect" in refusal(capsys, commands(), "--json", "inspect")


def test_unknown_flag_is_named_before_the_required_one_it_may_be_a_slip_of(capsys):
    made = parser()
    made.add_argument("--data_path", required=True)
    assert "did you mean --data_path?" in refusal(capsys, made, "--data-pth", "x")
    assert "--data_path" in refusal(capsys, made)


def test_a_word_too_many_and_a_bad_number(capsys):
    assert "stray" in refusal(capsys, parser(), "stray")
    assert "mm_projector_lr" in refusal(capsys, parser(), "--mm_projector_lr", "fast")


@pytest.mark.parametrize("error", [ValueError("record 3:\nno image"), FileNotFoundError(2, "No such file", "x.json")])
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as stopped:
        command.run(main)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert "no image" in captured.err or "x.json" in captured.err

    monkeypatch.setattr(sys, "argv", ["sample.py", "--debug"])
    with pytest.raises(type(error)):
        command.run(main)


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)


@pytest.mark.parametrize("returned, status", [(None, None), (0, 0), (1, 1)])
def test_exit_status_is_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda: returned)
    assert stopped.value.code == status


@pytest.mark.parametrize("door", ["train", "data", "weights", "sample"])
def test_ctrl_c_while_imports_run_leaves_no_traceback(door, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    root = Path(command.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, root / f"{door}.py", "--help"], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_full_memory_is_one_sentence(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: not enough memory: ")


def test_a_bug_is_a_traceback():
    def main():
        raise NotImplementedError("a bug")

    with pytest.raises(NotImplementedError):
        command.run(main)
