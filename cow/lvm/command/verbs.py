"""The table of LVM's verbs: name, help, forms, options, and the function that runs one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from cow.lvm.command.options import read_spec

if TYPE_CHECKING:
    from cow.lvm.command.command import Command

_REPORT: Final = (
    "aligned a|all binary configreport=configreport foreign H|history ignorelockingfailure logonly"
    " nameprefixes noheadings nosuffix o|options=text+ P|partial readonly reportformat=reportformat"
    " rows S|select=text separator=text shared O|sort=text unbuffered units=text unquoted"
)
_DISPLAY: Final = f"{_REPORT} c|colon C|columns m|maps"
_NEW_PV: Final = (
    "dataalignment=kibibytes dataalignmentoffset=kibibytes labelsector=number M|metadatatype=text"
    " pvmetadatacopies=number metadatasize=size Z|zero=yn"
)
_LV: Final = "A|autobackup=yn noudevsync P|partial nosuffix units=text"


class Verb(NamedTuple):
    """One verb. `run` names a function: MODULE.FUNCTION of this package."""

    name: str
    help: str
    syntax: tuple[str, ...]
    options: str
    function: str
    least: int = 0
    most: int | None = None
    selectable: bool = False
    """Whether -S can stand in for arguments."""
    note: str = ""

    @property
    def run(self) -> Callable[[Command], None]:
        """The function, imported when it is needed."""
        module, _, name = self.function.rpartition(".")
        found: Callable[[Command], None] = getattr(
            importlib.import_module(f"cow.lvm.command.{module}"), name
        )
        return found


VERBS: Final = (
    Verb(
        "explain",
        "tell which LVs, devices and tables make up an LV and its snapshots",
        ("VG/LV ...",),
        "",
        "explain.explain",
        least=1,
        note="This verb is cow's own. It shows the record snapshot0 too, which lvs never does.",
    ),
    Verb(
        "lvchange",
        "change the attributes of logical volumes, or activate them",
        (
            "-a|--activate y|n|ay VG|LV|Tag|Select ...",
            "--addtag Tag|--deltag Tag VG|LV|Tag|Select ...",
            "-p|--permission rw|r VG|LV|Tag|Select ...",
            "--refresh VG|LV|Tag|Select ...",
        ),
        f"{_LV} a|activate=activation activationmode=text addtag=tag+ alloc=alloc C|contiguous=yn"
        " deltag=tag+ f|force* K|ignoreactivationskip ignorelockingfailure monitor=yn"
        " M|persistent=yn minor=number j|major=number p|permission=permission poll=yn"
        " r|readahead=readahead refresh S|select=text setautoactivation=yn"
        " k|setactivationskip=yn sysinit ignoremonitoring",
        "lv.lvchange",
        least=1,
        selectable=True,
    ),
    Verb(
        "lvconvert",
        "change what logical volumes are: merge, split and attach snapshots",
        (
            "--merge LV|VG|Tag ...",
            "--mergesnapshot LV ...",
            "--splitsnapshot LV",
            "-s|--snapshot LV LV_cow",
            "--type snapshot LV LV_cow",
        ),
        f"{_LV} alloc=alloc b|background c|chunksize=kibibytes f|force* i|interval=number merge"
        " mergesnapshot r|readahead=readahead s|snapshot splitsnapshot type=type Z|zero=yn",
        "convert.lvconvert",
    ),
    Verb(
        "lvcreate",
        "create a logical volume, or a snapshot of one",
        (
            "-L|--size Size VG [ PV ... ]",
            "-l|--extents Number[%{VG|FREE|PVS}] VG [ PV ... ]",
            "-i|--stripes Number -L|--size Size VG [ PV ... ]",
            "-s|--snapshot -L|--size Size LV [ PV ... ]",
            "-s|--snapshot -l|--extents Number[%ORIGIN] LV [ PV ... ]",
            "--type snapshot -V|--virtualsize Size -L|--size Size VG [ PV ... ]",
            "--type zero|error -L|--size Size VG",
        ),
        f"{_LV} a|activate=activation addtag=tag+ alloc=alloc c|chunksize=kibibytes"
        " C|contiguous=yn l|extents=extents ignoreactivationskip f|force* j|major=number"
        " minor=number monitor=yn n|name=text ignoremonitoring p|permission=permission"
        " M|persistent=yn r|readahead=readahead k|setactivationskip=yn setautoactivation=yn"
        " L|size=size s|snapshot i|stripes=number I|stripesize=kibibytes type=type"
        " V|virtualsize=size W|wipesignatures=yn Z|zero=yn",
        "create.lvcreate",
    ),
    Verb(
        "lvdisplay",
        "display information about logical volumes",
        ("[ VG|LV|Tag ... ]",),
        _DISPLAY,
        "display.lvdisplay",
    ),
    Verb(
        "lvextend",
        "add space to a logical volume",
        (
            "-L|--size [+]Size LV [ PV ... ]",
            "-l|--extents [+]Number[%{VG|LV|PVS|FREE|ORIGIN}] LV [ PV ... ]",
            "--usepolicies LV [ PV ... ]",
        ),
        f"{_LV} alloc=alloc l|extents=extents f|force* i|stripes=number I|stripesize=kibibytes"
        " L|size=amount n|nofsck r|resizefs type=type usepolicies",
        "resize.lvextend",
    ),
    Verb(
        "lvreduce",
        "reduce the size of a logical volume",
        ("-L|--size [-]Size LV", "-l|--extents [-]Number LV"),
        f"{_LV} l|extents=signed_extents f|force* L|size=signed_amount n|nofsck r|resizefs",
        "resize.lvreduce",
    ),
    Verb(
        "lvremove",
        "remove logical volumes",
        ("VG|LV|Tag|Select ...",),
        f"{_LV} f|force* S|select=text nohistory",
        "lv.lvremove",
        least=1,
        selectable=True,
    ),
    Verb(
        "lvrename",
        "rename a logical volume",
        ("VG LV LV_new", "LV LV_new"),
        _LV,
        "lv.lvrename",
        least=2,
        most=3,
    ),
    Verb(
        "lvresize",
        "resize a logical volume",
        ("-L|--size [+|-]Size LV [ PV ... ]", "-l|--extents [+|-]Number LV [ PV ... ]"),
        f"{_LV} alloc=alloc l|extents=signed_extents f|force* i|stripes=number"
        " I|stripesize=kibibytes L|size=signed_amount n|nofsck r|resizefs type=type",
        "resize.lvresize",
    ),
    Verb(
        "lvs",
        "display information about logical volumes",
        ("[ VG|LV|Tag ... ]",),
        f"{_REPORT} segments",
        "reports.lvs",
    ),
    Verb(
        "lvscan",
        "list all logical volumes in all volume groups",
        ("",),
        "a|all b|blockdevice ignorelockingfailure P|partial readonly",
        "display.lvscan",
        most=0,
    ),
    Verb(
        "pvck",
        "check metadata on physical volumes",
        ("PV ...", "--dump headers|metadata|metadata_all|metadata_search PV"),
        "dump=dump f|file=text labelsector=number settings=text pvmetadatacopies=number",
        "pv.pvck",
        least=1,
    ),
    Verb(
        "pvcreate",
        "initialize physical volumes for use by LVM",
        ("PV ...",),
        f"{_NEW_PV} bootloaderareasize=size f|force* metadatacopies=number metadataignore=yn"
        " restorefile=text norestorefile setphysicalvolumesize=size u|uuid=text",
        "pv.pvcreate",
        least=1,
    ),
    Verb(
        "pvdisplay",
        "display various attributes of physical volumes",
        ("[ PV|Tag ... ]",),
        f"{_DISPLAY} s|short",
        "display.pvdisplay",
    ),
    Verb(
        "pvremove",
        "remove LVM labels from physical volumes",
        ("PV ...",),
        "f|force*",
        "pv.pvremove",
        least=1,
    ),
    Verb(
        "pvresize",
        "resize physical volumes",
        ("PV ...",),
        "setphysicalvolumesize=size",
        "pv.pvresize",
        least=1,
    ),
    Verb(
        "pvs",
        "display information about physical volumes",
        ("[ PV|Tag ... ]",),
        f"{_REPORT} segments allpvs",
        "reports.pvs",
    ),
    Verb(
        "pvscan",
        "list all physical volumes",
        ("",),
        "e|exported n|novolumegroup s|short u|uuid ignorelockingfailure cache readonly",
        "display.pvscan",
        most=0,
    ),
    Verb(
        "version",
        "say which LVM this follows",
        ("",),
        "",
        "about.version",
        most=0,
    ),
    Verb(
        "vgcfgbackup",
        "write the metadata of volume groups into files",
        ("[ VG ... ]",),
        "f|file=text foreign ignorelockingfailure readonly reportformat=reportformat",
        "vg.vgcfgbackup",
    ),
    Verb(
        "vgcfgrestore",
        "make the metadata in a file that of a volume group",
        ("-f|--file String VG", "VG", "-l|--list VG", "-l|--list -f|--file String"),
        "f|file=text force* l|list M|metadatatype=text",
        "vg.vgcfgrestore",
        most=1,
        note="Without --file the newest backup is taken: of LVM_SYSTEM_DIR/backup, or else of"
        " XDG_STATE_HOME/cow/lvm/backup (~/.local/state). Older ones are in the archive beside it.",
    ),
    Verb(
        "vgchange",
        "change volume group attributes, or activate logical volumes",
        (
            "-a|--activate y|n|ay [ VG|Tag|Select ... ]",
            "--addtag Tag|--deltag Tag VG|Tag|Select ...",
            "--refresh [ VG|Tag|Select ... ]",
            "-x|--resizeable y|n VG|Tag|Select ...",
        ),
        "a|activate=activation activationmode=text addtag=tag+ alloc=alloc A|autobackup=yn"
        " deltag=tag+ f|force* K|ignoreactivationskip ignorelockingfailure ignoremonitoring"
        " l|logicalvolume=number p|maxphysicalvolumes=number monitor=yn noudevsync P|partial"
        " poll=yn refresh x|resizeable=yn S|select=text setautoactivation=yn sysinit",
        "vg.vgchange",
    ),
    Verb(
        "vgck",
        "check the consistency of volume groups",
        ("[ VG|Tag ... ]", "--updatemetadata VG"),
        "updatemetadata reportformat=reportformat",
        "vg.vgck",
    ),
    Verb(
        "vgcreate",
        "create a volume group",
        ("VG_new PV ...",),
        f"{_NEW_PV} addtag=tag+ alloc=alloc A|autobackup=yn f|force* l|maxlogicalvolumes=number"
        " p|maxphysicalvolumes=number s|physicalextentsize=size setautoactivation=yn",
        "vg.vgcreate",
        least=2,
    ),
    Verb(
        "vgdisplay",
        "display volume group information",
        ("[ VG|Tag ... ]",),
        f"{_DISPLAY} A|activevolumegroups s|short",
        "display.vgdisplay",
    ),
    Verb(
        "vgexport",
        "let nobody use volume groups until they are imported",
        ("VG|Tag|Select ...", "-a|--all"),
        "a|all reportformat=reportformat S|select=text",
        "vg.vgexport",
    ),
    Verb(
        "vgextend",
        "add physical volumes to a volume group",
        ("VG PV ...",),
        f"{_NEW_PV} A|autobackup=yn f|force* metadataignore=yn",
        "vg.vgextend",
        least=2,
    ),
    Verb(
        "vgimport",
        "use volume groups again that were exported",
        ("VG|Tag|Select ...", "-a|--all"),
        "a|all f|force* reportformat=reportformat S|select=text",
        "vg.vgimport",
    ),
    Verb(
        "vgreduce",
        "take physical volumes out of a volume group",
        ("VG PV ...", "-a|--all VG", "--removemissing VG"),
        "a|all A|autobackup=yn removemissing reportformat=reportformat",
        "vg.vgreduce",
        note="An LV on a PV that is missing is never removed: there is no --force.",
    ),
    Verb(
        "vgremove",
        "remove volume groups",
        ("VG|Tag|Select ...",),
        "f|force* noudevsync S|select=text",
        "vg.vgremove",
        least=1,
        selectable=True,
    ),
    Verb(
        "vgrename",
        "rename a volume group",
        ("VG VG_new",),
        "A|autobackup=yn f|force*",
        "vg.vgrename",
        least=2,
        most=2,
    ),
    Verb(
        "vgs",
        "display information about volume groups",
        ("[ VG|Tag ... ]",),
        _REPORT,
        "reports.vgs",
    ),
    Verb(
        "vgscan",
        "search for all volume groups",
        ("",),
        "ignorelockingfailure mknodes cache notifydbus P|partial readonly"
        " reportformat=reportformat",
        "display.vgscan",
        most=0,
    ),
)


def find_verb(name: str) -> Verb | None:
    """Return the verb of that name; a path in front of it, as in /sbin/lvs, does not matter."""
    return next((verb for verb in VERBS if verb.name == name.rpartition("/")[2]), None)


def help_text() -> str:
    """Return what `help` prints."""
    lines = [
        "  Usage: cow lvm [--devices IMAGE,…] VERB [OPTION…] [ARGUMENT…]",
        "",
        "  The verbs; `cow lvm help VERB' tells more about one.",
        "",
    ]
    lines += [f"    {verb.name:<14}{verb.help}" for verb in VERBS]
    return "\n".join(lines) + "\n"


_VALUES: Final = {
    "text": "String", "list": "PV", "number": "Number", "signed_number": "[+|-]Number",
    "size": "Size", "amount": "[+]Size", "signed_amount": "[+|-]Size", "kibibytes": "Size[k]",
    "extents": "Number[%…]", "signed_extents": "[+|-]Number[%…]", "yn": "y|n", "tag": "Tag",
    "activation": "y|n|ay", "alloc": "contiguous|cling|normal|anywhere|inherit",
    "permission": "rw|r", "type": "String", "readahead": "auto|none|Number",
    "reportformat": "basic|json", "configreport": "log|vg|lv|pv|pvseg|seg",
    "dump": "headers|metadata|metadata_all|metadata_search",
}  # fmt: skip


def verb_help(verb: Verb) -> str:
    """Return what `VERB --help` prints: its forms, its options, and a note."""
    lines = [f"  {verb.name} - {verb.help}", ""]
    lines += [f"  {verb.name} {form}".rstrip() for form in verb.syntax]
    lines += ["", "  Options, which may be cut short and stand anywhere:"]
    for option in sorted(read_spec(verb.options), key=lambda each: each.name):
        short = f"-{option.short}|" if option.short else "   "
        value = _VALUES.get(option.kind, option.kind)
        lines.append(f"    {short}--{option.name}{f' {value}' if option.kind else ''}")
    lines += ["", "  A size is in MiB, or has a unit: b s k m g t p e (powers of 1024)."]
    if verb.note:
        lines += ["", f"  {verb.note}"]
    return re.sub(r"[ ]+$", "", "\n".join(lines), flags=re.MULTILINE) + "\n"
