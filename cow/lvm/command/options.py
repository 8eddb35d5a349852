"""Options of LVM's verbs: how they are written, and what their values may be.

The options of a verb are words: `LONG`, `S|LONG` with a short letter, and behind them `=KIND` for
the value; `+` at the end lets an option be given several times, `*` counts how often it is.
"""

from __future__ import annotations

import getopt
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from cow.lvm.allocation import POLICIES
from cow.lvm.errors import LVMError, RequestError
from cow.lvm.names import check_tag
from cow.lvm.size import SizeError, parse_amount, parse_extents, parse_size

COMMON: Final = (
    "commandprofile=text config=text d|debug* devices=list+ devicesfile=text driverloaded=yn h|help"
    " journal=text lockopt=text longhelp nohints nolocking profile=text q|quiet* t|test v|verbose*"
    " version y|yes"
)
"""The options of every verb."""


OK: Final = 0
MISUSED: Final = 3
FAILED: Final = 5
"""LVM's exit codes."""


class ParseError(LVMError):
    """The command line was not understood."""

    exit_code = MISUSED


class UsageError(LVMError):
    """No form of the verb is written like this."""

    exit_code = MISUSED


class Option(NamedTuple):
    """One option of a verb."""

    name: str
    short: str
    kind: str
    """"" for one without a value."""
    many: str
    """"+" if its values are gathered, "*" if it is counted."""


class Options(dict[str, Any]):
    """Values by the long names of the options that were given."""

    def has(self, *names: str) -> bool:
        """Tell whether one of these options was given."""
        return any(name in self for name in names)

    def no(self, name: str) -> bool:
        """Tell whether a yes-or-no option was given as no."""
        return self.get(name) is False


def read_spec(spec: str) -> list[Option]:
    """Return the options that a text of words describes."""
    found = []
    for word in f"{spec} {COMMON}".split():
        match = re.fullmatch(r"(?:(\w)\|)?([\w]+)(?:=(\w+))?([+*]?)", word)
        assert match, word
        found.append(Option(match[2], match[1] or "", match[3] or "", match[4]))
    return found


def parse(verb: str, spec: str, argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Take a command line apart; options may stand anywhere, long ones may be cut short."""
    known = read_spec(spec)
    shorts = {each.short: each for each in known if each.short}
    longs = {each.name: each for each in known}
    letters = "".join(f"{each.short}{':' if each.kind else ''}" for each in shorts.values())
    names = [f"{each.name}{'=' if each.kind else ''}" for each in known]
    argv = [_without_hyphens(arg) for arg in argv]
    try:
        given, args = getopt.gnu_getopt(argv, letters, names)
    except getopt.GetoptError as failure:
        raise ParseError(_getopt_text(verb, failure, longs)) from failure
    options = Options()
    for flag, text in given:
        option = longs[flag[2:]] if flag.startswith("--") else shorts[flag[1]]
        if option.many == "*":
            options[option.name] = options.get(option.name, 0) + 1
        elif option.many == "+":
            options.setdefault(option.name, []).extend(_values(option, text))
        elif option.name in options:
            short = f"-{option.short}/" if option.short else ""
            raise ParseError(f"Option {short}--{option.name} may not be repeated.")
        else:
            options[option.name] = _values(option, text)[0] if option.kind else True
    return options, args


def _without_hyphens(arg: str) -> str:
    """Drop the hyphens inside a long option: --use-policies is --usepolicies."""
    if not re.match(r"--\w", arg):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '')}{equals}{value}"


def _getopt_text(verb: str, failure: getopt.GetoptError, longs: dict[str, Option]) -> str:
    """Return what the C library says; a line without the indent of LVM's."""
    option, text = failure.opt, str(failure)
    if f"-{option} " in text and f"--{option} " not in text:
        if "requires" in text:
            return f"{verb}: option requires an argument -- '{option}'"
        return f"{verb}: invalid option -- '{option}'"
    if "requires" in text:
        return f"{verb}: option '--{option}' requires an argument"
    if "must not" in text:
        return f"{verb}: option '--{option}' doesn't allow an argument"
    if "unique" in text:
        those = " ".join(f"'--{name}'" for name in sorted(longs) if name.startswith(option))
        return f"{verb}: option '--{option}' is ambiguous; possibilities: {those}"
    return f"{verb}: unrecognized option '--{option}'"


class InvalidArgument(ParseError):
    """A value that an option does not take; `reasons` are lines that say why."""


def _values(option: Option, text: str) -> list[Any]:
    try:
        value = KINDS[option.kind](text)
    except ValueError as error:
        lines = error.strerror or "" if isinstance(error, RequestError) else str(error)
        raise InvalidArgument(
            f"{lines}\n{_invalid(option, text)}" if lines else _invalid(option, text)
        ) from error
    return value if isinstance(value, list) else [value]


def _invalid(option: Option, text: str) -> str:
    return f"Invalid argument for --{option.name}: {text}"


# ---- kinds of values; a ValueError has the lines that stand before "Invalid argument"


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError
    return int(text)


def _signed_number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError
    return int(text)


def _yes_no(text: str) -> bool:
    if text not in ("y", "n"):
        raise ValueError
    return text == "y"


def _one_of(*words: str) -> Callable[[str], str]:
    def kind(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return kind


def _tag(text: str) -> str:
    tag = text.removeprefix("@")
    try:
        check_tag(tag)
    except RequestError:
        raise ValueError from None
    return tag


def _size(text: str) -> Any:  # noqa: ANN401
    return parse_size(text.removeprefix("+"))


def _kibibytes(text: str) -> int:
    return parse_size(text, "k")


def _positive_amount(text: str) -> Any:  # noqa: ANN401
    if text.startswith("-"):
        raise SizeError("Size may not be negative.")
    return parse_amount(text)


def _positive_extents(text: str) -> Any:  # noqa: ANN401
    if text.startswith("-"):
        raise SizeError("Extents may not be negative.")
    return parse_extents(text)


def _read_ahead(text: str) -> int:
    if text in ("auto", "none"):
        return 0 if text == "auto" else -1
    return parse_size(text, "s")


def _policy(text: str) -> str:
    if text not in (*POLICIES, "inherit"):
        raise ValueError(f"Unrecognised allocation policy {text}")
    return text


def _types(text: str) -> str:
    if text not in TYPES:
        raise ValueError(f"WARNING: Unrecognised segment type {text}")
    return text


TYPES: Final = frozenset(
    "cache cache-pool cachevol error linear mirror raid0 raid0_meta raid1 raid10 raid10_near raid4"
    " raid5 raid5_la raid5_ls raid5_n raid5_ra raid5_rs raid6 raid6_la_6 raid6_ls_6 raid6_n_6"
    " raid6_nc raid6_nr raid6_ra_6 raid6_rs_6 raid6_zr snapshot striped thin thin-pool vdo"
    " vdo-pool writecache zero".split()
)

KINDS: Final[dict[str, Callable[[str], Any]]] = {
    "": lambda text: True,
    "activation": _one_of("y", "n", "ey", "en", "ly", "ln", "lay", "ay", "sy", "sn", "lsy", "lsn"),
    "alloc": _policy,
    "amount": _positive_amount,
    "configreport": _one_of("log", "vg", "lv", "pv", "pvseg", "seg"),
    "dump": _one_of(
        "headers", "metadata", "metadata_all", "metadata_search", "metadata_area", "backup_to_raw"
    ),
    "extents": _positive_extents,
    "kibibytes": _kibibytes,
    "list": lambda text: [each for each in text.split(",") if each],
    "number": _number,
    "permission": _one_of("rw", "r"),
    "readahead": _read_ahead,
    "reportformat": _one_of("basic", "json"),
    "signed_amount": parse_amount,
    "signed_extents": parse_extents,
    "signed_number": _signed_number,
    "size": _size,
    "tag": _tag,
    "text": lambda text: text,
    "type": _types,
    "yn": _yes_no,
}
