"""LVM's command line: options, messages and exit codes of its verbs, on VGs in image files.

`run` runs one command line. Nothing here touches sys.stdout, sys.stdin or the directory of the
process: the same verbs run in `cow lvm` and inside `cow serve`. The engine is imported when a verb
runs, so that help comes at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cow.errors import CowError, CowOSError
from cow.lvm.command.options import FAILED, MISUSED, OK, Options, ParseError, UsageError, parse
from cow.lvm.command.shell import Shell
from cow.lvm.command.verbs import Verb, find_verb, help_text, verb_help
from cow.lvm.errors import RequestError
from cow.lvm.settings import read_settings

if TYPE_CHECKING:
    from cow.lvm.command.command import Command

__all__ = ["Shell", "run"]

TEST_MODE = "TEST MODE: Metadata will NOT be updated and volumes will not be (de)activated."
NO_SUCH_COMMAND = 2


def run(argv: Sequence[str], shell: Shell) -> int:
    """Run a command line, the verb first, and return its exit code: 0, 2, 3 or 5."""
    try:
        with shell.lock:
            return _run(list(argv), shell)
    finally:
        shell.flush()


def _run(argv: list[str], shell: Shell) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _help(argv[1:], shell)
    verb = find_verb(argv[0])
    if verb is None:
        shell.err("  No such command.  Try 'cow lvm help'.\n")
        return NO_SUCH_COMMAND
    try:
        options, args = parse(verb.name, verb.options, argv[1:])
    except ParseError as error:
        text = error.strerror or ""
        indent = "" if text.startswith(f"{verb.name}: ") else "  "
        shell.err("".join(f"{indent}{line}\n" for line in text.split("\n")))
        shell.err("  Error during parsing of command line.\n")
        return MISUSED
    if options.has("help", "longhelp"):
        shell.out(verb_help(verb))
        return OK
    return _run_verb(verb, options, args, shell, shlex.join(argv))


def _help(names: Sequence[str], shell: Shell) -> int:
    if not names:
        shell.out(help_text())
        return OK
    for name in names:
        verb = find_verb(name)
        if verb is None:
            shell.err(f"  {name}: no such command.\n")
            return FAILED
        shell.out(verb_help(verb))
    return OK


def _run_verb(verb: Verb, options: Options, args: list[str], shell: Shell, line: str) -> int:
    from cow.lvm.command.command import Command

    warnings: list[str] = []
    try:
        settings = read_settings(options.get("config"), shell.environ, warnings.append)
    except CowOSError as error:
        _complain(shell, error, verb)
        return getattr(error, "exit_code", FAILED)
    command = Command(verb.name, options, args, shell, settings, line)
    for warning in warnings:
        command.warn(warning)
    if options.get("driverloaded") is False:
        command.warn(
            "WARNING: Activation disabled. No device-mapper interaction will be attempted."
        )
    if options.has("test"):
        command.warn(TEST_MODE)
    try:
        _check_args(verb, options, args)
        verb.run(command)
    except UsageError:
        _usage(verb, shell)
        return MISUSED
    except CowOSError as error:
        _complain(shell, error, verb, command)
        return max(command.status, getattr(error, "exit_code", FAILED))
    except CowError as error:
        command.fail(str(error))
    finally:
        command.close()
    return command.status


def _check_args(verb: Verb, options: Options, args: Sequence[str]) -> None:
    most = verb.most
    if len(args) < verb.least and not (verb.selectable and options.has("select")):
        raise UsageError("")
    if most is not None and len(args) > most:
        raise ParseError(f"Command does not accept argument: {args[most]}.")


def _complain(shell: Shell, error: CowOSError, verb: Verb, command: Command | None = None) -> None:
    text = error.strerror or str(error)
    if command is not None:
        command.warn(text)
    else:
        shell.err("".join(f"  {line}\n" for line in text.split("\n")))
    if isinstance(error, RequestError) and getattr(error, "exit_code", 0) == MISUSED:
        shell.err(f"  Run `{verb.name} --help' for more information.\n")


def _usage(verb: Verb, shell: Shell) -> None:
    shell.err(
        f"  No command with matching syntax recognised.  Run '{verb.name} --help' for more"
        " information.\n"
    )
    if len(verb.syntax) == 1:
        shell.err("  Correct command syntax is:\n")
        shell.out(f"  {verb.name} {verb.syntax[0]}\n\n")
