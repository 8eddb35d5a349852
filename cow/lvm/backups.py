"""Files with the metadata before and after each command, as LVM keeps them (lvm.conf, backup{}).

The archive has the metadata from before every command, VG_00000-1234567890.vg and so on; the backup
that from after the last one, named like the VG.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import time
from pathlib import Path

from cow.lvm.commit import metadata_backup
from cow.lvm.metadata import VolumeGroupMetadata
from cow.lvm.text import parse


class Backups:
    """Where the files are kept; None: nowhere. Folders are made when they are needed.

    Of each VG at least `retain_min` files stay in the archive, and those that are younger than
    `retain_days`.
    """

    def __init__(
        self,
        backup_dir: Path | None = None,
        archive_dir: Path | None = None,
        *,
        retain_min: int = 10,
        retain_days: int = 30,
    ) -> None:
        self.backup_dir = backup_dir
        self.archive_dir = archive_dir
        self.retain_min = retain_min
        self.retain_days = retain_days

    def archive(self, vg: VolumeGroupMetadata, command: str) -> None:
        """Keep the metadata from before a command."""
        if self.archive_dir is None:
            return
        found = self._archived(vg.name)
        number = max(found, default=-1) + 1
        name = f"{vg.name}_{number:05}-{random.randrange(2**31)}.vg"
        text = metadata_backup(vg, f"Created *before* executing '{command}'")
        write_backup(self.archive_dir / name, text)
        oldest = time.time() - self.retain_days * 24 * 3600
        for old in sorted(found)[: max(len(found) + 1 - self.retain_min, 0)]:
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                if found[old].stat().st_mtime < oldest:
                    found[old].unlink()

    def _archived(self, name: str) -> dict[int, Path]:
        """Return the files of a VG in the archive by their numbers."""
        if self.archive_dir is None or not self.archive_dir.is_dir():
            return {}
        pattern = re.compile(re.escape(name) + r"_([0-9]+)-[0-9]+\.vg")
        matches = map(pattern.fullmatch, os.listdir(self.archive_dir))
        return {int(match[1]): self.archive_dir / match[0] for match in matches if match}

    def path(self, name: str) -> Path | None:
        """Return where the backup of a VG is."""
        return None if self.backup_dir is None else self.backup_dir / name

    def remove(self, name: str) -> None:
        """Remove the backup of a VG that is no more; what is in the archive stays."""
        if self.backup_dir is not None:
            (self.backup_dir / name).unlink(missing_ok=True)

    def files(self, name: str) -> list[Path]:
        """Return the files there are of a VG, oldest first, the backup last."""
        found = self._archived(name)
        backup = self.path(name)
        last = [backup] if backup is not None and backup.is_file() else []
        return [*(found[number] for number in sorted(found)), *last]

    def backup(self, vg: VolumeGroupMetadata, command: str) -> None:
        """Keep the metadata from after a command, in place of that from before."""
        if self.backup_dir is None:
            return
        write_backup(
            self.backup_dir / vg.name, metadata_backup(vg, f"Created *after* executing '{command}'")
        )


def describe(path: Path) -> tuple[str, str, int]:
    """Return the name of the VG in a file, its description, and when it was written."""
    section = parse(path.read_bytes())
    name = next((name for name, _ in section.sections()), "")
    written = section.get("creation_time")
    description = str(section.get("description") or "<No description>")
    return name, description, written if isinstance(written, int) else 0


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_backup(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, for its owner only; also its folder."""
    _make_folder(path.parent)
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
