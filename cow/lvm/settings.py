"""The settings of lvm.conf that are honoured, from --config, a file and the defaults.

`lvm.conf` is looked for in LVM_SYSTEM_DIR, and nowhere else: that of the machine speaks of its
disks and its kernel. Settings that are not in DEFAULTS change nothing. (lvm.conf(5))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from cow.lvm.errors import LVMError, MetadataError, RequestError
from cow.lvm.text import Scalar, Section, parse

_LVS = (
    "lv_name,vg_name,lv_attr,lv_size,pool_lv,origin,data_percent,metadata_percent,move_pv,"
    "mirror_log,copy_percent,convert_lv"
)
_LVS_VERBOSE = (
    "lv_name,vg_name,seg_count,lv_attr,lv_size,lv_major,lv_minor,lv_kernel_major,lv_kernel_minor,"
    "pool_lv,origin,data_percent,metadata_percent,move_pv,copy_percent,mirror_log,convert_lv,"
    "lv_uuid,lv_profile"
)
_PVS = "pv_name,vg_name,pv_fmt,pv_attr,pv_size,pv_free"

DEFAULTS: Final[dict[str, Scalar]] = {
    "activation/monitoring": 1,
    "activation/polling_interval": 15,
    "activation/snapshot_autoextend_percent": 20,
    "activation/snapshot_autoextend_threshold": 100,
    "backup/archive": 1,
    "backup/archive_dir": "",
    "backup/backup": 1,
    "backup/backup_dir": "",
    "backup/retain_days": 30,
    "backup/retain_min": 10,
    "global/activation": 1,
    "global/suffix": 1,
    "global/units": "r",
    "report/aligned": 1,
    "report/binary_values_as_numeric": 0,
    "report/buffered": 1,
    "report/columns_as_rows": 0,
    "report/compact_output": 0,
    "report/compact_output_cols": "",
    "report/headings": 1,
    "report/list_item_separator": ",",
    "report/lvs_cols": _LVS,
    "report/lvs_cols_verbose": _LVS_VERBOSE,
    "report/lvs_sort": "vg_name,lv_name",
    "report/mark_hidden_devices": 1,
    "report/output_format": "basic",
    "report/prefixes": 0,
    "report/pvs_cols": _PVS,
    "report/pvs_cols_verbose": f"{_PVS},dev_size,pv_uuid",
    "report/pvs_sort": "pv_name",
    "report/pvsegs_cols": f"{_PVS},pvseg_start,pvseg_size",
    "report/pvsegs_cols_verbose": (
        f"{_PVS},pvseg_start,pvseg_size,lv_name,seg_start_pe,segtype,seg_pe_ranges"
    ),
    "report/pvsegs_sort": "pv_name,pvseg_start",
    "report/quoted": 1,
    "report/segs_cols": "lv_name,vg_name,lv_attr,stripes,segtype,seg_size",
    "report/segs_cols_verbose": (
        "lv_name,vg_name,lv_attr,seg_start,seg_size,stripes,segtype,stripe_size,chunk_size"
    ),
    "report/segs_sort": "vg_name,lv_name,seg_start",
    "report/separator": " ",
    "report/time_format": "%Y-%m-%d %T %z",
    "report/vgs_cols": "vg_name,pv_count,lv_count,snap_count,vg_attr,vg_size,vg_free",
    "report/vgs_cols_verbose": (
        "vg_name,vg_attr,vg_extent_size,pv_count,lv_count,snap_count,vg_size,vg_free,vg_uuid,"
        "vg_profile"
    ),
    "report/vgs_sort": "vg_name",
}

SECTIONS: Final = frozenset(
    "activation allocation backup config devices dmeventd global local log metadata report shell"
    " tags".split()
)
"""The sections there are in an lvm.conf."""


class Settings:
    """Values by their path, "report/headings"; those of --config come first, then the file's."""

    def __init__(self, *sections: Section) -> None:
        self._sections = sections

    def _find(self, path: str) -> Scalar | list[Scalar]:
        for section in self._sections:
            found = section
            *above, key = path.split("/")
            for name in above:
                inner = found.get(name)
                found = inner if isinstance(inner, Section) else Section()
            value = found.get(key)
            if value is not None and not isinstance(value, Section):
                return value
        return DEFAULTS[path]

    def text(self, path: str) -> str:
        """Return a string; a list of strings comes joined by commas."""
        value = self._find(path)
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    def number(self, path: str) -> int:
        """Return an integer."""
        value = self._find(path)
        if isinstance(value, int):
            return value
        default = DEFAULTS[path]
        assert isinstance(default, int)
        return default

    def flag(self, path: str) -> bool:
        """Return whether a setting is on: 1, "y", "yes", "on" or "true"."""
        value = self._find(path)
        if isinstance(value, str):
            return value.lower() in ("y", "yes", "on", "true", "1")
        return bool(value)


def read_settings(
    config: str | None = None,
    environ: Mapping[str, str] = os.environ,
    warn: Callable[[str], None] = lambda text: None,
) -> Settings:
    """Return the settings that `config`, the argument of --config, and the file make."""
    sections = []
    if config is not None:
        try:
            given = parse(config)
        except MetadataError as error:
            reason = error.strerror or ""
            raise RequestError(
                f"{reason[:1].upper()}{reason[1:]}\nFailed to set overridden configuration entries."
            ) from error
        for name, _ in given.sections():
            if name not in SECTIONS:
                warn(f'Configuration section "{name}" unknown.')
        sections.append(given)
    folder = environ.get("LVM_SYSTEM_DIR")
    if folder:
        path = os.path.join(folder, "lvm.conf")
        try:
            with open(path, "rb") as file:
                sections.append(parse(file.read()))
        except FileNotFoundError:
            pass
        except (OSError, MetadataError) as error:
            raise LVMError(f"Failed to load config file {path}: {error.strerror}") from error
    return Settings(*sections)
