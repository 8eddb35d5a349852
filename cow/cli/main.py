"""The command `cow`: the table of its verbs, and what holds for all of them.

Exit status: 0 all is well, 1 damage was found or something failed, 2 the command was not
understood. After Ctrl-C it is 130, and 141 where the reader of the output went away: what a shell
says of programs that these signals end.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from cow import __version__
from cow.cli import FAILED, OK, Parser, Verb, add_verbs, report_error
from cow.errors import CowError

MODULES = ("dm", "lvm", "serve", "store")
"""The modules of this package that hold a verb each."""

DESCRIPTION = "Device-mapper snapshots over image files, without root and without a kernel module."

EPILOG = """\
A sector is 512 bytes; a chunk is as many sectors as the COW store says.
Exit status: 0 all is well, 1 damage or an error, 2 the command was not understood.
"""


def verbs() -> tuple[Verb, ...]:
    """Return the table of all verbs."""
    return tuple(importlib.import_module(f"cow.cli.{name}").VERB for name in MODULES)


def make_parser() -> Parser:
    """Return the parser of the whole command."""
    parser = Parser(prog="cow", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"cow {__version__}")
    add_verbs(parser, verbs())
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names are bytes, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (CowError, OSError, MemoryError) as error:
        report_error(error)
        status = FAILED
    else:
        return status
    _drop_output()
    return status


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["dm"]:  # has dmsetup's own options, and answers without importing the engine
        from cow.cli import dm

        return dm.run(args[1:])
    if args[:1] == ["lvm"]:  # has LVM's options and exit codes
        from cow.cli import lvm

        return lvm.run(args[1:])
    try:
        options = make_parser().parse_args(args)
    except SystemExit as end:  # after --help, --version, or the line about a wrong usage
        return OK if end.code is None else int(end.code)
    status: int = options.run(options)
    return status


def _drop_output() -> None:
    """Send what is still to be printed nowhere, so that nobody complains at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
