"""`cow dm ls --tree`: which device stands on which, drawn as dmsetup draws it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cow.cli.dm.names import Refused, disk_name

MAX_DEPTH = 98
SYMBOLS = {
    # empty, branch, vertical, last, single, first
    "ascii": ("  ", "|-", "| ", "`-", "---", "-+-"),
    "utf": ("  ", "├─", "│ ", "└─", "───", "─┬─"),
    "vt100": tuple(
        f"\033(0\017{text}\033(B" + " " * blanks if text else "  "
        for text, blanks in (("", 0), ("tq", 0), ("x", 1), ("mq", 0), ("qqq", 0), ("qwq", 0))
    ),
}
OPTIONS = (
    *("device", "blkdevname", "nodevice", "status", "table", "active", "open", "uuid", "rw"),
    *("utf", "vt100", "ascii", "inverted", "compact", "notrunc"),
)


class Node:
    """A device in the graph, dm or not (then it has no description)."""

    def __init__(self, number: tuple[int, int], device: dict[str, Any] | None) -> None:
        self.number = number
        self.device = device
        self.below: list[Node] = []
        self.above: list[Node] = []


def parse_options(text: str) -> set[str]:
    """Return the options of -o, each of which may be cut short."""
    chosen = {_default_symbols(), "device"}
    words = text.split(",") if text else []
    for index, word in enumerate(words):
        found = next((option for option in OPTIONS if option.startswith(word)), None)
        if found is None:
            raise Refused(f"Tree options not recognised: {','.join(words[index:])}.")
        if found in SYMBOLS:
            chosen -= SYMBOLS.keys()
        if found == "nodevice":
            chosen.discard("device")
        else:
            chosen.add(found)
    return chosen


def _default_symbols() -> str:
    """Lines where the locale has them. LC_CTYPE=C.UTF-8 alone is what Python makes of none."""
    names = [os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if not names[0] and names[1] == "C.UTF-8":
        names[1] = ""
    locale = next(filter(None, names), "")
    return "utf" if locale.lower().replace("-", "").endswith("utf8") else "ascii"


def build(devices: Sequence[dict[str, Any]]) -> list[Node]:
    """Return every node, dm devices by name and each followed by what it stands on."""
    known = {(device["major"], device["minor"]): device for device in devices}
    nodes: dict[tuple[int, int], Node] = {}

    def add(number: tuple[int, int]) -> Node:
        node = nodes.get(number)
        if node is None:
            node = nodes[number] = Node(number, known.get(number))
            for dep in node.device["deps"] if node.device else []:
                below = add((dep["major"], dep["minor"]))
                if below not in node.below:
                    node.below.append(below)
                    below.above.append(node)
        return node

    for number in known:
        add(number)
    return list(nodes.values())


class Tree:
    """Draws nodes, from those nobody uses down, or from the lowest up."""

    def __init__(self, options: set[str], columns: int) -> None:
        self.lines: list[str] = []
        self._options = options
        self._symbols = next(SYMBOLS[name] for name in SYMBOLS if name in options)
        self._columns = None if "notrunc" in options else columns
        self._compact = "compact" in options and not options & {
            *("active", "rw", "open", "uuid", "table", "status")
        }
        self._more = [False] * (MAX_DEPTH + 2)
        self._widths = [0] * (MAX_DEPTH + 2)
        self._line = ""

    def draw(self, nodes: Sequence[Node]) -> list[str]:
        """Return the lines of the whole tree."""
        inverted = "inverted" in self._options
        roots = [node for node in nodes if not (node.below if inverted else node.above)]
        if not inverted:  # dmsetup goes by name, and nodes found below others come in between
            roots.sort(key=lambda node: str(node.device["name"] if node.device else "").encode())
        self._walk(roots, 0)
        return self.lines

    def _children(self, node: Node) -> list[Node]:
        return node.above if "inverted" in self._options else node.below

    def _walk(self, nodes: Sequence[Node], depth: int) -> None:
        for node in nodes:
            children = self._children(node)
            self._draw_node(node, depth, node is nodes[-1], bool(children))
            if children:
                self._walk(children, depth + 1)

    def _draw_node(self, node: Node, depth: int, last: bool, has_children: bool) -> None:
        options = self._options
        if depth > MAX_DEPTH or (not node.device and not options & {"device", "blkdevname"}):
            return
        self._more[depth] = not last
        self._widths[depth] = 0
        first_on_line = not self._line
        if not self._compact or first_on_line:
            self._prefix(depth)
        start = len(self._line)
        if self._compact and not first_on_line:
            self._line += self._symbols[5 if self._more[depth] else 4]
        self._line += self._describe(node)
        if self._compact:
            self._widths[depth] = len(self._line) - start
        if not self._compact or not has_children:
            self._end_line()

    def _prefix(self, depth: int) -> None:
        empty, branch, vertical, last = self._symbols[:4]
        for level in range(depth):
            more = self._more[level + 1]
            self._line += " " * (self._widths[level] + 1)
            if level == depth - 1:
                self._line += branch if more else last
            else:
                self._line += vertical if more else empty

    def _describe(self, node: Node) -> str:
        device = node.device
        major, minor = node.number
        text = str(device["name"]) if device else ""
        if "blkdevname" in self._options:
            disk = disk_name(device or {"major": major, "minor": minor})
            text += f" <{disk}>" if disk else ""
        if "device" in self._options:
            text += f" ({major}:{minor})"
        if device:
            shown = [
                value
                for option, value in (
                    ("active", "SUSPENDED" if device["suspended"] else "ACTIVE"),
                    ("rw", "RO" if device["readonly"] else "RW"),
                    ("open", str(device["open_count"])),
                    ("uuid", device["uuid"]),
                )
                if option in self._options
            ]
            text += f" [{', '.join(shown)}]" if shown else ""
        return text

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if self._columns is not None and len(line) > self._columns:
            line = line[: self._columns - 1] + "..."
        self.lines.append(line)
