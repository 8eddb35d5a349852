"""What the commands of `cow` are made of: the verb, the group of verbs, their parser.

A verb is a name, a line of help, its arguments and a function that runs it and returns the exit
status. `cow.cli.main.VERBS` is the table of them all; a group, as `cow store`, is a verb too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

OK = 0
FAILED = 1
"""Exit status where damage was found or something went wrong."""

USAGE = 2
"""Exit status where the command was not understood."""


class Verb(NamedTuple):
    """One row of a table of verbs. `help` is one line; `epilog` stands below the options."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviated options and reports an error in one line."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit."""
        verbs = self.prog.partition(" ")[2]
        report(f"{verbs + ': ' if verbs else ''}{message} (see {self.prog} --help)")
        raise SystemExit(USAGE)


def add_verbs(parser: argparse.ArgumentParser, verbs: Sequence[Verb]) -> None:
    """Let a parser take one of `verbs`, whose function it leaves in `run`."""
    table = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in verbs:
        child = table.add_parser(
            verb.name,
            help=verb.help,
            prog=f"{parser.prog} {verb.name}",
            description=f"{verb.help[:1].upper()}{verb.help[1:]}.",
            epilog=verb.epilog,
        )
        child.set_defaults(run=verb.run)
        verb.add_arguments(child)


def group(name: str, help_line: str, verbs: Sequence[Verb], epilog: str = "") -> Verb:
    """Make one verb of several."""

    def run(options: argparse.Namespace) -> int:
        raise AssertionError(f"{name} alone runs nothing: {options}")

    return Verb(name, help_line, lambda parser: add_verbs(parser, verbs), run, epilog)


def report(text: str) -> None:
    """Print one line about an error."""
    print(f"cow: {printable(' '.join(text.splitlines()))}", file=sys.stderr)


def report_error(error: BaseException, path: str = "") -> None:
    """Print an exception as one line that names the file it is about."""
    text = describe(error)
    report(text if text.startswith(f"{path}:") or not path else f"{path}: {text}")


def describe(error: BaseException) -> str:
    """Return the text of an exception without its errno."""
    if isinstance(error, MemoryError):
        return str(error) or "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def printable(text: str) -> str:
    """Write the bytes of a file name that are no text as escapes."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
