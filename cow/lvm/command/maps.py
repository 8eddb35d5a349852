"""The segments of an LV in words, as lvdisplay -m tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from cow.lvm.command.command import Command
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, Segment
from cow.lvm.report.traits import VIRTUAL, cache_settings, is_raid, thin_lvs_of, zeroes
from cow.lvm.report.values import data_legs

_WITHOUT_EXTENTS: Final = (*VIRTUAL, "thin")
"""Types whose extents are called virtual."""


def map_lines(command: Command, lv: LogicalVolume) -> Iterator[str]:
    """Yield the lines about the segments of an LV."""
    yield "--- Segments ---"
    for segment in lv.segments:
        kind = "Virtual" if segment.type in _WITHOUT_EXTENTS else "Logical"
        yield f"{kind} extents {segment.start_extent} to {segment.end_extent - 1}:"
        linear = segment.type == "striped" and len(segment.areas) == 1
        shown = segment.type if segment.known else segment.type_text
        yield f"  Type\t\t{'linear' if linear else shown}"
        if segment.type in ("mirror", "thin-pool") or is_raid(lv):
            yield "  Monitoring\t\t"
        tell = _raid_lines if is_raid(lv) else _LINES.get(segment.type)
        if tell is not None:
            yield from tell(command, lv, segment)
            yield " "
    yield " "


def _stripe_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    if len(segment.areas) == 1:
        yield from _area_lines(segment, 0, "  ")
        return
    yield f"  Stripes\t\t{len(segment.areas)}"
    yield f"  Stripe size\t\t{command.size(segment.stripe_size)}"
    for index in range(len(segment.areas)):
        yield f"  Stripe {index}:"
        yield from _area_lines(segment, index, "    ")


def _mirror_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    yield f"  Mirrors\t\t{len(segment.areas)}"
    yield f"  Mirror size\t\t{segment.area_extents}"
    if segment.mirror_log is not None:
        yield f"  Mirror log volume\t{segment.mirror_log.name}"
    yield f"  Mirror region size\t{command.size(segment.region_size)}"
    for index in range(len(segment.areas)):
        if index < 2:
            yield "  Mirror destinations:" if index else "  Mirror original:"
        yield from _area_lines(segment, index, "    ")


def _raid_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    pairs = segment.extra.get("raids")
    images = pairs[1::2] if isinstance(pairs, list) else segment.extra.get("raid0_lvs")
    legs = data_legs(segment) if segment.type not in ("raid1", "raid10") else 1
    for index, name in enumerate(images if isinstance(images, list) else []):
        yield f"  Raid Data LV {index}"
        yield f"    Logical volume\t{name}"
        yield f"    Logical extents\t0 to {segment.extent_count // legs - 1}"
    for index, name in enumerate(pairs[::2] if isinstance(pairs, list) else []):
        yield f"  Raid Metadata LV {index}\t{name}"


def _thin_pool_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    yield f"  Chunk size\t\t{_size(command, segment, 'chunk_size')}"
    yield f"  Discards\t\t{segment.extra.get('discards', '')}"
    yield f"  Thin count\t\t{len(thin_lvs_of(lv))}"
    yield f"  Transaction ID\t{segment.extra.get('transaction_id', 0)}"
    yield f"  Zero new blocks\t{'yes' if zeroes(lv) else 'no'}"


def _thin_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    yield f"  Device ID\t\t{segment.extra.get('device_id', 0)}"


def _cache_lines(command: Command, lv: LogicalVolume, segment: Segment) -> Iterator[str]:
    settings = cache_settings(segment, lv)
    yield f"  Chunk size\t\t{_size(command, settings, 'chunk_size')}"
    for title, key in (("Metadata format\t", "metadata_format"), ("Mode\t\t", "cache_mode")):
        if key in settings.extra:
            yield f"  {title}{settings.extra[key]}"
    if "policy" in settings.extra:
        yield f"  Policy\t\t{settings.extra['policy']}"


def _size(command: Command, segment: Segment, key: str) -> str:
    value = segment.extra.get(key)
    return command.size(value if isinstance(value, int) else 0)


def _area_lines(segment: Segment, index: int, indent: str) -> Iterator[str]:
    area = segment.areas[index]
    kind = "Physical" if isinstance(area.of, PhysicalVolume) else "Logical"
    name = str(area.of) if isinstance(area.of, PhysicalVolume) else area.of.name
    yield f"{indent}{kind} volume\t{name}"
    yield f"{indent}{kind} extents\t{area.start} to {area.start + segment.area_extents - 1}"


_LINES: Final[dict[str, Callable[[Command, LogicalVolume, Segment], Iterator[str]]]] = {
    "striped": _stripe_lines,
    "mirror": _mirror_lines,
    "thin-pool": _thin_pool_lines,
    "thin": _thin_lines,
    "cache": _cache_lines,
    "cache-pool": _cache_lines,
}
"""How a segment of each type is told of; of other types there is nothing more to tell."""
