"""`cow lvm`: LVM's command line for volume groups in image files.

Where `cow serve` answers, the verb runs in the server, whose mapper holds the active LVs; otherwise
in this process, on the images alone. Everything else stands in cow.lvm.command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cow.cli import Verb, printable, report
from cow.daemon.client import Client, NotServed

MISUSED = 3
"""LVM's exit code for a command line that was not understood."""

HELP = ("-h", "--help", "help", "version")


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code: 0, 2, 3 or 5 as LVM's."""
    args, socket = list(argv), None
    before: list[str] = []
    while args and args[0].startswith("-") and args[0] not in HELP:
        option, equals, value = args.pop(0).partition("=")
        if option not in ("--devices", "--socket") or (not equals and not args):
            report(f"lvm: {option}: not understood before the verb (see cow lvm --help)")
            return MISUSED
        value = value if equals else args.pop(0)
        if option == "--socket":
            socket = value
        else:
            before += ["--devices", value]
    if not args or args[0] in HELP:
        return _run_here(args)
    args[1:1] = before
    if not _is_local(args):
        try:
            with Client(socket) as client:
                return _run_there(client, args)
        except NotServed:
            if socket is not None:
                raise
    return _run_here(args)


def _is_local(args: Sequence[str]) -> bool:
    """Tell whether the verb needs, or wants, no server."""
    line = " ".join(args)
    off = "--driverloaded n" in line or "--driverloaded=n" in line
    return off or any(arg in ("-h", "--help", "--longhelp") for arg in args)


def _run_here(args: Sequence[str]) -> int:
    from cow.lvm.command import Shell
    from cow.lvm.command import run as run_verb

    return run_verb(args, Shell(_out, _err, None, _ask))


def _run_there(client: Client, args: Sequence[str]) -> int:
    left: list[str] = []
    try:
        return client.lvm(
            args,
            os.getcwd(),
            out=_out,
            err=_err,
            ask=_ask,
            background=left.append,
            devices=os.environ.get("COW_LVM_DEVICES"),
            system_dir=os.environ.get("LVM_SYSTEM_DIR"),
        )
    except KeyboardInterrupt:
        _err("".join(["\n", *left]))
        raise


def _out(text: str) -> None:
    sys.stdout.write(printable(text))


def _err(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(printable(text))
    sys.stderr.flush()


def _ask(question: str) -> str | None:
    _err(question)
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None


def _in_main(options: argparse.Namespace) -> int:
    raise AssertionError(f"cow lvm is run before the parser: {options}")


VERB = Verb("lvm", "LVM's command line for volume groups in images", lambda parser: None, _in_main)
