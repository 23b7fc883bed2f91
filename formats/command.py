"""Command lines with one manner: every door of the project parses its flags and reports mistakes through this file.

* `--model-name-or-path` and `--model_name_or_path` are the same flag; flags are never abbreviated.
* A boolean flag is written bare (`--bf16`) or with a value (`--bf16 True`), as LLaVA's scripts do.
* An unknown flag is an error that names the nearest known one.
* A user's mistake (ValueError, OSError) is one line on stderr and exit status 2; `--debug` shows the traceback.
"""

import argparse
import difflib
import os
import sys


def boolean(text):
    """'True', 'false', '1', 'no' … -> bool. `type=bool` would take every non-empty string, 'False' too, for True."""
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


class Parser(argparse.ArgumentParser):
    """argparse with the manner described at the head of this file."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        if options.get("add_help", True):
            self.add_switch("--debug", help="show the traceback of an error")

    def add_switch(self, flag, default=False, help=None, **options):
        """A boolean flag: absent = default, bare = True, or followed by True|False."""
        self.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=help, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = [_underscored(a) for a in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._every_action() for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
            self.error(f"unknown argument {unknown[0]}{hint}")
        return values

    def _every_action(self):
        """This parser's flags and those of its subcommands."""
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._every_action()

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def _underscored(word):
    """`--a-b=c-d` -> `--a_b=c-d`: only the flag's name is changed, never its value."""
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def run(main):
    """Call main(); a user's mistake becomes one line on stderr and exit status 2 (with --debug: its traceback)."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away (`… | head`): not a mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
