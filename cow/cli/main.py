"""The command `cow`: the table of its verbs, and what holds for all of them.

Exit status: 0 all is well, 1 damage was found or something failed, 2 the command was not
understood. After Ctrl-C it is 130, and 141 where the reader of the output went away: what a shell
says of programs that these signals end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

import cow
from cow.cli import FAILED, OK, Parser, Verb, add_verbs, report_error, store

VERBS: tuple[Verb, ...] = (store.VERB,)

DESCRIPTION = "Device-mapper snapshots over image files, without root and without a kernel module."

EPILOG = """\
A sector is 512 bytes; a chunk is as many sectors as the COW store says.
Exit status: 0 all is well, 1 damage or an error, 2 the command was not understood.
"""


def make_parser() -> Parser:
    """Return the parser of the whole command."""
    parser = Parser(prog="cow", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"cow {cow.__version__}")
    add_verbs(parser, VERBS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (cow.CowError, OSError, MemoryError) as error:
        report_error(error)
        status = FAILED
    else:
        return status
    _drop_output()
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = make_parser().parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main())
