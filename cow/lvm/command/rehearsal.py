"""--test: everything is done, but what is written stays in memory and no dm device is touched."""

from __future__ import annotations

from typing import Any, cast

from cow import _core
from cow.lvm.activation import Activation
from cow.lvm.devices import releases_of
from cow.lvm.metadata import LogicalVolume, VolumeGroupMetadata
from cow.mapper import Mapper

CHANGES = frozenset(
    "clear create create_concise image load message reload remove remove_all rename resume"
    " set_low_water_mark set_uuid suspend".split()
)
"""The verbs of a mapper that change something."""


class RehearsalDevice:
    """A device whose writes are seen by later reads, and by nobody else."""

    def __init__(self, device: _core.BlockDevice) -> None:
        self.below = device
        self.size = device.size
        self._writes: list[tuple[int, bytes]] = []

    def pread(self, size: int, offset: int) -> bytes:
        """Read bytes as they would be by now."""
        data = bytearray(self.below.pread(size, offset))
        for start, written in self._writes:
            first, end = max(start, offset), min(start + len(written), offset + size)
            if first < end:
                data[first - offset : end - offset] = written[first - start : end - start]
        return bytes(data)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Keep a write in mind."""
        self._writes.append((offset, bytes(data)))
        return len(data)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Keep zeros in mind."""
        self.pwrite(bytes(length), offset)

    def flush(self) -> None:
        """There is nothing to flush."""


class RehearsalMapper:
    """A mapper to look at: images are opened through it, its devices are seen, none is changed."""

    def __init__(self, mapper: Mapper | None) -> None:
        self._own = mapper is None
        self._mapper = Mapper() if mapper is None else mapper
        self._devices: dict[str, tuple[RehearsalDevice, int]] = {}

    def use(self, name: str, *, readonly: bool = False) -> RehearsalDevice:
        """Open a device read-only."""
        device, count = self._devices.get(name, (None, 0))
        if device is None:
            device = RehearsalDevice(self._mapper.use(name, readonly=True))
        self._devices[name] = device, count + 1
        return device

    def release(self, device: RehearsalDevice) -> None:
        """Let go of a device; it is kept until close()."""

    def close(self) -> None:
        """Give everything back."""
        for device, _ in self._devices.values():
            self._mapper.release(device.below)
        releases_of(self._mapper).note()
        self._devices.clear()
        if self._own:
            self._mapper.close()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in CHANGES:
            raise AttributeError(f"a rehearsal does not {name}")
        return getattr(self._mapper, name)


class RehearsalActivation(Activation):
    """Knows what is active, and changes nothing about it."""

    def activate(self, lv: LogicalVolume, *, partial: bool = False) -> None:
        """Say nothing, do nothing."""

    def deactivate(self, lv: LogicalVolume) -> None:
        """Refuse what is in use, as would be done."""
        self.check_not_in_use(lv)

    def wipe(self, lv: LogicalVolume) -> None:
        """Do nothing."""

    def refresh(self, lv: LogicalVolume) -> None:
        """Do nothing."""

    def preload(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Do nothing."""

    suspend = resume = revert = preload


def rehearsal_mapper(mapper: Mapper | None) -> Mapper:
    """Return a mapper for --test."""
    return cast(Mapper, RehearsalMapper(mapper))
