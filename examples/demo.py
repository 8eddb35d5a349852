"""A snapshot's whole life on a real file system: taken, kept while files change, merged back.

Run by `make demo`. Needs no root and no device-mapper: mke2fs, debugfs and e2fsck (package
e2fsprogs) work on plain files, and `cow` maps them. Everything is made in a temporary folder
that is removed at the end, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import cow

MIB = 1 << 20
BLOCK = 4096
IMAGE_SIZE = 64 * MIB
SECTORS = IMAGE_SIZE // 512
STORE_SIZE = 56 * MIB
SPACE_NEEDED = 512 * MIB
TEXT_FILES = 24
PYTHON_BYTES = 20 * MIB
ROUNDS = 8
MERGE_SECONDS_MAX = 30
SEED = 2

# The file system is cut into pieces that lie in four files, as LVM would place it on four disks.
IMAGES = {
    "disk1.img": 24 * MIB,
    "disk2.img": 17 * MIB,
    "disk3.img": 12 * MIB,
    "disk4.img": 12 * MIB,
}
BASE_REAL_TABLE = """\
0 49152 linear disk1.img 0
49152 32768 linear disk2.img 2048
81920 49152 striped 2 128 disk3.img 0 disk4.img 0"""
BASE_TABLE = f"0 {SECTORS} snapshot-origin base-real"
SNAP_TABLE = f"0 {SECTORS} snapshot base-real snap.cow P 8"
MERGE_TABLE = f"0 {SECTORS} snapshot-merge base-real snap.cow P 8"
LINEAR_TABLE = f"0 {SECTORS} linear base-real 0"
ERROR_TABLE = f"0 {SECTORS} error"

Tree = dict[str, bytes]
"""The files of a file system: path from its root -> sha256 of the contents."""


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


# ---------------------------------------------------------------- what the user sees


def title(text: str) -> None:
    """Print the heading of one part."""
    print(f"\n== {text}", flush=True)


def say(text: str) -> None:
    """Print one line of the story."""
    print(f"   {text}", flush=True)


def typed(*commands: str) -> None:
    """Print commands as the user would type them; lines after a command's first are its input."""
    for command in commands:
        first, *rest = command.splitlines()
        print(f"   $ {first}", *(f"     {line}" for line in rest), sep="\n", flush=True)


def called(*calls: str) -> None:
    """Print what is asked of the mapper, as the user would write it in Python."""
    for call in calls:
        first, *rest = call.splitlines()
        print(f"   >>> {first}", *(f"   ... {line}" for line in rest), sep="\n", flush=True)


class Bar:
    """A progress bar on one line; where the output is not a terminal only its end is printed."""

    WIDTH = 30

    def __init__(self, label: str) -> None:
        self.label = label
        self.live = sys.stdout.isatty()

    def show(self, done: float, note: str = "") -> None:
        """Draw the bar at `done` (0 … 1) with `note` behind it."""
        if self.live or done >= 1:
            filled = round(self.WIDTH * done)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            start, end = ("\r", "\033[K") if self.live else ("", "\n")
            print(f"{start}   {self.label} [{bar}] {done:4.0%}  {note}{end}", end="", flush=True)
            if self.live and done >= 1:
                print(flush=True)


def rate(size: int, seconds: float) -> str:
    """Return the throughput of `size` bytes in `seconds` as text."""
    return f"{size / MIB:.1f} MiB in {seconds * 1e3:.1f} ms, {size / MIB / seconds:,.0f} MiB/s"


# ---------------------------------------------------------------- e2fsprogs


class E2fsprogs:
    """mke2fs, debugfs and e2fsck, wherever they are installed."""

    def __init__(self) -> None:
        folders = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
        self.tools: dict[str, str] = {}
        for name in ("mke2fs", "debugfs", "e2fsck"):
            found = shutil.which(name, path=folders)
            if found is None:
                raise DemoError(
                    f"{name} was found neither in PATH nor in /usr/sbin; "
                    "it is part of the package e2fsprogs (apt-get install e2fsprogs)"
                )
            self.tools[name] = found

    def run(self, name: str, *arguments: str | Path, text: str | None = None) -> str:
        """Run one of the tools and return what it printed; raise DemoError if it fails."""
        done = subprocess.run(
            [self.tools[name], *map(str, arguments)],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
        )
        if done.returncode != 0:
            raise DemoError(f"{name} ended with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def edit(self, image: Path, commands: list[str]) -> None:
        """Let debugfs change the file system in `image`; raise DemoError if it complains."""
        script = "".join(f"{command}\n" for command in commands)
        output = self.run("debugfs", "-w", "-f", "-", image, text=script)
        # debugfs ends with status 0 whatever happened; it echoes commands and reports new inodes.
        for line in output.splitlines():
            if line and not line.startswith(("debugfs", "Allocated inode:")):
                raise DemoError(f"debugfs: {line}")

    def check(self, image: Path) -> str:
        """Return the last line of `e2fsck -fn`; raise DemoError if it finds damage."""
        return self.run("e2fsck", "-fn", image).splitlines()[-1].removeprefix(f"{image}: ")

    def tree(self, image: Path, folder: Path) -> Tree:
        """Return the files in `image`, read by debugfs's rdump into `folder` (made and removed)."""
        folder.mkdir()
        self.run("debugfs", "-R", f'rdump / "{folder}"', image)
        try:
            return tree_of(folder)
        finally:
            shutil.rmtree(folder)


def digest(data: bytes) -> bytes:
    """Return the sha256 of `data`."""
    return hashlib.sha256(data).digest()


def tree_of(folder: Path) -> Tree:
    """Return the regular files below `folder`."""
    return {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def differences(one: Tree, other: Tree) -> list[str]:
    """Return the paths that only one of the trees has, or whose contents differ."""
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


# ---------------------------------------------------------------- the files


WORDS = (
    "sector chunk exception origin store header area target table live inactive device suspend "
    "resume merge handover mapper image snapshot linear striped zero error status event"
).split()


def make_text(rng: random.Random, size: int) -> bytes:
    """Return about `size` bytes of lines of words."""
    lines = []
    while size > 0:
        line = " ".join(rng.choices(WORDS, k=12)).capitalize() + ".\n"
        lines.append(line)
        size -= len(line)
    return "".join(lines).encode()


def fill_folder(folder: Path, rng: random.Random) -> None:
    """Put text files and a part of the Python installation's modules into `folder`."""
    (folder / "text").mkdir(parents=True)
    for number in range(TEXT_FILES):
        path = folder / "text" / f"report{number:02}.txt"
        path.write_bytes(make_text(rng, rng.randint(1, MIB // 2)))
    (folder / "text" / "empty.txt").touch()
    library = Path(sysconfig.get_path("stdlib"))
    left = PYTHON_BYTES
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if "site-packages" in name.parts or not os.access(path, os.R_OK):
            continue
        left -= path.stat().st_size + BLOCK
        if left < 0:
            break
        (folder / "python" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "python" / name)


class Edits:
    """A plan of changes to files, one batch of debugfs commands at a time; `tree` follows it."""

    def __init__(self, rng: random.Random, tree: Tree, scratch: Path) -> None:
        self.rng = rng
        self.tree = dict(tree)
        self.scratch = scratch
        self.rewritten = self.removed = self.added = 0
        self.modules = sorted(path for path in tree if path.startswith("python/"))
        rng.shuffle(self.modules)

    def _put(self, path: str, data: bytes) -> str:
        source = self.scratch / f"new{self.rewritten + self.added}"
        source.write_bytes(data)
        self.tree[path] = digest(data)
        return f'write "{source}" "{path}"'

    def batch(self, number: int) -> list[str]:
        """Rewrite some files in full, remove some and add some; return the commands."""
        commands = []
        for index in range(number, TEXT_FILES, ROUNDS):
            path = f"text/report{index:02}.txt"
            commands += [f'rm "{path}"', self._put(path, make_text(self.rng, MIB // 2))]
            self.rewritten += 1
        for _ in range(len(self.modules) // (ROUNDS - number) // 2):
            path = self.modules.pop()
            if self.rng.random() < 0.3:
                commands.append(f'rm "{path}"')
                del self.tree[path]
                self.removed += 1
            else:
                commands += [f'rm "{path}"', self._put(path, make_text(self.rng, 8 * BLOCK))]
                self.rewritten += 1
        commands.append(f"mkdir added{number}")
        for index in range(4):
            path = f"added{number}/note{index}.txt"
            commands.append(self._put(path, make_text(self.rng, MIB // 8)))
            self.added += 1
        return commands


# ---------------------------------------------------------------- devices


def read_device(device: cow.Device) -> np.ndarray:
    """Return all bytes of `device` as rows of 4 KiB blocks."""
    blocks = np.empty((device.size // BLOCK, BLOCK), np.uint8)
    flat = memoryview(blocks).cast("B")
    for offset in range(0, device.size, MIB):
        device.preadinto(flat[offset : offset + MIB], offset)
    return blocks


def load_blocks(image: Path) -> np.ndarray:
    """Return all bytes of a file as rows of 4 KiB blocks."""
    return np.fromfile(image, np.uint8).reshape(-1, BLOCK)


def usage(status: str) -> tuple[int, int, int]:
    """Return allocated, total and metadata sectors of a snapshot's status line."""
    fields = status.split()
    try:
        allocated, total = fields[3].split("/")
        return int(allocated), int(total), int(fields[4])
    except (IndexError, ValueError):
        raise DemoError(f"the snapshot is lost: {status}") from None


def prove(tools: E2fsprogs, name: str, blocks: np.ndarray, expected: Tree) -> None:
    """Check the file system in `blocks` with e2fsck and compare it file by file with `expected`."""
    image = Path(f"{name}.check")
    blocks.tofile(image)
    say(f"e2fsck -fn  {name}: {tools.check(image)}")
    found = tools.tree(image, Path(f"{name}.files"))
    image.unlink()
    wrong = differences(found, expected)
    if wrong:
        raise DemoError(f"{name}: {len(wrong)} files differ, the first is {wrong[0]}")
    say(f"debugfs     {name}: {len(found)} files read back, every one as expected")


# ---------------------------------------------------------------- the story


def make_file_system(tools: E2fsprogs, rng: random.Random) -> tuple[np.ndarray, Tree]:
    """Make an ext4 image with files in it; return its blocks and its files."""
    title("A file system with real files")
    fill_folder(Path("files"), rng)
    tree = tree_of(Path("files"))
    typed(f"mke2fs -t ext4 -b {BLOCK} -d files ext4.img {IMAGE_SIZE // MIB}M")
    image = Path("ext4.img")
    options = ("-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-d", "files")
    tools.run("mke2fs", *options, image, f"{IMAGE_SIZE // MIB}M")
    size = sum(path.stat().st_size for path in Path("files").rglob("*") if path.is_file())
    say(f"{len(tree)} files, {size / MIB:.1f} MiB: generated text and Python's own modules")
    say(f"e2fsck -fn  ext4.img: {tools.check(image)}")
    blocks = load_blocks(image)
    image.unlink()
    shutil.rmtree("files")
    return blocks, tree


def map_pieces(dm: cow.Mapper, blocks: np.ndarray) -> None:
    """Create base-real over four files and write the file system through it."""
    title("One device over four files")
    say("The file system goes through a table of three targets: its first 24 MiB lie in disk1.img,")
    say("16 MiB in disk2.img (from sector 2048), the last 24 MiB on two stripes of 64 KiB.")
    for name, size in IMAGES.items():
        with open(name, "xb") as file:
            file.truncate(size)
    typed(*(f"truncate -s {size // MIB}M {name}" for name, size in IMAGES.items()))
    called(f'dm.create("base-real", """\n{BASE_REAL_TABLE}\n""")')
    dm.create("base-real", BASE_REAL_TABLE)
    device = dm.device("base-real")
    bar = Bar("write ext4.img to base-real")
    flat = memoryview(blocks).cast("B")
    start = time.perf_counter()
    for offset in range(0, device.size, MIB):
        device.pwrite(flat[offset : offset + MIB], offset)
        elapsed = time.perf_counter() - start
        bar.show((offset + MIB) / device.size, rate(offset + MIB, elapsed))
    device.flush()


def take_snapshot(dm: cow.Mapper) -> None:
    """Put an origin over base-real and a persistent snapshot beside it, as LVM does."""
    title("An origin and a snapshot, LVM's way")
    called(f'dm.create("base", "{BASE_TABLE}")')
    dm.create("base", BASE_TABLE)
    typed(f"truncate -s {STORE_SIZE // MIB}M snap.cow")
    called(
        'dm.suspend("base")',
        f'dm.create("snap", "{SNAP_TABLE}")',
        'dm.resume("base")',
    )
    with open("snap.cow", "xb") as file:
        file.truncate(STORE_SIZE)
    start = time.perf_counter()
    dm.suspend("base")
    dm.create("snap", SNAP_TABLE)
    dm.resume("base")
    say(f"taken in {(time.perf_counter() - start) * 1e3:.2f} ms; status: {dm.status('snap')}")


def rewrite_files(dm: cow.Mapper, tools: E2fsprogs, edits: Edits) -> np.ndarray:
    """Change files on the origin in several rounds; return the origin's blocks as they must be."""
    title("Files change on the origin while the snapshot stands")
    say("Each round: debugfs -w removes, rewrites and adds files; the 4 KiB blocks that changed")
    say("are written to base in one write_many, and each first write saves the old chunk.")
    base = dm.device("base")
    work = Path("work.img")
    before = read_device(base)
    before.tofile(work)
    written = 0
    seconds = 0.0
    for number in range(ROUNDS):
        tools.edit(work, edits.batch(number))
        after = load_blocks(work)
        changed = np.flatnonzero((before.view(np.uint64) != after.view(np.uint64)).any(axis=1))
        data = after[changed]
        start = time.perf_counter()
        base.write_many(changed.astype(np.uint64) * BLOCK, data)
        seconds += time.perf_counter() - start
        written += data.nbytes
        allocated, total, _ = usage(dm.status("snap"))
        full = allocated / total
        say(
            f"round {number + 1}: {len(changed):5} blocks  [{'#' * round(20 * full):.<20}] "
            f"{full:4.0%} full   {dm.status('snap')}"
        )
        before = after
    base.flush()
    work.unlink()
    say(f"{edits.rewritten} files rewritten, {edits.removed} removed, {edits.added} added")
    say(f"write_many with the old chunks saved: {rate(written, seconds)}")
    return before


def prove_both(
    dm: cow.Mapper,
    tools: E2fsprogs,
    old: tuple[np.ndarray, Tree],
    new: tuple[np.ndarray, Tree],
) -> None:
    """Prove that the snapshot is the old file system and the origin the new one."""
    title("The snapshot is the old file system, the origin is the new one")
    for name, (blocks, tree) in {"snap": old, "base": new}.items():
        start = time.perf_counter()
        found = read_device(dm.device(name))
        say(f"read all of {name}: {rate(found.nbytes, time.perf_counter() - start)}")
        if not np.array_equal(found, blocks):
            raise DemoError(f"{name} has other bytes than it must have")
        prove(tools, name, found, tree)
    say(f"{len(differences(old[1], new[1]))} files differ between the two")
    sources = dm.device("snap").extents()
    stored = int(sources["length"][sources["source"] == cow.COW].sum())
    say(f"snap: {stored / MIB:.1f} MiB come from the store, the rest from the origin")


def merge_back(dm: cow.Mapper, old: np.ndarray) -> None:
    """Merge the snapshot into its origin and watch the status until it is done."""
    title("Merging the snapshot back")
    called(
        f'dm.load("base", "{MERGE_TABLE}")',
        'dm.suspend("snap")',
        'dm.suspend("base")',
        'dm.resume("base")',
    )
    allocated, _, metadata = usage(dm.status("snap"))
    chunks = (allocated - metadata) // 8
    dm.load("base", MERGE_TABLE)
    dm.suspend("snap")
    dm.suspend("base")
    start = time.perf_counter()
    dm.resume("base")
    bar = Bar("merge")
    left = chunks
    while left:
        status = dm.status("base")
        allocated, _, metadata = usage(status)
        left = (allocated - metadata) // 8
        done = min(1 - left / chunks, 1.0)
        size = (chunks - left) * BLOCK
        elapsed = time.perf_counter() - start
        bar.show(done, f"{rate(size, elapsed)}   {status}")
        if left and elapsed > MERGE_SECONDS_MAX:
            raise DemoError(f"the merge does not end: {status}")
        time.sleep(0.0005)
    if not np.array_equal(read_device(dm.device("base")), old):
        raise DemoError("the origin has other bytes than the snapshot had")
    called(f'dm.load("snap", "{ERROR_TABLE}")', 'dm.resume("snap")', 'dm.remove("snap")')
    dm.load("snap", ERROR_TABLE)
    dm.resume("snap")
    dm.remove("snap")
    called(f'dm.load("base", "{LINEAR_TABLE}")', 'dm.resume("base")')
    dm.load("base", LINEAR_TABLE)
    dm.resume("base")


def prove_merged(dm: cow.Mapper, tools: E2fsprogs, blocks: np.ndarray, tree: Tree) -> None:
    """Prove that the origin is the old file system again."""
    title("The origin is the old file system again")
    called("print(dm.table())")
    for line in dm.table().splitlines():
        say(line)
    found = read_device(dm.device("base"))
    if not np.array_equal(found, blocks):
        raise DemoError("base has other bytes than before the snapshot")
    say(f"base: all {found.nbytes:,} bytes are what they were before the snapshot")
    prove(tools, "base", found, tree)


def story() -> None:
    """Tell it from the first file to the last proof, in the current folder."""
    tools = E2fsprogs()
    rng = random.Random(SEED)
    Path("scratch").mkdir()
    blocks, tree = make_file_system(tools, rng)
    with cow.Mapper() as dm:
        map_pieces(dm, blocks)
        take_snapshot(dm)
        edits = Edits(rng, tree, Path("scratch"))
        new_blocks = rewrite_files(dm, tools, edits)
        prove_both(dm, tools, (blocks, tree), (new_blocks, edits.tree))
        merge_back(dm, blocks)
        prove_merged(dm, tools, blocks, tree)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder in memory if there is room, else on disk, work in it, remove it in any case."""
    shm = Path("/dev/shm")
    room = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= SPACE_NEEDED
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="cow-demo-", dir=shm if room else None) as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def main() -> int:
    """Run the demo; return its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = time.perf_counter()
    try:
        with temporary_folder() as folder:
            print(f"cow: a snapshot of a real file system, in {folder}")
            story()
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the temporary folder is removed", file=sys.stderr)
        return 128 + signal.SIGINT
    except (DemoError, cow.CowError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"\nAll proofs hold. Done in {seconds:.1f} s; the temporary folder is removed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
