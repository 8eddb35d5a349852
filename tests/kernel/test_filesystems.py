"""Real file systems: worked on through cow, checked and mounted by the kernel; and back."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import count

import cow

from .judge import Judge, replayer
from .uml import SBIN, Kernel

SIZES = {"ext4": 64 << 20, "xfs": 304 << 20}
MAKE = {"ext4": ["mke2fs", "-q", "-F", "-t", "ext4"], "xfs": ["mkfs.xfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
OPTIONS = {"ext4": "rw", "xfs": "nouuid"}  # a snapshot has the UUID of its origin
COW_SIZE = 48 << 20
BLOCK = 4096
MOUNT = "/run/mnt"

Tree = dict[str, bytes]
Step = list[Any]


# --- trees of files -----------------------------------------------------------------------------


def random_tree(rng: random.Random, folder: str, count: int) -> Tree:
    """Return files by their paths: many small ones, some larger."""
    return {
        f"{folder}/d{rng.randrange(8)}/f{number}": rng.randbytes(
            rng.choice((0, 100, 3000, 5000, rng.randrange(200_000)))
        )
        for number in range(count)
    }


class Disks:
    """The images of one file system, in the scratch folder, and what is done to them."""

    def __init__(self, judge: Judge, kind: str) -> None:
        self.judge = judge
        self.kind = kind
        self.folder = judge.new_folder()
        self.folder.mkdir()
        self.edits = 0

    def make(self, tree: Tree) -> Path:
        """Make the file system, and let the kernel put a tree on it."""
        image = self.empty("first", SIZES[self.kind])
        tool(*MAKE[self.kind], str(image))
        self.guest({"b": image}, self.edit("@b", tree, []))
        return image

    def empty(self, name: str, size: int = COW_SIZE) -> Path:
        path = self.folder / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def copy(self, image: Path, name: str) -> Path:
        path = self.folder / f"{name}.img"
        subprocess.run(["cp", "--sparse=always", str(image), str(path)], check=True)
        return path

    def write(self, name: str, data: bytes) -> Path:
        """Write an image with holes where the data has zeros."""
        path = self.empty(name, len(data))
        with path.open("r+b") as file:
            for number in np.flatnonzero(blocks(data).any(axis=1)):
                file.seek(int(number) * BLOCK)
                file.write(data[number * BLOCK : (number + 1) * BLOCK])
        return path

    # what the guest does

    def guest(self, images: dict[str, Path], steps: list[Step]) -> list[list[str]]:
        """Run steps on images in the guest; return what its programs print."""
        answers = self.judge.ask(images, steps)
        for step, answer in zip(steps, answers, strict=True):
            assert answer["rc"] == 0, (step, answer)
            assert step[0] != "run" or answer["out"][0] == "0", (step, answer)
        return [
            answer["out"][1].splitlines()
            for step, answer in zip(steps, answers, strict=True)
            if step[:2] == ["run", "sh"]
        ]

    def edit(self, disk: str, more: Tree, gone: list[str]) -> list[Step]:
        """Return steps that mount a disk, write some files, remove others, and unmount it."""
        return [self.mounted(disk), *self.changes(more, gone), ["run", "umount", MOUNT]]

    def mounted(self, disk: str) -> Step:
        return ["run", "mount", "-t", self.kind, "-o", OPTIONS[self.kind], disk, MOUNT]

    def changes(self, more: Tree, gone: list[str]) -> list[Step]:
        """Return steps that write files to the mounted disk and remove others."""
        self.edits += 1
        source = self.folder / f"files{self.edits}"
        source.mkdir()
        for path, data in more.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        inside = f"/run/scratch/{source.relative_to(self.judge.folder)}"
        steps: list[Step] = [["run", "cp", "-r", f"{inside}/.", MOUNT]]
        if gone:
            steps.append(["run", "rm", *(f"{MOUNT}/{path}" for path in gone)])
        return steps

    def look(self, disk: str) -> list[Step]:
        """Return steps that check a disk, list the sums of its files, and check it again."""
        check = ["run", *CHECK[self.kind], disk]
        listing = f"cd {MOUNT} && find . -type f -exec sha256sum {{}} +"
        return [
            self.mounted(disk),
            ["run", "sh", "-c", listing],
            ["run", "umount", MOUNT],
            check,
        ]


def tool(*command: str) -> None:
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": path})


def sums(tree: Tree) -> list[str]:
    """Return what sha256sum says of a tree."""
    return sorted(f"{hashlib.sha256(data).hexdigest()}  ./{path}" for path, data in tree.items())


def edited(tree: Tree, more: Tree, gone: list[str]) -> Tree:
    return {path: data for path, data in (tree | more).items() if path not in gone}


def blocks(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(-1, BLOCK)


def apply_changes(device: cow.Device, before: Path, after: Path, rng: random.Random) -> int:
    """Write the blocks in which two images differ to a device, in any order; return how many."""
    old, new = blocks(before.read_bytes()), blocks(after.read_bytes())
    changed = np.flatnonzero((old != new).any(axis=1)).tolist()
    rng.shuffle(changed)
    for number in changed:
        device.pwrite(new[number].tobytes(), number * BLOCK)
    return len(changed)


# --- stacks -------------------------------------------------------------------------------------


def stack(sectors: int) -> list[Step]:
    return [
        ["create", "base-real", f"0 {sectors} linear @b 0"],
        ["create", "base", f"0 {sectors} snapshot-origin %base-real"],
    ]


def snapshots(sectors: int) -> list[Step]:
    return [
        ["suspend", "base"],
        ["create", "s0", f"0 {sectors} snapshot %base-real @c0 P 8"],
        ["create", "s1", f"0 {sectors} snapshot %base-real @c1 P 32"],
        ["resume", "base"],
    ]


def merge(sectors: int) -> list[Step]:
    return [
        ["suspend", "base"],
        ["remove", "s1"],
        ["reload", "base", f"0 {sectors} snapshot-merge %base-real @c1 P 32"],
        ["resume", "base"],
        ["waitmerge", "base"],
    ]


class Ours:
    """cow on the images."""

    def __init__(self, dm: cow.Mapper, images: dict[str, Path]) -> None:
        self.dm = dm
        self.replayer = replayer(dm, images)

    def run(self, *steps: Step) -> None:
        for step in steps:
            assert isinstance(self.replayer.answer(step), list), step

    def device(self, name: str) -> cow.Device:
        return self.dm.device(name)


@pytest.mark.parametrize("kind", SIZES)
def test_the_kernel_mounts_what_was_worked_on_through_cow(judge, seed, kind):
    rng = random.Random(f"{seed} {kind}")
    disks, sectors = Disks(judge, kind), SIZES[kind] // 512
    first = random_tree(rng, "first", 120)
    origin = disks.make(first)
    edits = [(random_tree(rng, name, 60), rng.sample(sorted(first), 50)) for name in ("base", "s1")]
    after = [disks.copy(origin, f"after{number}") for number in range(2)]
    for image, edit in zip(after, edits, strict=True):
        disks.guest({"b": image}, disks.edit("@b", *edit))

    images = {"b": disks.copy(origin, "b"), "c0": disks.empty("c0"), "c1": disks.empty("c1")}
    with cow.Mapper() as dm:
        ours = Ours(dm, images)
        ours.run(*stack(sectors), *snapshots(sectors))
        assert apply_changes(ours.device("base"), origin, after[0], rng)
        assert apply_changes(ours.device("s1"), origin, after[1], rng)

    seen = disks.guest(
        images,
        [
            *stack(sectors),
            *snapshots(sectors),
            *disks.look("%base"),
            *disks.look("%s0"),
            *disks.look("%s1"),
            *merge(sectors),
            *disks.look("%base"),
            *disks.look("%s0"),
        ],
    )
    trees = [edited(first, *edit) for edit in edits]
    expected = [trees[0], first, trees[1], trees[1], first]
    assert [sorted(lines) for lines in seen] == [sums(tree) for tree in expected]


@pytest.mark.parametrize("kind", SIZES)
def test_cow_reads_and_merges_what_the_kernel_worked_on(judge, seed, kind):
    rng = random.Random(f"{seed} back {kind}")
    disks, sectors = Disks(judge, kind), SIZES[kind] // 512
    first = random_tree(rng, "first", 120)
    images = {"b": disks.make(first), "c0": disks.empty("c0"), "c1": disks.empty("c1")}
    early = (random_tree(rng, "early", 40), rng.sample(sorted(first), 20))
    frozen = edited(first, *early)
    late = [(random_tree(rng, name, 60), rng.sample(sorted(frozen), 50)) for name in ("base", "s1")]
    # The snapshots are taken while the file system is mounted; suspending it makes them whole.
    disks.guest(
        images,
        [
            *stack(sectors),
            disks.mounted("%base"),
            *disks.changes(*early),
            *snapshots(sectors),
            *disks.changes(*late[0]),
            ["run", "umount", MOUNT],
            *disks.edit("%s1", *late[1]),
        ],
    )

    trees = {"base": edited(frozen, *late[0]), "s0": frozen, "s1": edited(frozen, *late[1])}
    with cow.Mapper() as dm:
        ours = Ours(dm, images)
        ours.run(*stack(sectors), *snapshots(sectors))
        for name, tree in trees.items():
            check_export(disks, ours.device(name), tree)
        ours.run(*merge(sectors))
        check_export(disks, ours.device("base"), trees["s1"])
        check_export(disks, ours.device("s0"), frozen)


@pytest.mark.parametrize("kind", SIZES)
def test_cow_serves_what_the_kernel_wrote_until_its_plug_was_pulled(judge, seed, kind):
    rng = random.Random(f"{seed} plug {kind}")
    disks, sectors = Disks(judge, kind), SIZES[kind] // 512
    first = random_tree(rng, "first", 120)
    images = {"b": disks.make(first), "c0": disks.empty("c0"), "c1": disks.empty("c1")}
    late = disks.changes(random_tree(rng, "late", 300), [])
    with Kernel(judge.folder) as kernel:
        steps = [*stack(sectors), disks.mounted("%base"), *snapshots(sectors), ["work", []], *late]
        kernel.start(images, [*steps, ["run", "sync"]])
        kernel.hear("@did 0")
        time.sleep(rng.random() * 0.5)
        kernel.kill()
    count("plugs pulled while the kernel wrote")

    with cow.Mapper() as dm:
        ours = Ours(dm, images)
        ours.run(*stack(sectors), *snapshots(sectors))
        check_export(disks, ours.device("s0"), first)
        assert set(sums(first)) <= set(exported(disks, ours.device("base")))
        ours.run(*merge(sectors))
        check_export(disks, ours.device("base"), first)
        check_export(disks, ours.device("s0"), first)


def check_export(disks: Disks, device: cow.Device, tree: Tree) -> None:
    assert sorted(exported(disks, device)) == sums(tree), device.name


def exported(disks: Disks, device: cow.Device) -> list[str]:
    """Write what a device shows to a plain image, and let the kernel mount and check that."""
    image = disks.write("export", device.pread(device.size, 0))
    return disks.guest({"x": image}, disks.look("@x"))[0]
