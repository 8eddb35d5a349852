"""flakey: `<dev> <start> <up s> <down s> [<n> <feature>…]`, a device that fails now and then."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from cow import _core
from cow.errors import TargetError
from cow.target import NameOf, Target, TargetContext, open_device, parse_number

PER = 1_000_000_000
"""random_read_corrupt and random_write_corrupt count in so many."""


class FlakeyTarget(Target):
    """Works for `up` seconds, then misbehaves for `down` seconds, and so on."""

    name = "flakey"
    version = (1, 5, 0)

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        if len(args) < 4:
            raise TargetError("Invalid argument count")
        self.dev_start = parse_number(args[1], "Invalid device sector")
        self.up = parse_number(args[2], "Invalid up interval", 2**32 - 1)
        self.down = parse_number(args[3], "Invalid down interval", 2**32 - 1)
        if self.up + self.down == 0:
            raise TargetError("Total (up + down) interval is zero")
        self.features = _parse_features(args[4:])
        self.dev = open_device(
            context, args[0], "Device lookup failed", writable=not context.readonly
        )
        self.length = length
        self.map = _Flakey(start, length, self.dev, self.dev_start, self)

    def table_args(self, name_of: NameOf) -> str:
        words = [f"{name_of(self.dev)} {self.dev_start} {self.up} {self.down}"]
        features = [" ".join([name, *map(str, values)]) for name, values in self.features.items()]
        if features:
            count = len(" ".join(features).split())
            words += [str(count), *features]
        else:
            words.append("0")
        return " ".join(words)

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        yield self.dev, self.dev_start, self.length

    @property
    def supports_discard(self) -> bool:
        """As the device below."""
        return self.dev.supports_discard


def _parse_features(args: list[str]) -> dict[str, list[Any]]:
    """Parse the feature group into {feature: [argument, …]}."""
    if not args:
        return {}
    count = parse_number(args[0], "Invalid number of feature args", 9)
    if count > len(args) - 1:
        raise TargetError("Invalid number of feature args")
    words = args[1 : count + 1]
    features: dict[str, list[Any]] = {}
    while words:
        name = words.pop(0).lower()
        values: list[Any] = []
        if name in features:
            raise TargetError(f"Feature {name} duplicated")
        if name == "corrupt_bio_byte":
            if len(words) < 4:
                raise TargetError("Feature corrupt_bio_byte requires parameters")
            nth, way, value, flags = words[:4]
            del words[:4]
            if way.lower() not in ("r", "w"):
                raise TargetError("Invalid corrupt bio direction (r or w)")
            values = [
                parse_number(nth, "Invalid corrupt bio byte", 2**32 - 1),
                way.lower(),
                parse_number(value, "Invalid value to write to corrupt bio byte", 255),
                parse_number(flags, "Invalid corrupt bio flags", 2**32 - 1),
            ]
            if values[0] == 0:
                raise TargetError("Invalid corrupt bio byte")
        elif name in ("random_read_corrupt", "random_write_corrupt"):
            if not words:
                raise TargetError(f"Feature {name} requires a parameter")
            values = [parse_number(words.pop(0), "Invalid random corrupt argument", PER)]
        elif name not in ("drop_writes", "error_writes", "error_reads"):
            raise TargetError("Unrecognised flakey feature requested")
        features[name] = values
    if "drop_writes" in features and "error_writes" in features:
        raise TargetError("drop_writes is incompatible with error_writes")
    return features


class _Flakey(_core.FilterTarget):
    def __init__(
        self,
        start: int,
        length: int,
        dev: _core.BlockDevice,
        dev_start: int,
        target: FlakeyTarget,
    ) -> None:
        super().__init__(start, length, dev, dev_start)
        self.up, self.down, self.features = target.up, target.down, target.features
        self.began = time.monotonic()

    def start(self, op: str, offset: int, length: int) -> int:
        if (time.monotonic() - self.began) % (self.up + self.down) < self.up:
            return self.PASS
        features = self.features
        if not features:
            raise OSError(5, "down")
        if op == "read":
            if "error_reads" in features:
                raise OSError(5, "error_reads")
        elif "error_writes" in features:
            raise OSError(5, "error_writes")
        elif "drop_writes" in features:
            return self.DROP
        way = {"read": "r", "write": "w"}.get(op)
        if features.get("corrupt_bio_byte", [0, ""])[1] == way:
            return self.MANGLE
        if way and f"random_{op}_corrupt" in features:
            return self.MANGLE
        return self.PASS

    def mangle(self, op: str, offset: int, data: memoryview) -> None:
        nth, way, value, _ = self.features.get("corrupt_bio_byte", [0, "", 0, 0])
        if way == op[0] and nth <= len(data):
            data[nth - 1] = value
        chance = self.features.get(f"random_{op}_corrupt", [0])[0]
        if random.randrange(PER) < chance:
            data[random.randrange(len(data))] = random.randrange(256)
