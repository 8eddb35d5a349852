"""Files with the metadata before and after each command, as LVM keeps them (lvm.conf, backup{}).

The archive has the metadata from before every command, VG_00000-1234567890.vg and so on; the backup
that from after the last one, named like the VG.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from pathlib import Path

from cow.lvm.commit import metadata_backup
from cow.lvm.metadata import VolumeGroupMetadata


class Backups:
    """Where the files are kept; None: nowhere. Folders are made when they are needed."""

    def __init__(self, backup_dir: Path | None = None, archive_dir: Path | None = None) -> None:
        self.backup_dir = backup_dir
        self.archive_dir = archive_dir

    def archive(self, vg: VolumeGroupMetadata, command: str) -> None:
        """Keep the metadata from before a command."""
        if self.archive_dir is None:
            return
        _make_folder(self.archive_dir)
        pattern = re.compile(re.escape(vg.name) + r"_([0-9]+)-[0-9]+\.vg")
        found = map(pattern.fullmatch, os.listdir(self.archive_dir))
        number = max((int(match[1]) for match in found if match), default=-1) + 1
        name = f"{vg.name}_{number:05}-{random.randrange(2**31)}.vg"
        text = metadata_backup(vg, f"Created *before* executing '{command}'")
        _write(self.archive_dir / name, text)

    def backup(self, vg: VolumeGroupMetadata, command: str) -> None:
        """Keep the metadata from after a command, in place of that from before."""
        if self.backup_dir is None:
            return
        _make_folder(self.backup_dir)
        _write(
            self.backup_dir / vg.name, metadata_backup(vg, f"Created *after* executing '{command}'")
        )


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, for its owner only."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".lvm_")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
