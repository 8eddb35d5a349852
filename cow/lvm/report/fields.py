"""The fields of reports: names, headings, widths and kinds as those of lvs, vgs and pvs.

A kind says what a value is, how it is written, sorted and compared:

    str  text                      num  a number; None is a blank, -1 not known
    siz  sectors; None is a blank  pct  a percentage; None is a blank
    lst  texts                     bin  true or false, written as a word or not; None: unknown
    tim  seconds since 1970
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from cow.lvm.errors import LVMError
from cow.lvm.report.rows import Row
from cow.lvm.report.values import VALUES
from cow.lvm.report.values_pv import PV_VALUES, VG_VALUES
from cow.lvm.size import DEFAULT_UNITS, Units, report_size

GROUPS: Final = {
    "lv": "Logical Volume Fields",
    "pv": "Physical Volume Fields",
    "vg": "Volume Group Fields",
    "seg": "Logical Volume Segment Fields",
    "pvseg": "Physical Volume Segment Fields",
}
RIGHT: Final = ("num", "siz", "bin")
"""The kinds that stand at the right of their column."""

NOTHING: Final[dict[str, Any]] = {"str": "", "lst": [], "bin": False}
LAST: Final = 2**64


@dataclass(frozen=True)
class Style:
    """How values are written."""

    units: Units = DEFAULT_UNITS
    binary: bool = False
    """Whether true and false are 1 and 0, and unknown -1."""
    list_separator: str = ","
    time_format: str = "%Y-%m-%d %T %z"


@dataclass(frozen=True)
class Field:
    """One field: `width` is the least its column has, `word` what stands for true."""

    name: str
    group: str
    kind: str
    width: int
    heading: str
    word: str = ""
    value: Callable[[Row], Any] = field(default=lambda row: None, repr=False, compare=False)

    def text(self, value: Any, style: Style) -> str:  # noqa: ANN401
        """Write a value."""
        if isinstance(value, str):
            return value
        if self.kind == "bin":
            if style.binary:
                return str(-1 if value is None else int(value))
            return "unknown" if value is None else self.word if value else ""
        if value is None:
            return ""
        if self.kind == "siz":
            return report_size(value, style.units)
        if self.kind == "pct":
            return f"{value:.2f}"
        if self.kind == "lst":
            return style.list_separator.join(value)
        if self.kind == "tim":
            return time.strftime(style.time_format, time.localtime(value))
        return str(value)

    def sort_key(self, value: Any) -> Any:  # noqa: ANN401
        """Return what rows are put in order by: what is not known comes last."""
        if self.kind == "lst":
            return (not value, value)
        if self.kind == "str":
            return str(value).strip("[]").encode("utf-8", "surrogateescape")
        if isinstance(value, str):
            return LAST
        if value is None:
            return LAST if self.kind in ("pct", "bin", "num") else 0
        return value if value >= 0 else LAST


def find_fields(name: str, groups: Iterable[str], prefix: str) -> list[Field]:
    """Return the field of that name, or all those of a group for GROUP_all; [] if there is none.

    Case and underscores do not matter; `prefix` is that of the report, "lv_", and can be left out.
    All without a group are those of `groups`.
    """
    wanted = name.lower().replace("_", "")
    short = prefix.replace("_", "")
    allowed = set(groups)
    for each in FIELDS:
        plain = each.name.replace("_", "")
        if wanted == plain or (each.name.startswith(prefix) and wanted == plain[len(short) :]):
            return [each]
    if wanted == "all":
        return [each for each in FIELDS if each.group in allowed]
    for group in GROUPS:
        if wanted == f"{group}all":
            return [each for each in FIELDS if each.group == group]
    return []


def list_fields(groups: Iterable[str]) -> list[str]:
    """Return the lines of `-o help`."""
    allowed = set(groups)
    lines = []
    for group, title in GROUPS.items():
        if group in allowed:
            lines += [title, "-" * len(title)]
            lines.append(f"  {group + '_all':<28}- all fields of this section")
            for each in FIELDS:
                if each.group == group:
                    lines.append(f"  {each.name:<28}- {each.heading} [{KINDS[each.kind]}]")
            lines.append(" ")
    return lines


KINDS: Final = {
    "str": "string",
    "num": "number",
    "siz": "size",
    "pct": "percent",
    "lst": "string list",
    "bin": "yes or no",
    "tim": "time",
}


class FieldError(LVMError):
    """A field that is not there; `fields` are the lines about those that are."""

    def __init__(self, text: str, fields: list[str]) -> None:
        super().__init__(text)
        self.fields = fields


# NAME KIND WIDTH HEADING [= WORD]; width 0 is that of the heading.
_TABLE = """
[lv]
lv_uuid str 0 LV UUID
lv_name str 4 LV
lv_full_name str 0 LV
lv_path str 0 Path
lv_dm_path str 0 DMPath
lv_parent str 0 Parent
lv_layout lst 10 Layout
lv_role lst 10 Role
lv_initial_image_sync bin 10 InitImgSync = initial image sync
lv_image_synced bin 10 ImgSynced = image synced
lv_merging bin 10 Merging = merging
lv_converting bin 0 Converting = converting
lv_allocation_policy str 10 AllocPol
lv_allocation_locked bin 10 AllocLock = allocation locked
lv_fixed_minor bin 10 FixMin = fixed minor
lv_skip_activation bin 15 SkipAct = skip activation
lv_autoactivation bin 0 AutoAct = enabled
lv_when_full str 15 WhenFull
lv_active str 0 Active
lv_active_locally bin 10 ActLocal = active locally
lv_active_remotely bin 10 ActRemote = active remotely
lv_active_exclusively bin 10 ActExcl = active exclusively
lv_major num 0 Maj
lv_minor num 0 Min
lv_read_ahead siz 0 Rahead
lv_size siz 0 LSize
lv_metadata_size siz 0 MSize
seg_count num 0 #Seg
origin str 0 Origin
origin_uuid str 38 Origin UUID
origin_size siz 0 OSize
lv_ancestors lst 0 Ancestors
lv_full_ancestors lst 0 FAncestors
lv_descendants lst 0 Descendants
lv_full_descendants lst 0 FDescendants
raid_mismatch_count num 0 Mismatches
raid_sync_action str 0 SyncAction
raid_write_behind num 0 WBehind
raid_min_recovery_rate num 0 MinSync
raid_max_recovery_rate num 0 MaxSync
raidintegritymode str 0 IntegMode
raidintegrityblocksize num 0 IntegBlkSize
integritymismatches num 0 IntegMismatches
move_pv str 0 Move
move_pv_uuid str 38 Move UUID
convert_lv str 0 Convert
convert_lv_uuid str 38 Convert UUID
mirror_log str 0 Log
mirror_log_uuid str 38 Log UUID
data_lv str 0 Data
data_lv_uuid str 38 Data UUID
metadata_lv str 0 Meta
metadata_lv_uuid str 38 Meta UUID
pool_lv str 0 Pool
pool_lv_uuid str 38 Pool UUID
lv_tags lst 0 LV Tags
lv_profile str 0 LProfile
lv_lockargs str 0 LLockArgs
lv_time tim 26 CTime
lv_time_removed tim 26 RTime
lv_host str 10 Host
lv_modules lst 0 Modules
lv_historical bin 0 Historical = historical
writecache_block_size num 0 WCacheBlkSize
lv_kernel_major num 0 KMaj
lv_kernel_minor num 0 KMin
lv_kernel_read_ahead siz 0 KRahead
lv_permissions str 8 LPerms
lv_suspended bin 10 Suspended = suspended
lv_live_table bin 20 LiveTable = live table present
lv_inactive_table bin 20 InactiveTable = inactive table present
lv_device_open bin 10 DevOpen = open
data_percent pct 6 Data%
snap_percent pct 6 Snap%
metadata_percent pct 6 Meta%
copy_percent pct 0 Cpy%Sync
sync_percent pct 0 Cpy%Sync
cache_total_blocks num 0 CacheTotalBlocks
cache_used_blocks num 16 CacheUsedBlocks
cache_dirty_blocks num 0 CacheDirtyBlocks
cache_read_hits num 16 CacheReadHits
cache_read_misses num 16 CacheReadMisses
cache_write_hits num 16 CacheWriteHits
cache_write_misses num 0 CacheWriteMisses
kernel_cache_settings lst 18 KCacheSettings
kernel_cache_policy str 18 KCachePolicy
kernel_metadata_format num 0 KMFmt
lv_health_status str 15 Health
kernel_discards str 0 KDiscards
lv_check_needed bin 15 CheckNeeded = check needed
lv_merge_failed bin 15 MergeFailed = merge failed
lv_snapshot_invalid bin 15 SnapInvalid = snapshot invalid
vdo_operating_mode str 0 VDOOperatingMode
vdo_compression_state str 0 VDOCompressionState
vdo_index_state str 0 VDOIndexState
vdo_used_size num 0 VDOUsedSize
vdo_saving_percent num 0 VDOSaving%
writecache_total_blocks num 0 WCacheTotalBlocks
writecache_free_blocks num 0 WCacheFreeBlocks
writecache_writeback_blocks num 0 WCacheWritebackBlocks
writecache_error num 0 WCacheErrors
lv_attr str 0 Attr
[pv]
pv_fmt str 0 Fmt
pv_uuid str 0 PV UUID
dev_size siz 0 DevSize
pv_name str 10 PV
pv_major str 0 Maj
pv_minor str 0 Min
pv_mda_free siz 9 PMdaFree
pv_mda_size siz 9 PMdaSize
pv_ext_vsn num 0 PExtVsn
pe_start siz 7 1st PE
pv_size siz 0 PSize
pv_free siz 0 PFree
pv_used siz 0 Used
pv_attr str 0 Attr
pv_allocatable bin 0 Allocatable = allocatable
pv_exported bin 10 Exported = exported
pv_missing bin 10 Missing = missing
pv_pe_count num 3 PE
pv_pe_alloc_count num 0 Alloc
pv_tags lst 0 PV Tags
pv_mda_count num 0 #PMda
pv_mda_used_count num 0 #PMdaUse
pv_ba_start siz 0 BA Start
pv_ba_size siz 0 BA Size
pv_in_use bin 0 PInUse = used
pv_duplicate bin 0 Duplicate = duplicate
pv_device_id str 0 DeviceID
pv_device_id_type str 0 DeviceIDType
[vg]
vg_fmt str 0 Fmt
vg_uuid str 0 VG UUID
vg_name str 0 VG
vg_attr str 0 Attr
vg_permissions str 10 VPerms
vg_extendable bin 0 Extendable = extendable
vg_exported bin 10 Exported = exported
vg_autoactivation bin 0 AutoAct = enabled
vg_partial bin 10 Partial = partial
vg_allocation_policy str 10 AllocPol
vg_clustered bin 10 Clustered = clustered
vg_shared bin 7 Shared = shared
vg_size siz 0 VSize
vg_free siz 0 VFree
vg_sysid str 0 SYS ID
vg_systemid str 0 System ID
vg_lock_type str 0 LockType
vg_lock_args str 0 VLockArgs
vg_extent_size siz 0 Ext
vg_extent_count num 0 #Ext
vg_free_count num 0 Free
max_lv num 0 MaxLV
max_pv num 0 MaxPV
pv_count num 0 #PV
vg_missing_pv_count num 0 #PV Missing
lv_count num 0 #LV
snap_count num 0 #SN
vg_seqno num 0 Seq
vg_tags lst 0 VG Tags
vg_profile str 0 VProfile
vg_mda_count num 0 #VMda
vg_mda_used_count num 0 #VMdaUse
vg_mda_free siz 9 VMdaFree
vg_mda_size siz 9 VMdaSize
vg_mda_copies num 0 #VMdaCps
[seg]
segtype str 0 Type
stripes num 0 #Str
data_stripes num 0 #DStr
reshape_len siz 0 RSize
reshape_len_le num 0 RSize
data_copies num 0 #Cpy
data_offset num 0 DOff
new_data_offset num 0 NOff
parity_chunks num 0 #Par
stripe_size siz 0 Stripe
region_size siz 0 Region
chunk_size siz 0 Chunk
thin_count num 0 #Thins
discards str 0 Discards
cache_metadata_format num 0 CMFmt
cache_mode str 0 CacheMode
zero bin 0 Zero = zero
transaction_id num 0 TransId
thin_id num 0 ThId
seg_start siz 0 Start
seg_start_pe num 0 Start
seg_size siz 0 SSize
seg_size_pe num 0 SSize
seg_tags lst 0 Seg Tags
seg_pe_ranges lst 0 PE Ranges
seg_le_ranges lst 0 LE Ranges
seg_metadata_le_ranges lst 0 Metadata LE Ranges
devices lst 0 Devices
metadata_devices lst 0 Metadata Devs
seg_monitor str 0 Monitor
cache_policy str 0 CachePolicy
cache_settings lst 0 CacheSettings
vdo_compression num 0 VDOCompression
vdo_deduplication num 0 VDODeduplication
vdo_use_metadata_hints num 0 VDOMetadataHints
vdo_minimum_io_size num 0 VDOMinimumIOSize
vdo_block_map_cache_size siz 0 VDOBlockMapCacheSize
vdo_block_map_era_length num 0 VDOBlockMapEraLength
vdo_use_sparse_index num 0 VDOSparseIndex
vdo_index_memory_size siz 0 VDOIndexMemorySize
vdo_slab_size siz 0 VDOSlabSize
vdo_ack_threads num 0 VDOAckThreads
vdo_bio_threads num 0 VDOBioThreads
vdo_bio_rotation num 0 VDOBioRotation
vdo_cpu_threads num 0 VDOCPUThreads
vdo_hash_zone_threads num 0 VDOHashZoneThreads
vdo_logical_threads num 0 VDOLogicalThreads
vdo_physical_threads num 0 VDOPhysicalThreads
vdo_max_discard num 0 VDOMaxDiscard
vdo_write_policy str 0 VDOWritePolicy
vdo_header_size siz 0 VDOHeaderSize
[pvseg]
pvseg_start num 0 Start
pvseg_size num 0 SSize
"""


def _read_table() -> Iterable[Field]:
    values = VALUES | PV_VALUES | VG_VALUES
    group = ""
    for line in _TABLE.split("\n"):
        if line.startswith("["):
            group = line[1:-1]
        elif line:
            name, kind, width, rest = line.split(" ", 3)
            heading, _, word = rest.partition(" = ")
            nothing = NOTHING.get(kind)
            value = values.get(name, lambda row, nothing=nothing: nothing)
            yield Field(name, group, kind, int(width) or len(heading), heading, word, value)


FIELDS: Final = tuple(_read_table())
SELECTED: Final = Field("selected", "", "num", 8, "Selected")
"""Whether the row is what -S selects; it is worked out by the report."""
