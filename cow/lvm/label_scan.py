"""From devices to VGs: find labels, read the mdas, and take the newest text of each VG.

Every mda of a VG holds the same text. Where they differ, the highest seqno counts; what is behind,
damaged or missing is told in LVM's words and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cow import _core
from cow.lvm.check import reading_problems, unknown_segment_types, unknown_status
from cow.lvm.errors import MetadataError
from cow.lvm.label import Label, read_label
from cow.lvm.mda import Bad, MetadataArea
from cow.lvm.metadata import VolumeGroupMetadata
from cow.lvm.metadata_text import CONTENTS, VERSION, vg_from_text
from cow.lvm.names import dashed_id, plain_id
from cow.lvm.text import Section, parse
from cow.units import sectors

Warn = Callable[[str], None]


@dataclass(eq=False)
class PVDevice:
    """A device with a PV's label on it."""

    path: str
    device: _core.BlockDevice
    label: Label
    mdas: list[MetadataArea] = field(default_factory=list)
    vg_name: str = ""
    """The VG that has it, also where that VG cannot be read; "" for an orphan."""
    vg_id: str = ""

    @property
    def claimed(self) -> bool:
        """Whether a PV of no VG may belong to one that is not to be seen.

        The label alone may say so after a crash in vgcreate or vgextend: then there is a metadata
        area without text, which a VG that had the PV would have filled.
        """
        empty = any(
            not mda.bad and not mda.ignored and not mda.committed.present for mda in self.mdas
        )
        return self.label.used and not empty


@dataclass
class TextCopy:
    """A text that one mda has committed, so far as it is needed to choose between them."""

    mda: MetadataArea
    owner: PVDevice
    content: Section
    vg_name: str
    vg_id: str
    seqno: int
    data: bytes


@dataclass
class FoundVG:
    """What the devices hold of one VG. `metadata` is None, with `error`, where it is unreadable."""

    name: str
    id: str
    copies: list[TextCopy] = field(default_factory=list)
    metadata: VolumeGroupMetadata | None = None
    error: MetadataError | None = None
    stale: list[MetadataArea] = field(default_factory=list)
    """Mdas whose text is older than the newest."""
    outdated: list[PVDevice] = field(default_factory=list)
    """PVs that say they belong to it, but the newest text does not name them."""
    old_labels: list[PVDevice] = field(default_factory=list)
    """PVs whose labels do not say that they are used."""
    duplicates: list[PVDevice] = field(default_factory=list)
    """Devices that are not used because another has the same PV uuid."""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """All that was found on some devices."""

    devices: list[PVDevice] = field(default_factory=list)
    without_label: list[str] = field(default_factory=list)
    duplicates: list[PVDevice] = field(default_factory=list)
    vgs: list[FoundVG] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_devices(devices: Iterable[tuple[str, _core.BlockDevice]]) -> Findings:
    """Read labels and metadata of (path, device) pairs. Nothing is written."""
    found = Findings()
    warn = found.warnings.append
    copies: list[TextCopy] = []
    parsed: dict[bytes, Section] = {}
    for path, device in devices:
        try:
            label = read_label(device, path, warn)
        except OSError as error:
            warn(f"WARNING: Failed to read {path}: {error}")
            label = None
        if label is None:
            found.without_label.append(path)
            continue
        pv_device = PVDevice(path, device, label)
        first = next((each for each in found.devices if each.label.pv_id == label.pv_id), None)
        if first is not None:
            uuid = dashed_id(label.pv_id)
            warn(f"WARNING: Not using device {path} for PV {uuid}.")
            warn(f"WARNING: PV {uuid} prefers device {first.path} because it was named first.")
            found.duplicates.append(pv_device)
            continue
        found.devices.append(pv_device)
        copies += _read_mdas(pv_device, parsed, warn)
    for copy in copies:
        vg = next((vg for vg in found.vgs if vg.id == copy.vg_id), None)
        if vg is None:
            vg = FoundVG(copy.vg_name, copy.vg_id)
            found.vgs.append(vg)
        vg.copies.append(copy)
    for vg in found.vgs:
        _Chooser(vg, found).choose()
        found.warnings += vg.warnings
    _check_names(found, warn)
    _check_orphans(found, warn)
    return found


def _read_mdas(owner: PVDevice, parsed: dict[bytes, Section], warn: Warn) -> list[TextCopy]:
    copies = []
    for number, (start, size) in enumerate(owner.label.metadata_areas[:2], 1):
        mda = MetadataArea(owner.device, owner.path, start, size, number)
        owner.mdas.append(mda)
        mda.read(warn)
        if mda.bad:
            warn(f"WARNING: bad metadata header on {mda.where} at {mda.start}.")
        elif mda.committed.present and not mda.ignored:
            try:
                copies.append(_read_copy(mda, owner, parsed, warn))
            except MetadataError as error:
                mda.bad |= Bad.TEXT
                warn(f"WARNING: {error.strerror}")
                warn(f"WARNING: bad metadata text on {mda.where} in mda{mda.number}")
        if mda.bad:
            warn(f"WARNING: scanning {mda.where} mda{mda.number} failed to read metadata summary.")
            warn(f"WARNING: repair VG metadata on {mda.where} with vgck --updatemetadata.")
    if owner.mdas and all(mda.bad & Bad.HEADER for mda in owner.mdas):
        where = f"{owner.path} PVID {owner.label.pv_id}"
        warn(f"WARNING: scan failed to get metadata summary from {where}")
    return copies


def _read_copy(
    mda: MetadataArea, owner: PVDevice, parsed: dict[bytes, Section], warn: Warn
) -> TextCopy:
    data = mda.read_text()
    if data not in parsed:
        parsed[data] = parse(data, warn)
    content = parsed[data]
    if content.get("contents") != CONTENTS:
        raise MetadataError("Can't process text format file - missing contents field.")
    if content.get("version") != VERSION:
        raise MetadataError("Can't process text format file - unrecognised version number.")
    name, section = next(content.sections(), ("", None))
    if section is None:
        raise MetadataError("Can't find volume group section.")
    summary = Section(section.path)
    summary.update((key, section[key]) for key in ("id", "seqno") if key in section)
    vg_id = plain_id(summary.take_text("id"))
    mda.seqno = summary.take_number("seqno", most=2**32 - 1)
    return TextCopy(mda, owner, content, name, vg_id, mda.seqno, data)


class _Chooser:
    """Takes the newest text of a VG and finds its PVs."""

    def __init__(self, vg: FoundVG, found: Findings) -> None:
        self._vg = vg
        self._found = found

    def choose(self) -> None:
        vg = self._vg
        newest = max(vg.copies, key=lambda copy: copy.seqno)
        vg.name = newest.vg_name
        for copy in vg.copies:
            copy.owner.vg_name, copy.owner.vg_id = vg.name, vg.id
        self._compare(newest)
        try:
            metadata = vg_from_text(newest.content)
            if wrong := reading_problems(metadata):
                raise MetadataError(wrong[0])
        except MetadataError as error:
            self._unreadable(newest, error)
            return
        vg.metadata = metadata
        self._find_pvs(metadata, newest)
        self._look_closer(metadata)

    def _warn(self, text: str) -> None:
        self._vg.warnings.append(text)

    def _compare(self, newest: TextCopy) -> None:
        name = self._vg.name
        for copy in self._vg.copies:
            if copy.seqno < newest.seqno:
                self._warn(
                    f"WARNING: ignoring metadata seqno {copy.seqno} on {copy.mda.where} for seqno"
                    f" {newest.seqno} on {newest.mda.where} for VG {name}."
                )
                self._vg.stale.append(copy.mda)
            elif copy.data != newest.data:
                self._warn(
                    f"WARNING: metadata seqno {copy.seqno} on {copy.mda.where} differs from that on"
                    f" {newest.mda.where} for VG {name}."
                )
                self._vg.stale.append(copy.mda)
        if self._vg.stale:
            self._warn(f"WARNING: Inconsistent metadata found for VG {name}.")
            self._warn("See vgck --updatemetadata to correct inconsistency.")

    def _unreadable(self, newest: TextCopy, error: MetadataError) -> None:
        mda = newest.mda
        self._vg.error = error
        self._warn(error.strerror or "")
        self._warn(
            f"WARNING: Failed to read metadata text at {mda.start + mda.committed.offset}"
            f" off {mda.committed.offset} size {mda.committed.size} VG {self._vg.name}"
            f" on {mda.where}"
        )
        self._warn(f"WARNING: Reading VG {self._vg.name} on {mda.where} failed.")

    def _find_pvs(self, metadata: VolumeGroupMetadata, newest: TextCopy) -> None:
        devices = {each.label.pv_id: each for each in self._found.devices}
        for pv in metadata.pvs:
            at = devices.get(pv.id)
            if at is None:
                uuid = dashed_id(pv.id)
                self._warn(f"WARNING: Couldn't find device with uuid {uuid}.")
                self._warn(
                    f"WARNING: VG {metadata.name} is missing PV {uuid}"
                    f" (last written to {pv.device_hint or '[unknown]'})."
                )
                continue
            at.vg_name, at.vg_id = metadata.name, metadata.id
            pv.device, pv.path, pv.mdas = at.device, at.path, at.mdas
            if "MISSING" in pv.status or "MISSING" in pv.flags:
                self._warn(
                    f"WARNING: VG {metadata.name} was previously updated while PV {pv.path} was"
                    " missing."
                )
        ids = {pv.id for pv in metadata.pvs}
        for copy in self._vg.copies:
            if copy.owner.label.pv_id not in ids and copy.owner not in self._vg.outdated:
                self._warn(
                    f"WARNING: outdated PV {copy.owner.path} seqno {copy.seqno} has been removed in"
                    f" current VG {metadata.name} seqno {newest.seqno}."
                )
                self._warn("See vgck --updatemetadata to clear outdated metadata.")
                self._vg.outdated.append(copy.owner)
        self._vg.duplicates = [e for e in self._found.duplicates if e.label.pv_id in ids]

    def _look_closer(self, metadata: VolumeGroupMetadata) -> None:
        name = metadata.name
        for type_text in unknown_segment_types(metadata):
            self._warn(f"WARNING: Unrecognised segment type {type_text}")
        for word in unknown_status(metadata):
            self._warn(f"WARNING: Unknown status flag '{word}'.")
        resized = False
        for each in self._found.devices:
            pv = metadata.pv_with_id(each.label.pv_id)
            if pv is None:
                continue
            if each.label.extension_version < 2:
                self._warn(
                    f"WARNING: PV {each.path} in VG {name} is using an old PV header, modify the"
                    " VG to update."
                )
                self._vg.old_labels.append(each)
            elif not each.label.used:
                self._warn(
                    f"WARNING: PV {each.path} in VG {name} is missing the used flag in PV header."
                )
                self._vg.old_labels.append(each)
            size = sectors(each.device.size)
            if pv.dev_size is not None and size < pv.dev_size:
                resized = True
                self._warn(
                    f"WARNING: Device {each.path} has size of {size} sectors which is smaller than"
                    f" corresponding PV size of {pv.dev_size} sectors. Was device resized?"
                )
        if resized:
            self._warn(f"WARNING: One or more devices used as PVs in VG {name} have changed sizes.")


def _check_names(found: Findings, warn: Warn) -> None:
    names: dict[str, list[str]] = {}
    for vg in found.vgs:
        names.setdefault(vg.name, []).append(dashed_id(vg.id))
    for name, uuids in names.items():
        if len(uuids) > 1:
            warn(f"WARNING: VG name {name} is used by VGs {' and '.join(uuids)}.")
            warn("Fix duplicate VG names with vgrename uuid, a device filter, or system IDs.")


def _check_orphans(found: Findings, warn: Warn) -> None:
    for each in found.devices:
        if not each.vg_name and each.label.used:
            warn(f"WARNING: PV {each.path} is marked in use but no VG was found using it.")
            warn(f"WARNING: PV {each.path} might need repairing.")
