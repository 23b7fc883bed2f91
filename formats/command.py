"""Command lines with one manner: every door of the project parses its flags and reports mistakes through this file.

* `--model-name-or-path` and `--model_name_or_path` are the same flag; flags are never abbreviated.
* A boolean flag is written bare (`--bf16`) or with a value (`--bf16 True`), as LLaVA's scripts do.
* An unknown flag is an error that names the nearest known one.
* A user's mistake (ValueError, OSError) is one line on stderr and exit status 2; `--debug` shows the traceback.
"""

import argparse
import contextlib
import ctypes
import difflib
import os
import re
import sys
import time

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
FLAG = re.compile(r"(--?[A-Za-z][\w-]*)(=.*)?", re.DOTALL)  # --flag or --flag=value; a text like "-- well" is neither


def boolean(text):
    """'True', 'false', '1', 'no' … -> bool. `type=bool` would take every non-empty string, 'False' too, for True."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return text.lower() in TRUE


SEVERAL = {"nargs": "+", "action": "extend", "default": []}  # options of a flag that takes several, or is repeated
SWITCH = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}  # options of a boolean flag


class Parser(argparse.ArgumentParser):
    """argparse with the manner described at the head of this file."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_switch("--debug", help="show the traceback of an error")

    def add_switch(self, flag, default=False, help=None, **options):
        """A boolean flag: absent = default, bare = True, or followed by True|False."""
        self.add_argument(flag, default=default, help=help, **SWITCH, **options)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's; subcommands pass through here too, each with its own flags. An unknown flag ends the program."""
        words = [re.sub(r"^--[A-Za-z][\w-]*(?==|\Z)", lambda name: "--" + name[0][2:].replace("-", "_"), word)
                 for word in (sys.argv[1:] if args is None else args)]  # a flag's name is changed, never its value
        known = [flag for action in self._actions for flag in action.option_strings]
        switches = [flag for action in self._actions if action.type is boolean for flag in action.option_strings]
        commands = next((action.choices for action in self._actions if action.nargs == argparse.PARSER), ())
        for i, word in enumerate(words):
            if word == "--" or word in commands:  # a subcommand looks after its own flags
                break
            flag = FLAG.fullmatch(word)
            if flag and flag[1] not in known:
                near = difflib.get_close_matches(flag[1], known, 1, 0.5)
                others = f"flags go behind {', '.join(commands)}" if commands else "--help lists the flags"
                hint = f"did you mean {near[0]}?" if near else others
                self.error(f"unknown argument {flag[1]}; {hint}")
            if word in switches and self._get_positional_actions():  # in `--json FOLDER` FOLDER is no boolean
                words[i] += "" if "".join(words[i + 1:i + 2]).lower() in TRUE + FALSE else "=True"
        return super().parse_known_args(words, namespace)

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def run(main):
    """Call main(); a user's mistake becomes one line on stderr and exit status 2 (with --debug: its traceback)."""
    keep_freed_memory()
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output went away (`… | head`): not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, RecursionError, MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error)  # torch's
        if "--debug" in sys.argv or not (full or isinstance(error, ValueError | OSError | RecursionError)):
            raise
        words = "error: not enough memory:" if full else "error:"
        print(words, " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def keep_freed_memory():
    """Have C's library (glibc) keep up to a gigabyte of what is freed for the next use. By itself it returns memory to
    the system after each large operation, and to be given pages anew takes longer than the operation: attention of 200
    rows takes 3.0 instead of 1.0 ms, of 680 rows forth and back 46 instead of 28 (9 heads, bfloat16, one thread of an
    EPYC Zen 4). What is larger than 32 MB comes and goes as before."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def say(text, end="\n"):
    """Tell the user, once: on stderr, so that stdout stays free for answers and JSON; from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True, end=end)


def file_size(text):
    """'5GB', '200 MB', '1.5GiB', '1000' -> bytes. Decimal units, as everywhere with weight files, unless it says i."""
    match = re.fullmatch(r"([\d.]+)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    try:
        size = float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2]) if match[2] else 0)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 200MB, not {text!r}")
    return int(size)


def duration(seconds):
    """62 -> '1:02', 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Progress:
    """A line on stderr about work of more than a second: `writing: 45 % of 13.48 GB, 310 MB/s, 0:24 left`. total: bytes
    or other things (`1,200, 3.1/s`). On a terminal it is renewed in place, in a log it comes every ten seconds."""

    def __init__(self, label, total, of_bytes=True):
        self.of_bytes, self.label, self.total, self.done, self.terminal = of_bytes, label, total, 0, sys.stderr.isatty()
        self.began = self.said = time.monotonic()

    def advance(self, size):
        """`size` more bytes are done."""
        self.done += size
        now, last = time.monotonic(), self.done == self.total
        if now - self.began < 1 or (now - self.said < (0.2 if self.terminal else 10) and not last):
            return
        self.said, rate = now, self.done / (now - self.began)
        left = duration((self.total - self.done) / rate)
        total = f"{self.total / 1e9:.2f} GB, {rate / 1e6:.0f} MB" if self.of_bytes else f"{self.total:,}, {rate:,.1f}"
        say(f"{self.label}: {100 * self.done / self.total:.0f} % of {total}/s, {left} left",
            end="   \r" if self.terminal and not last else "\n")
