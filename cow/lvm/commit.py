"""The change from one generation of the metadata to the next, safe at every step.

    text of the new generation into free room of every mda  | barrier
    slot 1 of every header := the new text (precommit)      | barrier
    (what is active is made ready and suspended)
    slot 0 := the new text, slot 1 := nothing (commit)      | barrier, mda by mda
    (what is active is resumed)

Before the first commit nothing but free room and slot 1 has changed, and readers go by slot 0.
After it the new generation counts wherever it is, by its seqno. (lib/metadata/metadata.c)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, Protocol

from cow import _core
from cow.lvm.errors import LVMError, MetadataError
from cow.lvm.mda import MetadataArea
from cow.lvm.metadata import VolumeGroupMetadata
from cow.lvm.metadata_text import CONTENTS, VERSION, vg_section
from cow.lvm.text import Section, backup_text, disk_text

log = logging.getLogger("cow.lvm")

GENERATOR: Final = "cow"


class ActiveWork(Protocol):
    """What is done to active devices while their metadata changes.

    The order is preload, suspend, (commit), resume; or revert, where one of the first two or the
    commit failed: then devices are resumed with the tables they had.
    """

    def preload(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Load the tables of the new generation. It is precommitted."""

    def suspend(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Suspend every device whose table or meaning changes."""

    def resume(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Resume everything, with the new tables; remove what is no more."""

    def revert(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Undo preload and suspend, how far they ever came."""


def new_header(old: Section, description: str) -> Section:
    """Return the header of a generation written now; what is not known of the old one is kept."""
    header = Section()
    header["contents"] = CONTENTS
    header["version"] = VERSION
    header["description"] = description
    header["creation_host"] = os.uname().nodename
    header["creation_time"] = int(time.time())
    for key, value in old.items():
        if key != "creation_host_system_id":
            header.setdefault(key, value)
    return header


def _host() -> str:
    return " ".join(os.uname())


def metadata_bytes(vg: VolumeGroupMetadata) -> bytes:
    """Return the text of a generation as it is written into metadata areas."""
    return disk_text(vg.name, vg_section(vg), vg.header, GENERATOR, _host())


def metadata_backup(vg: VolumeGroupMetadata, description: str) -> str:
    """Return the text of a generation as vgcfgbackup writes it."""
    header = new_header(vg.header, description)
    return backup_text(vg.name, vg_section(vg), header, GENERATOR, _host())


def flush_devices(devices: Iterable[_core.BlockDevice]) -> None:
    """Flush each device once."""
    for device in dict.fromkeys(devices):
        device.flush()


def usable_mdas(vg: VolumeGroupMetadata) -> list[MetadataArea]:
    """Return the metadata areas that get the text: neither damaged nor ignored."""
    return [mda for pv in vg.pvs for mda in pv.mdas if not mda.bad and not mda.ignored]


def write_generation(
    old: VolumeGroupMetadata,
    new: VolumeGroupMetadata,
    mdas: list[MetadataArea],
    work: ActiveWork | None = None,
    on_commit: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = log.warning,
) -> bool:
    """Make `new` the generation in force; tell whether it was committed on all of `mdas`.

    LVMError: `old` still is. `on_commit` is called when the commit is done, before the devices are
    resumed.
    """
    if not mdas:
        raise MetadataError(f"VG {new.name} has no metadata area that can be written.")
    text = metadata_bytes(new)
    committed: list[MetadataArea] = []
    working = False
    try:
        for mda in mdas:
            mda.write_text(text, f"VG {new.name} {new.seqno}")
        flush_devices(mda.device for mda in mdas)
        for mda in mdas:
            mda.precommit()
        flush_devices(mda.device for mda in mdas)
        if work is not None:
            working = True
            work.preload(old, new)
            work.suspend(old, new)
        _commit(new, mdas, committed, report)
    except BaseException as error:
        if committed:
            on_commit()
        _revert(mdas)
        if work is not None and working:
            (work.resume if committed else work.revert)(old, new)
        if isinstance(error, OSError) and not isinstance(error, LVMError):
            raise LVMError(f"Failed to write VG {new.name}: {error}", error.errno) from error
        raise
    on_commit()
    if work is not None:
        work.resume(old, new)
    return len(committed) == len(mdas)


def _commit(
    new: VolumeGroupMetadata,
    mdas: list[MetadataArea],
    committed: list[MetadataArea],
    report: Callable[[str], None],
) -> None:
    """Commit on every mda; it counts if one was committed."""
    failed: OSError | None = None
    for mda in mdas:
        try:
            mda.commit()
        except OSError as error:
            failed = error
            report(f"WARNING: Failed to commit VG {new.name} on {mda.where}: {error}")
            continue
        mda.seqno = new.seqno
        committed.append(mda)
    if failed is not None and not committed:
        raise failed


def _revert(mdas: list[MetadataArea]) -> None:
    for mda in mdas:
        try:
            mda.revert()
        except OSError as error:
            log.warning("%s: the precommitted slot stays: %s", mda, error)
    with suppress(OSError):
        flush_devices(mda.device for mda in mdas)
