"""Names, tags and uuids: what they may be, how new ones are made, and their dm forms."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

from cow.lvm.errors import MetadataError, RequestError

MAX_NAME: Final = 127
MAX_TAG: Final = 1024

ID_LENGTH: Final = 32
_ID_SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID = re.compile(r"[0-9A-Za-z!#]{32}")
_ID_GROUPS = (6, 4, 4, 4, 4, 4, 6)

_NAME = re.compile(r"(?!-)[A-Za-z0-9._+-]+")
_TAG = re.compile(r"[A-Za-z0-9_+.\-/=!:&#]+")

HEADER_KEYS: Final = tuple(
    "contents version description creation_host creation_host_system_id creation_time".split()
)
"""What stands beside the VG in its text: a VG of such a name could not be read again."""

RESERVED_PREFIXES: Final = ("snapshot", "pvmove")
RESERVED_PARTS: Final = tuple(
    "_cdata _cmeta _corig _cpool _cvol _wcorig _mimage _mlog _rimage _rmeta _tdata _tmeta _vdata"
    " _imeta _iorig _pmspare _vorigin".split()
)


def is_name(name: str) -> bool:
    """Tell whether `name` can be a VG's or an LV's: letters, digits and . _ - +, no - in front."""
    return bool(_NAME.fullmatch(name)) and name not in (".", "..") and len(name) <= MAX_NAME


def check_vg_name(name: str) -> None:
    """Refuse a name that no new VG may have."""
    if not is_name(name) or name in HEADER_KEYS:
        raise RequestError(f'New volume group name "{name}" is invalid.')


def check_lv_name(name: str, vg_name: str) -> None:
    """Refuse a name that users may not give to an LV of `vg_name`."""
    if not is_name(name):
        raise RequestError(f'Logical volume name "{name}" is invalid.')
    for prefix in RESERVED_PREFIXES:
        if name.startswith(prefix):
            raise RequestError(
                f'Names starting "{prefix}" are reserved. Please choose a different LV name.'
            )
    for part in RESERVED_PARTS:
        if part in name:
            raise RequestError(
                f'Names including "{part}" are reserved. Please choose a different LV name.'
            )
    if not fits(vg_name, name):
        raise RequestError(
            f'Name "{vg_name}/{name}" is too long: VG and LV names have at most'
            f" {MAX_NAME - 3} characters together."
        )


def fits(vg_name: str, lv_name: str) -> bool:
    """Tell whether the names are short enough together."""
    return len(vg_name) + len(lv_name) + 3 <= MAX_NAME


def is_reserved(name: str) -> bool:
    """Tell whether `name` is one LVM keeps for the LVs it makes itself."""
    return name.startswith(RESERVED_PREFIXES) or any(part in name for part in RESERVED_PARTS)


def is_tag(tag: str) -> bool:
    """Tell whether `tag` can be one; "@" in front is the command line's, not the tag's."""
    return bool(_TAG.fullmatch(tag)) and len(tag) <= MAX_TAG


def check_tag(tag: str) -> None:
    """Refuse what cannot be a tag."""
    if not is_tag(tag):
        raise RequestError(f"Invalid tag {tag}.")


def free_name(prefix: str, names: Iterable[str]) -> str:
    """Return prefix%d with the number behind the highest there is, "lvol0" where there is none."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)")
    numbers = (int(found[1]) for name in names if (found := pattern.fullmatch(name)))
    return f"{prefix}{max(numbers, default=-1) + 1}"


# Uuids: 32 characters; in text in groups of 6-4-4-4-4-4-6.


def new_id() -> str:
    """Make a uuid as LVM does: random letters and digits."""
    return "".join(_ID_SYMBOLS[byte % len(_ID_SYMBOLS)] for byte in os.urandom(ID_LENGTH))


def plain_id(text: str) -> str:
    """Return the 32 characters of a uuid written with or without dashes."""
    plain = text.replace("-", "")
    if not _ID.fullmatch(plain):
        raise MetadataError(f"{text[:64]!r} is not a uuid of {ID_LENGTH} characters")
    return plain


def dashed_id(plain: str) -> str:
    """Write a uuid in its groups."""
    groups, at = [], 0
    for length in _ID_GROUPS:
        groups.append(plain[at : at + length])
        at += length
    return "-".join(groups)


# Device-mapper.


def dm_name(vg_name: str, lv_name: str, layer: str = "") -> str:
    """Return the dm device's name; `layer` is "real", "cow" and the like."""
    parts = [vg_name.replace("-", "--"), lv_name.replace("-", "--")]
    return "-".join(parts + [layer] if layer else parts)


def split_dm_name(name: str) -> tuple[str, str, str]:
    """Return VG, LV and layer of a dm name; "" where there is none."""
    found = [part.replace("\0", "-") for part in name.replace("--", "\0").split("-", 2)]
    vg_name, lv_name, layer = [*found, "", ""][:3]
    return vg_name, lv_name, layer


def dm_uuid(vg_id: str, lv_id: str, layer: str = "") -> str:
    """Return the dm device's uuid."""
    return f"LVM-{vg_id}{lv_id}" + (f"-{layer}" if layer else "")
