"""Make the sample disks of tests/data/lvm that cow cannot make itself, with the real lvm2.

    python tests/kernel/record_lvm_samples.py [SAMPLE …]

Writes SAMPLE_pvN.sectors, as support/lvm.py reads them. What lvm prints of them is recorded as of
all other sessions (record_lvm.py).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import SECTOR  # noqa: E402
from support.lvm import DATA  # noqa: E402

from tests.kernel.record_lvm import CONFIG, SETTINGS, START, shell  # noqa: E402
from tests.kernel.uml import Kernel, missing, scratch  # noqa: E402

SIZE = 24 << 20
"""Bytes of each disk."""
HEAD = "{} sectors; those that are not zero: number, and bytes as in a Python string\n"
SAMPLES = {
    "g_exported": (1, "vgcreate -s 256k vgg DISK1; lvcreate -y -l 3 -n lv vgg; vgchange -an vgg;"
                      " vgexport vgg"),
    "h_mirror": (2, "vgcreate -s 256k vgh DISK1 DISK2;"
                    " lvcreate -y --type mirror -m1 --mirrorlog core -l 8 -n core vgh;"
                    " lvcreate -y --type mirror -m1 --mirrorlog disk --alloc anywhere -l 9 -n disk"
                    " vgh; lvcreate -y -s -l 3 -n snap vgh/core"),
    "i_raid": (3, "vgcreate -s 256k vgi DISK1 DISK2 DISK3;"
                  " lvcreate -y --type raid1 -m1 -l 8 -n one vgi;"
                  " lvcreate -y --type raid5 -i2 -l 8 -n five vgi;"
                  " lvcreate -y --type raid0 -i3 -l 9 -n zero vgi;"
                  " lvcreate -y -l 4 -n lin vgi; lvcreate -y -s -l 2 -n snap vgi/one"),
    "j_cache": (2, "vgcreate -s 256k vgj DISK1 DISK2; lvcreate -y -l 30 -n slow vgj DISK1;"
                   " lvcreate -y --type cache-pool -l 36 -n fast vgj DISK2;"
                   " lvconvert -y --type cache --cachepool vgj/fast vgj/slow;"
                   " lvcreate -y -l 20 -n two vgj DISK1; lvcreate -y -l 34 -n vol vgj DISK1;"
                   " lvconvert -y --type cache --cachevol vgj/vol vgj/two"),
    "k_ignored": (3, "pvcreate --metadatacopies 0 DISK1; pvcreate --metadataignore y DISK2;"
                     " pvcreate --metadatacopies 2 DISK3;"
                     " vgcreate -s 256k vgk DISK1 DISK2 DISK3; lvcreate -y -i3 -l 12 -n lv vgk"),
    "l_kinds": (4, "pvcreate --dataalignment 64k --metadatasize 124k DISK1;"
                   " pvcreate --metadatacopies 0 DISK2 DISK3 DISK4;"
                   " vgcreate -s 64k vgl DISK1 DISK2 DISK3 DISK4;"
                   " lvcreate -y --type thin-pool -L 2m -c 128k -Zn --discards nopassdown -n pool"
                   " vgl DISK1; lvcreate -y -V 3m -T vgl/pool -n thin;"
                   " lvcreate -y -s vgl/thin -n copy; lvcreate -y -s -L 1m -n thick vgl/thin;"
                   " lvcreate -y -L 1m -n ext vgl; lvchange -an vgl/ext; lvchange -p r vgl/ext;"
                   " lvcreate -y -s vgl/ext --thinpool vgl/pool -n based;"
                   " lvcreate -y --type raid1 -m1 --raidintegrity y -L 1m -n sum vgl DISK3 DISK4;"
                   " lvcreate -y --type raid1 -m1 -L 1m -n one vgl DISK1 DISK2;"
                   " lvchange --writemostly DISK2 vgl/one;"
                   " lvcreate -y --type raid5_n -i2 -L 1m -n five vgl;"
                   " lvcreate -y --type raid6 -i3 -L 1m --alloc anywhere -n six vgl;"
                   " lvcreate -y --type raid10 -i2 -m1 -L 1m -n ten vgl;"
                   " lvcreate -y --type raid0_meta -i2 -L 1m -n zero vgl;"
                   " lvcreate -y -L 1m -n slow vgl; lvcreate -y --type cache-pool -L 1m"
                   " --cachemode writeback -n fast vgl;"
                   " lvconvert -y --type cache --cachepool vgl/fast vgl/slow;"
                   " lvcreate -y -s -L 1m -n slowsnap vgl/slow;"
                   " lvcreate -y --type cache-pool -L 1m -n unused vgl;"
                   " lvcreate -y -an -Zn -L 1m -n ws vgl; lvcreate -y -an -Zn -L 4m -n wf vgl;"
                   " lvconvert -y --type writecache --cachevol vgl/wf vgl/ws;"
                   " lvcreate -y --type zero -L 1m -n nil vgl;"
                   " lvcreate -y -s -L 1m -n nils vgl/nil"),
    "m_pvmove": (2, "vgcreate -s 256k vgm DISK1 DISK2; lvcreate -y -L 8m -n org vgm DISK1;"
                    " lvcreate -y -s -L 2m -n snap vgm/org DISK1;"
                    " lvcreate -y -l 3 -n lin vgm DISK1; !PVMOVE DISK1"),
    "n_foreign": (1, "vgcreate -s 256k vgn DISK1; lvcreate -y -l 3 -n lv vgn;"
                     " lvcreate -y -l 3 -p r -n ro vgn; vgchange -an vgn;"
                     " vgchange -y --systemid otherhost vgn"),
}  # fmt: skip
"""Sample: how many disks, and the commands that make it."""
LISTED = ("i_raid", "j_cache", "l_kinds", "m_pvmove")
"""Those whose LVs cannot be run here: only the metadata is kept."""
FIRST_EXTENT = 1 << 20
PVMOVE = """
    {settings} lvm pvmove -i 60 {disk} >/dev/null 2>&1 </dev/null &
    until dmsetup info vgm-pvmove0 >/dev/null 2>&1; do :; done
    kill -9 $!; dmsetup remove_all -f
"""
"""A pvmove that ends before it sees that the copy is done."""
MODULES = """
    cd /usr/lib/uml/modules/$(uname -r)/kernel
    tx=crypto/async_tx md=drivers/md
    for name in crypto/xor lib/raid6/raid6_pq $tx/async_tx $tx/async_memcpy $tx/async_xor \\
        $tx/async_pq $tx/async_raid6_recov $md/dm-log $md/dm-region-hash $md/dm-mirror \\
        $md/dm-bio-prison $md/persistent-data/dm-persistent-data $md/dm-cache $md/dm-cache-smq \\
        $md/md-mod $md/raid0 $md/raid1 $md/raid10 $md/raid456 $md/dm-raid $md/dm-thin-pool \\
        $md/dm-writecache $md/dm-integrity
    do insmod $name.ko; done 2>/dev/null; true
"""
CHECKS = 'global { cache_check_executable = "" thin_check_executable = "" '


def make(kernel: Kernel, folder: Path, sample: str) -> None:
    """Make the disks of a sample and keep their sectors."""
    count, commands = SAMPLES[sample]
    images = {f"pv{n}": folder / f"{sample}_pv{n}.img" for n in range(count)}
    for image in images.values():
        image.write_bytes(b"")
        os.truncate(image, SIZE)
    for number in range(count):
        commands = commands.replace(f"DISK{number + 1}", f"/dev/ubd{chr(ord('b') + number)}")
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    lines = [
        PVMOVE.format(settings=settings, disk=line.split()[1])
        if line.startswith("!PVMOVE")
        else f"{settings} lvm {line}"
        for line in map(str.strip, commands.split(";"))
    ]
    stop = f"{settings} lvm vgchange -an"
    steps = [shell(MODULES), shell(START), *map(shell, lines), shell(stop)]
    for line, answer in zip(steps, kernel.run(images, steps), strict=True):
        assert answer["out"][0] == "0", (shlex.join(line), answer)
    for name, image in images.items():
        disk = image.read_bytes()
        if sample in LISTED:
            disk = disk[:FIRST_EXTENT].ljust(SIZE, b"\0")
        (DATA / f"{sample}_{name}.sectors").write_text(sectors_text(disk))


def sectors_text(disk: bytes) -> str:
    """Return the sectors that are not zero, without the zeros at their ends."""
    lines = [HEAD.format(len(disk) // SECTOR)]
    for at in range(0, len(disk), SECTOR):
        sector = disk[at : at + SECTOR].rstrip(b"\0")
        if sector:
            text = repr(sector)
            lines.append(f"{at // SECTOR} {text[2:-1]}\n")
    return "".join(lines)


def main(names: list[str]) -> None:
    """Make the named samples, or all of them."""
    if reason := missing():
        raise SystemExit(f"no kernel to ask: {reason}")
    with scratch() as folder:
        (folder / "lvm.conf").write_text(CONFIG.replace("global {", CHECKS))
        with Kernel(folder) as kernel:
            for sample in names or SAMPLES:
                make(kernel, folder, sample)
                print(sample, file=sys.stderr)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
