"""`cow dm`: dmsetup's command line, spoken to the devices of `cow serve`.

Options, output, error lines and exit status are dmsetup's (docs/dmsetup.md has the differences), so
nothing here goes through argparse. Behind the error line of a failed ioctl stands one more line,
`cow: REASON`. Nothing is imported that the verb does not need: an answer takes a few milliseconds.
"""

from __future__ import annotations

import argparse
import getopt
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cow.cli import FAILED, OK, Verb
from cow.cli.dm import change, look
from cow.cli.dm.command import Command, error
from cow.cli.dm.names import Refused
from cow.daemon.client import NotServed

PROGRAM = "cow dm"
SHORT = "cCfG:hj:m:M:no:O:rS:u:U:vy"
NAMES = {
    "c": "columns", "C": "columns", "f": "force", "G": "gid", "h": "help", "j": "major",
    "m": "minor", "M": "mode", "n": "notable", "o": "options", "O": "sort", "r": "readonly",
    "S": "select", "u": "uuid", "U": "uid", "v": "verbose", "y": "yes",
}  # fmt: skip
LONG = (
    "addnodeoncreate addnodeonresume checks columns concise deferred force gid= help inactive "
    "major= manglename= minor= mode= nameprefixes noflush noheadings nolockfs noopencount "
    "notable noudevrules noudevsync options= readahead= readonly retry rows select= separator= "
    "setuuid showkeys sort= table= target= tree udevcookie= uid= unbuffered unquoted uuid= "
    "verbose verifyudev version yes"
).split()
ADDED = ("json", "names", "socket=")
"""Options that dmsetup does not have."""

USAGE = """\
Usage:

cow dm
        [--socket <path>] [--json] [--version] [-h|--help [-c|-C|--columns]]
        [-v|--verbose] [-f|--force]
        [-r|--readonly] [--noflush] [--nolockfs] [--inactive] [--retry]
        [-c|-C|--columns] [-o <fields>] [-O|--sort <sort_fields>]
        [-S|--select <selection>] [--nameprefixes] [--noheadings]
        [--separator <separator>]

{verbs}

<device> may be device name or (if only one) -u <uuid> or -j <major> -m <minor>
<fields> are comma-separated.  Use 'help -c' for list.
<concise_device_specification> has single-device entries separated by semi-colons:
    <name>,<uuid>,<minor>,<flags>,<table>
        where <flags> is 'ro' or 'rw' (the default) and any of <uuid>, <minor>
        and <flags> may be empty. Separate extra table lines with commas.
    E.g.: dev1,,,,0 100 linear /images/a.img 0,100 100 error;dev2,,,ro,0 1 error
A device in a table is a dm name, the path of an image, or <major>:<minor>.
Table_file contents may be supplied on stdin.
Options are: devno, devname, blkdevname.
Tree specific options are: ascii, utf, vt100; compact, inverted, notrunc;
                           blkdevname, [no]device, active, open, rw and uuid.
"""


def _help(command: Command, args: Sequence[str]) -> None:
    error(usage())
    if "columns" in command.options:
        from cow.cli.dm.report import help_lines

        error(*help_lines())


class DmVerb(NamedTuple):
    """A row of dmsetup's own table: how many arguments, and whether it takes them one at a time."""

    usage: str
    least: int
    most: int | None
    repeatable: int
    run: Callable[[Command, Sequence[str]], None]


_DEVICES = "[<device>...]"
VERBS: dict[str, DmVerb] = {
    "help": DmVerb("[-c|-C|--columns]", 0, 0, 0, _help),
    "create": DmVerb(
        "<dev_name>\n\t    [-j|--major <major> -m|--minor <minor>] [-u|--uuid <uuid>]\n"
        "\t    [-n|--notable|--table <table>|<table_file>]\n"
        "\tcreate --concise [<concise_device_spec_list>]",
        0,
        2,
        0,
        change.create,
    ),
    "remove": DmVerb("[--deferred] [-f|--force] [--retry] <device>...", 0, None, 2, change.remove),
    "remove_all": DmVerb("[--deferred] [-f|--force]", 0, 0, 0, change.remove_all),
    "suspend": DmVerb("[--noflush] [--nolockfs] <device>...", 0, None, 2, change.simple("suspend")),
    "resume": DmVerb("[--noflush] [--nolockfs] <device>...", 0, None, 2, change.simple("resume")),
    "load": DmVerb("<device> [<table_file>]", 0, 2, 0, change.load),
    "clear": DmVerb("<device>", 0, None, 2, change.simple("clear")),
    "reload": DmVerb("<device> [<table_file>]", 0, 2, 0, change.load),
    "wipe_table": DmVerb("<device>...", 0, None, 2, change.wipe_table),
    "rename": DmVerb("<device> [--setuuid] <new_name_or_uuid>", 1, 2, 0, change.rename),
    "message": DmVerb("<device> <sector> <message>", 2, None, 0, change.message),
    "ls": DmVerb("[--target <target_type>] [-o <options>] [--tree]", 0, 0, 0, look.ls),
    "info": DmVerb(_DEVICES, 0, None, 1, look.info),
    "deps": DmVerb(f"[-o <options>] {_DEVICES}", 0, None, 2, look.deps),
    "status": DmVerb(f"{_DEVICES} [--target <target_type>]", 0, None, 2, look.table),
    "table": DmVerb(
        f"{_DEVICES} [--concise] [--names] [--target <target_type>]", 0, None, 2, look.table
    ),
    "wait": DmVerb("<device> [<event_nr>]", 0, 2, 0, change.wait),
    "mknodes": DmVerb(_DEVICES, 0, None, 1, change.nothing),
    "mangle": DmVerb(_DEVICES, 0, None, 1, look.mangled),
    "target-version": DmVerb("[<target>...]", 1, None, 1, look.target_version),
    "targets": DmVerb("", 0, 0, 0, look.targets),
    "version": DmVerb("", 0, 0, 0, look.version),
    "splitname": DmVerb("<device> [<subsystem>]", 1, 2, 0, look.splitname),
}


def usage() -> str:
    """Return what dmsetup prints where it was not understood."""
    verbs = "\n".join(f"\t{name} {verb.usage}" for name, verb in VERBS.items())
    return USAGE.format(verbs=verbs)


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit status: 0, or 1 as dmsetup has no other."""
    try:
        options, verbose, args = _parse(argv)
    except Refused as refused:
        error(*refused.lines, "Couldn't process command line.")
        return FAILED
    if "help" in options or "version" in options:
        args = ["help" if "help" in options else "version"]
    if not args:
        error(usage())
        return FAILED
    name, *args = args
    verb = VERBS.get(name)
    if verb is None:
        error("Unknown command.", usage())
        return FAILED
    if len(args) < verb.least or (verb.most is not None and len(args) > verb.most):
        error("Incorrect number of arguments.", usage())
        return FAILED
    command = Command(options, name, verbose)
    try:
        return _run_verb(command, verb, args)
    except NotServed as failure:
        error(f"cow: {failure.strerror}")
        return FAILED
    finally:
        command.close()


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], int, list[str]]:
    """Take a command line apart: options anywhere, long ones cut short, as getopt_long does.

    What dmsetup does not have is not cut short, so that all the rest can be as there.
    """
    whole = {word.partition("=")[0] for word in argv}
    added = [name for name in ADDED if f"--{name.removesuffix('=')}" in whole]
    try:
        found, args = getopt.gnu_getopt(list(argv), SHORT, LONG + added)
    except getopt.GetoptError as failure:
        raise Refused(f"{PROGRAM}: {_getopt_text(failure)}") from failure
    options: dict[str, str] = {}
    verbose = 0
    for option, value in found:
        name = NAMES[option[1]] if len(option) == 2 else option[2:]
        verbose += name == "verbose"
        options[name] = value
    if ("major" in options) != ("minor" in options):
        raise Refused("Please specify both major number and minor number.")
    if "table" in options and "notable" in options:
        raise Refused("--table and --notable are incompatible.")
    if "addnodeonresume" in options and "addnodeoncreate" in options:
        raise Refused("--addnodeonresume and --addnodeoncreate are incompatible.")
    return options, verbose, args


def _getopt_text(failure: getopt.GetoptError) -> str:
    """Return what the C library says."""
    option, text = failure.opt, str(failure)
    if len(option) == 1 and f"-{option} " in text and f"--{option} " not in text:
        if "requires" in text:
            return f"option requires an argument -- '{option}'"
        return f"invalid option -- '{option}'"
    if "requires" in text:
        return f"option '--{option}' requires an argument"
    if "must not" in text:
        return f"option '--{option}' doesn't allow an argument"
    if "unique" in text:
        return f"option '--{option}' is ambiguous"
    return f"unrecognized option '--{option}'"


def _check_options(command: Command) -> None:
    """Refuse an -o that is neither for columns nor for names."""
    options = command.options
    text = options.get("options")
    if text is None or "columns" in options:
        return
    if "tree" in options:
        from cow.cli.dm.tree import parse_options

        parse_options(text)
    elif text not in ("devno", "devname", "blkdevname"):
        raise Refused(f"Option not recognised: {text}.")


def _run_verb(command: Command, verb: DmVerb, args: list[str]) -> int:
    options = command.options
    if command.verb == "splitname":
        options.setdefault("columns", "")
    try:
        _check_options(command)
    except Refused as refused:
        error(*refused.lines, "Couldn't process command line.")
        return FAILED
    selecting = "select" in options and verb.repeatable == 2
    try:
        columns = "columns" in options and command.verb in ("info", "splitname")
        if (selecting or columns) and not look.start_report(command):
            return OK
    except Refused as refused:
        error(*refused.lines)
        return FAILED
    by_option = "uuid" in options or "major" in options
    command.multiple = selecting or (
        verb.repeatable > 0 and len(args) != 1 and not (by_option and not args)
    )
    status = OK
    try:
        if selecting:
            args = look.selected(command, args)
            if not args:
                return OK
        for arg in args if verb.repeatable and args else [None]:
            verb.run(command, args if arg is None else [arg])
    except Refused as refused:
        error(*refused.lines, "Command failed.")
        status = FAILED
    _finish(command)
    return status


def _finish(command: Command) -> None:
    """Print what was gathered for the end."""
    if "json" in command.options and command.json is not None:
        print(json.dumps(command.json, indent=2))
    elif command.concise:
        print(";".join(command.concise))
    elif command.report is not None:
        for line in command.report.lines():
            print(line)


def _in_main(options: argparse.Namespace) -> int:
    raise AssertionError(f"cow dm is run before the parser: {options}")


HELP = "dmsetup's command line for the devices of cow serve"
VERB = Verb("dm", HELP, lambda parser: None, _in_main)
