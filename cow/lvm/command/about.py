"""version: which LVM is followed."""

from __future__ import annotations

from cow.lvm.command.command import Command

LVM_VERSION = "2.03.16(2) (2022-05-18)"
LIBRARY_VERSION = "1.02.185 (2022-05-18)"
DRIVER_VERSION = "4.48.0"


def version(command: Command) -> None:
    """Name the versions whose behaviour is followed, in the lines of lvm version."""
    command.print(f"LVM version:     {LVM_VERSION}")
    command.print(f"Library version: {LIBRARY_VERSION}")
    command.print(f"Driver version:  {DRIVER_VERSION}")
