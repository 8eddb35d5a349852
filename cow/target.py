"""What every target is: a type of table line. The registry, and helpers to parse arguments.

A target is one module below cow.targets, named as the type with "-" written "_", holding one class
that derives from Target. It is found when a table first names its type, as the kernel finds its
modules.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from cow import _core
from cow.errors import CowOSError, TargetError

NameOf = Callable[[_core.BlockDevice], str]
"""How a line prints a device: by name, or as MAJOR:MINOR."""


class TargetContext(Protocol):
    """What a target may ask of the device it is made for."""

    readonly: bool

    def get_device(self, name: str, *, writable: bool) -> _core.BlockDevice:
        """Open a device by dm name, /dev/mapper/NAME, MAJOR:MINOR or path; OSError if it fails."""


class Target:
    """One line of a table. `start` and `length` are sectors.

    __init__ parses `args`, opens devices through `context` and makes `map`, the core's side; it
    raises TargetError with the kernel's text. `device` is set when the table gets its device.
    `plain` tells that requests pass without a lock and without Python; a target that follows or
    breaks exceptions names their `family`.
    """

    name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    plain: ClassVar[bool] = False
    family: _core.Family | None = None
    map: _core.TargetMap
    device: _core.MappedDevice

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        raise NotImplementedError

    def read_metadata(self) -> None:
        """Read, or make, what the target keeps on its devices; TargetError if it is no good.

        Called once, when every line of the table is accepted: a refused table changes nothing.
        """

    @property
    def supports_discard(self) -> bool:
        """Whether discards may be sent through it."""
        return True

    def table_args(self, name_of: NameOf) -> str:
        """Return the arguments as a table line prints them."""
        raise NotImplementedError

    def status(self, name_of: NameOf) -> str:
        """Return what a status line prints after the type."""
        return ""

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        """Yield the (device, start, length) in sectors that the target needs to exist."""
        return iter(())

    def message(self, args: list[str]) -> str:
        """Answer a message."""
        raise TargetError("Target type does not support messages")

    def prepare(self) -> None:
        """Get what going live needs; TargetError leaves the table it would replace as it is."""

    def preresume(self) -> None:
        """Raise TargetError if the target cannot go live now."""

    def resume(self) -> None:
        """Go live. The gate is held exclusively."""

    def presuspend(self) -> None:
        """Stop what runs by itself. No lock is held."""

    def postsuspend(self) -> None:
        """Take note that no request is under way any more. No lock is held."""

    def release(self) -> None:
        """Let go of everything but the devices: the table is gone. No lock is held."""


def find_target(name: str) -> type[Target]:
    """Return the class of a target type; TargetError with the kernel's text if there is none."""
    if re.fullmatch(r"[a-z][a-z0-9-]*", name):
        module_name = "cow.targets." + name.replace("-", "_")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
        else:
            for target in vars(module).values():
                if (
                    isinstance(target, type)
                    and issubclass(target, Target)
                    and (target.__dict__.get("name") == name)
                ):
                    return target
    raise TargetError(f"{name}: unknown target type")


def all_targets() -> list[type[Target]]:
    """Return every target there is, in the order of their names."""
    package = importlib.import_module("cow.targets")
    names = sorted(
        module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__)
    )
    return [find_target(name) for name in names]


def parse_number(text: str, error: str, most: int = 2**64 - 1) -> int:
    """Parse an unsigned decimal as the kernel does, or raise TargetError with its text."""
    if not re.fullmatch(r"0*[0-9]{1,20}", text) or int(text[-20:]) > most:
        raise TargetError(error)
    return int(text[-20:])


def open_device(
    context: TargetContext, name: str, error: str, *, writable: bool
) -> _core.BlockDevice:
    """Open a device; what the open answers is reported under the kernel's text, with its errno."""
    try:
        return context.get_device(name, writable=writable)
    except CowOSError as cause:
        raise TargetError(f"{error}: {cause.strerror}", cause.errno) from cause


def parse_features(
    args: list[str], known: tuple[str, ...], *, count_error: str, unknown_error: str
) -> list[str]:
    """Parse a group `N WORD…` of flags; words behind the group are ignored."""
    if not args:
        return []
    count = parse_number(args[0], count_error, len(known))
    if count > len(args) - 1:
        raise TargetError(count_error)
    words = [word.lower() for word in args[1 : count + 1]]
    if any(word not in known for word in words):
        raise TargetError(unknown_error)
    return [word for word in known if word in words]
