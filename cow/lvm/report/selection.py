"""The language of -S: FIELD OPERATOR VALUE, joined by && , || #, grouped by ( ) and !( ).

A value is a word or stands in quotes. Lists are compared with ITEM, {ITEMS} (the value has them)
or [ITEMS] (it is them), items joined by && , or || #. What each kind of field can be compared with
is that of lvmreport(7).
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

from cow.lvm.errors import LVMError
from cow.lvm.report.fields import SELECTED, Field, FieldError
from cow.lvm.report.rows import Row
from cow.lvm.size import LETTERS, factor
from cow.units import SECTOR_SIZE

Matches = Callable[[Row], bool]
Finder = Callable[[str], list[Field]]

COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=~": lambda value, pattern: re.search(pattern, value) is not None,
    "!~": lambda value, pattern: re.search(pattern, value) is None,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
TIME_WORDS: Final = {"since": ">=", "after": ">", "until": "<=", "before": "<"}
SIGNS: Final = ("=~", "!~", "!=", ">=", "<=", "=", ">", "<")

HINT: Final = "Use 'help' for selection to get more help."

OPERATORS: Final = """\
Selection operators
-------------------
  =~ !~       a regular expression matches or not        [string]
  = !=        equal or not                               [all kinds]
  > >= < <=   more, at least, less, at most              [number, size, percent, time]
  since after until before   as >= > <= <                [time]
  && ,        all comparisons have to be true
  || #        one comparison has to be true
  ( ) !( )    a group, and its opposite
  {A,B} [A,B] the list has these, the list is these; || or # in place of , for one of them
 """.split("\n")

SYNONYMS: Final = {
    "rw": "writeable",
    "read-write": "writeable",
    "r": "read-only",
    "ro": "read-only",
}
"""Of permissions."""
UNDEFINED: Final = ("-1", "unknown", "undefined", "undef")

UNDEFINED_WORDS: Final = (
    *("lv_when_full", "seg_monitor", "cache_policy", "vdo_write_policy"),
    "lv_health_status",
)
"""Fields of text that are undefined where they are blank."""

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_WORD = re.compile(r"(?:(?!&&|\|\||[,#()\[\]{}])\S)*")
_DATE = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[ T]+(\d\d)(?::(\d\d)(?::(\d\d))?)?)?)?)?"
    r"(?:\s*([+-]\d\d):?(\d\d)|\s*(Z))?"
)


class Selection:
    """An expression; `matches` tells whether it selects a row, `fields` are those it looks at."""

    def __init__(self, text: str, find: Finder, fields: Callable[[], list[str]]) -> None:
        self._rest = text
        self._find = find
        self._help = fields
        self.fields: list[Field] = []
        self.matches: Matches = self._any() if text.strip() else lambda row: True
        if self._rest.strip():
            raise self._syntax("Expecting logical operator", self._rest.strip())

    def _syntax(self, text: str, at: str) -> LVMError:
        return LVMError(f"{text}\nSelection syntax error at '{at}'.\n{HINT}")

    def _take(self, *tokens: str) -> bool:
        rest = self._rest.lstrip()
        for token in tokens:
            if rest.startswith(token):
                self._rest = rest[len(token) :]
                return True
        return False

    def _any(self) -> Matches:
        terms = [self._all()]
        while self._take("||", "#"):
            terms.append(self._all())
        return terms[0] if len(terms) == 1 else lambda row: any(term(row) for term in terms)

    def _all(self) -> Matches:
        terms = [self._one()]
        while self._take("&&", ","):
            terms.append(self._one())
        return terms[0] if len(terms) == 1 else lambda row: all(term(row) for term in terms)

    def _one(self) -> Matches:
        negate = self._take("!")
        if negate and not self._rest.lstrip().startswith("("):
            raise LVMError(f"Syntax error: left parenthesis expected at '{self._rest.lstrip()}'")
        if not self._take("("):
            return self._comparison()
        inner = self._any()
        if not self._take(")"):
            raise LVMError(f"Syntax error: right parenthesis expected at '{self._rest.lstrip()}'")
        return (lambda row: not inner(row)) if negate else inner

    # One comparison.

    def _comparison(self) -> Matches:
        here = self._rest.lstrip()
        name = re.match(r"[\w-]*", here)
        assert name
        if not name[0]:
            raise self._syntax("Expecting field name", here)
        found = [SELECTED] if name[0] == SELECTED.name else self._find(name[0])
        if len(found) != 1:
            error = self._syntax(f"Unrecognised selection field: {name[0]}", here)
            raise FieldError(error.strerror or "", self._help())
        each = found[0]
        self.fields.append(each)
        sign = self._sign(here[name.end() :], each)
        if not sign:
            error = self._syntax(f"Unrecognised comparison operator: {self._rest.strip()}", here)
            raise FieldError(error.strerror or "", OPERATORS)
        if sign in ("=~", "!~"):
            return self._regex(each, sign, here)
        if each.kind in ("str", "lst") and sign not in ("=", "!="):
            text = "Operator can be used only with number, size, time or percent fields: "
            error = self._syntax(text + here, here)
            raise FieldError(error.strerror or "", OPERATORS)
        return {
            "str": self._string,
            "lst": self._list,
            "bin": self._binary,
            "tim": self._time,
        }.get(each.kind, self._number)(each, sign, here)

    def _sign(self, rest: str, each: Field) -> str:
        self._rest = rest
        if each.kind == "tim":
            for word, sign in TIME_WORDS.items():
                if self._take(word):
                    return sign
        return next((sign for sign in SIGNS if self._take(sign)), "")

    def _value(self, each: Field, here: str, what: str = "string") -> str:
        """Take a word, or what stands in quotes."""
        self._rest = self._rest.lstrip()
        if self._rest[:1] in ("'", '"'):
            end = self._rest.find(self._rest[0], 1)
            if end < 0:
                missing = "Missing end quote.\n" * (2 if what == "string" else 1)
                raise self._unparsed(each, here, what, missing)
            value, self._rest = self._rest[1:end], self._rest[end + 1 :]
            return value
        found = _WORD.match(self._rest)
        assert found
        self._rest = self._rest[found.end() :]
        return found[0]

    def _unparsed(self, each: Field, here: str, what: str, why: str = "") -> LVMError:
        text = f"{why}Failed to parse {what} value for selection field {each.name}."
        return self._syntax(text, here)

    def _regex(self, each: Field, sign: str, here: str) -> Matches:
        self._rest = self._rest.lstrip()
        if self._rest[:1] in ("'", '"'):
            pattern = self._value(each, here, "regex")
        else:
            found = re.match(r"(?:(?!&&|\|\|)[^\s,#])*", self._rest)
            assert found
            pattern, self._rest = found[0], self._rest[found.end() :]
        if each.kind != "str":
            raise LVMError(
                f"dm_report: incompatible comparison type for selection field {each.name}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            why = "Missing end quote." if pattern[:1] in "[({" else str(error)
            raise self._unparsed(each, here, "regex", f"{why}\n") from error
        return lambda row: COMPARE[sign](_plain(each.value(row)), pattern)

    def _string(self, each: Field, sign: str, here: str) -> Matches:
        value = self._value(each, here)
        if each.name.endswith("_permissions"):
            value = SYNONYMS.get(value, value)
        if value == "undefined" and each.name in UNDEFINED_WORDS:
            value = ""
        equal = sign == "="
        return lambda row: (_plain(each.value(row)) == value) is equal

    def _list(self, each: Field, sign: str, here: str) -> Matches:
        self._rest = self._rest.lstrip()
        closing = {"[": "]", "{": "}"}.get(self._rest[:1], "")
        equal = sign == "="
        if not closing:
            item = self._value(each, here)
            if not item:
                return lambda row: (not each.value(row)) is equal
            return lambda row: (item in each.value(row)) is equal
        exact = closing == "]"
        self._rest = self._rest[1:]
        items: list[str] = []
        joins: set[str] = set()
        while not self._take(closing):
            if items:
                join = next((token for token in ("&&", "||", ",", "#") if self._take(token)), "")
                if not join:
                    raise self._unparsed(each, here, "string list")
                joins.add(join)
            items.append(self._value(each, here))
            if not items[-1] and not self._rest:
                raise self._unparsed(each, here, "string list")
        if joins & {"||", "#"}:
            return lambda row: (not set(items).isdisjoint(each.value(row))) is equal
        if exact:
            return lambda row: (set(items) == set(each.value(row))) is equal
        return lambda row: set(items).issubset(each.value(row)) is equal

    def _binary(self, each: Field, sign: str, here: str) -> Matches:
        value = self._value(each, here)
        wanted: bool | None
        if value in UNDEFINED:
            wanted = None
        elif value in ("1", "yes", "y", each.word) or value in each.word.split(" "):
            wanted = True
        elif value in ("0", "no", "n"):
            wanted = False
        else:
            raise self._unparsed(each, here, "numeric")
        if sign in ("=", "!="):
            return lambda row: (each.value(row) is wanted) is (sign == "=")
        number = -1 if wanted is None else int(wanted)
        compare = COMPARE[sign]
        return lambda row: (value := each.value(row)) is not None and compare(int(value), number)

    def _number(self, each: Field, sign: str, here: str) -> Matches:
        text = self._value(each, here)
        compare = COMPARE[sign]
        if each.kind == "num" and text in UNDEFINED:
            return lambda row: compare(_undefined(each.value(row)), True)
        if each.kind == "siz" and text in ("auto", "none") and sign in ("=", "!="):
            return lambda row: (each.value(row) == text) is (sign == "=")
        found = _NUMBER.match(text)
        unit = text[found.end() :] if found else text
        wanted = Fraction(found[0].rstrip(".")) if found else Fraction(0)
        allowed = {"siz": "bBsS" + LETTERS + LETTERS.upper(), "pct": "%"}.get(each.kind, "")
        if not found or len(unit) > 1 or unit not in allowed:
            raise self._unparsed(each, here, "numeric")
        if each.kind == "siz":
            wanted = wanted * factor(unit or "m") / SECTOR_SIZE
        if each is SELECTED:
            return lambda row: True

        def matches(row: Row) -> bool:
            value = each.value(row)
            if isinstance(value, str):
                return False
            if each.kind == "siz":
                return compare(value or 0, wanted)
            if _undefined(value):
                return False
            return compare(Fraction(f"{value:.2f}") if each.kind == "pct" else value, wanted)

        return matches

    def _time(self, each: Field, sign: str, here: str) -> Matches:
        text = self._value(each, here)
        span = parse_time(text)
        if span is None:
            why = f'Unrecognized string in date/time specification at "{text}".\n'
            raise self._unparsed(each, here, "time", why)
        first, last = span

        def matches(row: Row) -> bool:
            value = each.value(row)
            if value is None:
                return False
            if sign in ("=", "!="):
                return (first <= value <= last) is (sign == "=")
            return COMPARE[sign](value, last if sign in (">", "<=") else first)

        return matches


def _plain(value: Any) -> str:  # noqa: ANN401
    """Return a text as it is compared: without the brackets of hidden LVs."""
    return str(value).removeprefix("[").removesuffix("]")


def _undefined(value: Any) -> bool:  # noqa: ANN401
    return value is None or isinstance(value, str) or value < 0


def parse_time(text: str) -> tuple[int, int] | None:
    """Return the first and the last second of a date, "2001", "2001-01-31 12:00", "@981173106"."""
    if re.fullmatch(r"@[0-9]+", text):
        return int(text[1:]), int(text[1:])
    found = _DATE.fullmatch(text)
    if not found:
        return None
    given = [int(part) for part in found.groups()[:6] if part is not None]
    first = given + [1, 1, 0, 0, 0][len(given) - 1 :]
    after = list(first)
    after[len(given) - 1] += 1
    zone = 0
    local = found[7] is None and found[9] is None
    if found[7] is not None:
        zone = (int(found[7]) * 60 + int(found[7][0] + found[8])) * 60
    try:
        return _seconds(first, local) - zone, _seconds(after, local) - zone - 1
    except (ValueError, OverflowError):
        return None


def _seconds(parts: list[int], local: bool) -> int:
    year, month, day, hour, minute, second = parts
    if local:
        return int(time.mktime((year, month, day, hour, minute, second, 0, 0, -1)))
    import calendar

    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    return calendar.timegm((year, month, day, hour, minute, second))
