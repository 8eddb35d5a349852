"""Servers of an image whose present state is kept: ours, and those of others.

Each is started on images of its own, in the same folder in memory, all through the page cache.
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cow
from suite import fio
from suite.baselines import make_file, stamp, store_size
from suite.devices import CHUNK_SIZE, SECTOR
from suite.memory import use_memory
from suite.processes import Program, call, lacking
from suite.results import COW, LIMIT, PEER, Figures
from suite.scale import Scale

PACKAGE = Path(cow.__file__).parents[1]


@dataclass
class Site:
    """Where a server works: the image that several may read, and a folder of its own."""

    image: Path
    folder: Path
    size: int

    @property
    def socket(self) -> Path:
        return self.folder / "nbd.sock"

    def own_copy(self) -> Path:
        """Return a copy of the image, for a server that writes to it."""
        path = self.folder / "origin.img"
        shutil.copyfile(self.image, path)
        return path


Start = Callable[[Site], tuple[list[str], str]]


@dataclass
class Server:
    """One of those that take part: how it is started, and what is known of it while it runs.

    `start` prepares its images and returns its command line and the name of its export.
    """

    name: str
    role: str
    programs: tuple[str, ...]
    start: Start
    fuse: bool = False
    missing: str = ""
    program: Program | None = None
    engine: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.missing or lacking("fio", *self.programs)

    def open(self, site: Site) -> None:
        """Start it; return when clients get in."""
        words, export = self.start(site)
        environment = {"TMPDIR": str(site.folder), "PYTHONPATH": str(PACKAGE)}
        self.program = Program(words, site.folder / "log", environment)
        if self.fuse:
            file = Path(export)
            self.program.wait_until(lambda: file.exists() and file.stat().st_size == site.size)
            self.engine = ["--ioengine=libaio", "--direct=1", f"--filename={file}"]
        else:
            self.program.wait_until(lambda: answers(site.socket))
            uri = f"nbd+unix:///{export}?socket={site.socket}"
            self.engine = ["--ioengine=nbd", f"--uri={uri}"]

    def run(self, job: fio.Job) -> tuple[float, float]:
        """Run a job; return the cost of one of its unit, and the server's CPU for it."""
        assert self.program is not None
        before = self.program.cpu()
        seconds, count = fio.run(job, self.engine)
        cpu = (self.program.cpu() - before) / count
        scale = job.block if job.unit == "B" else 1
        return seconds / scale, cpu

    def close(self) -> None:
        if self.program is not None:
            self.program.stop()
            self.program = None

    def figures(self) -> Figures:
        """Return figures without a round yet."""
        return Figures(self.name, self.role, missing=self.missing)


def answers(path: Path) -> bool:
    """Tell whether a server listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


# ---------------------------------------------------------------- ours


def cow_words(site: Site, tables: str, *export: str) -> list[str]:
    (site.folder / "tables").write_text(tables)
    words = [sys.executable, "-P", "-m", "cow", "serve", "--durability", "process"]
    words += ["--socket", str(site.folder / "control.sock")]
    return [*words, "--tables", str(site.folder / "tables"), *export]


def cow_tables(site: Site, image: Path, *, origin: bool) -> str:
    """Return tables, as a file of them has them, of a snapshot and perhaps its origin."""
    sectors = site.size // SECTOR
    store = site.folder / "snap.cow"
    make_file(store, store_size(sectors // CHUNK_SIZE, CHUNK_SIZE))
    base = f"base,,,rw,0 {sectors} snapshot-origin {image}\n" if origin else ""
    return f"{base}snap,,,rw,0 {sectors} snapshot {image} {store} P {CHUNK_SIZE}\n"


def cow_origin(site: Site) -> tuple[list[str], str]:
    tables = cow_tables(site, site.own_copy(), origin=True)
    return cow_words(site, tables, "--nbd", f"unix:{site.socket}"), "base"


def cow_snapshot(site: Site) -> tuple[list[str], str]:
    tables = cow_tables(site, site.image, origin=False)
    return cow_words(site, tables, "--nbd", f"unix:{site.socket}"), "snap"


def cow_linear(site: Site) -> tuple[list[str], str]:
    tables = f"linear,,,rw,0 {site.size // SECTOR} linear {site.own_copy()} 0\n"
    return cow_words(site, tables, "--nbd", f"unix:{site.socket}"), "linear"


def cow_fuse(site: Site) -> tuple[list[str], str]:
    mount = site.folder / "mnt"
    mount.mkdir()
    tables = cow_tables(site, site.own_copy(), origin=False)
    return cow_words(site, tables, "--mount", str(mount)), str(mount / "snap")


# ---------------------------------------------------------------- peers


def nbdkit_cow(block: int) -> Start:
    def start(site: Site) -> tuple[list[str], str]:
        words = ["nbdkit", "--foreground", "--unix", str(site.socket), "--filter=cow", "file"]
        return [*words, str(site.image), f"cow-block-size={block}"], ""

    return start


def nbdkit_file(site: Site) -> tuple[list[str], str]:
    words = ["nbdkit", "--foreground", "--unix", str(site.socket), "file"]
    return [*words, str(site.own_copy())], ""


def qcow2(site: Site, options: str) -> Path:
    """Make an overlay over the image."""
    path = site.folder / "overlay.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    error = call([*words, "-b", site.image, "-F", "raw", path])
    assert not error, error
    return path


def qemu_nbd(options: str) -> Start:
    def start(site: Site) -> tuple[list[str], str]:
        words = ["qemu-nbd", "--persistent", "--shared=8", "--cache=writeback", "--format=qcow2"]
        return [*words, f"--socket={site.socket}", str(qcow2(site, options))], ""

    return start


def storage_daemon(*words: str) -> list[str]:
    return ["qemu-storage-daemon", *words]


def before_write(site: Site) -> tuple[list[str], str]:
    """QEMU's filter that copies to another image before a write: what its backups are made of."""
    target = make_file(site.folder / "target.img", site.size)
    words = storage_daemon(
        *("--blockdev", f"driver=file,node-name=origin,filename={site.own_copy()}"),
        *("--blockdev", f"driver=file,node-name=target,filename={target}"),
        *("--blockdev", "driver=copy-before-write,node-name=filter,file=origin,target=target"),
        *("--nbd-server", f"addr.type=unix,addr.path={site.socket},max-connections=16"),
        *("--export", "type=nbd,id=export,node-name=filter,name=base,writable=on"),
    )
    return words, "base"


def storage_daemon_fuse(site: Site) -> tuple[list[str], str]:
    mount = make_file(site.folder / "disk", 0)
    words = storage_daemon(
        *("--blockdev", f"driver=file,node-name=file,filename={qcow2(site, CLUSTERS)}"),
        *("--blockdev", "driver=qcow2,node-name=overlay,file=file"),
        *("--export", f"type=fuse,id=export,node-name=overlay,mountpoint={mount},writable=on"),
    )
    return words, str(mount)


CLUSTERS = "cluster_size=64k"
EXTENDED = "cluster_size=64k,extended_l2=on"  # 32 subclusters in each

COW_SNAPSHOT = "cow, snapshot"
COW_ORIGIN = "cow, origin"


def nbd_servers() -> list[Server]:
    """Return all that take part over NBD, ours first."""
    return [
        Server(COW_SNAPSHOT, COW, (), cow_snapshot),
        Server(COW_ORIGIN, COW, (), cow_origin),
        Server("cow, linear", COW, (), cow_linear),
        Server("nbdkit file, no snapshot", LIMIT, ("nbdkit",), nbdkit_file),
        Server("nbdkit --filter=cow, 4 KiB", PEER, ("nbdkit",), nbdkit_cow(4096)),
        Server("nbdkit --filter=cow, 64 KiB", PEER, ("nbdkit",), nbdkit_cow(65536)),
        Server("qemu-nbd, qcow2", PEER, ("qemu-nbd", "qemu-img"), qemu_nbd(CLUSTERS)),
        Server("qemu-nbd, qcow2 extended L2", PEER, ("qemu-nbd", "qemu-img"), qemu_nbd(EXTENDED)),
        Server("QEMU copy-before-write", PEER, ("qemu-storage-daemon",), before_write),
    ]


def fuse_servers(missing: str, missing_ours: str) -> list[Server]:
    """Return all that take part with FUSE, ours first; and why they, or only ours, do not."""
    programs = ("qemu-storage-daemon", "qemu-img")
    return [
        Server(COW_SNAPSHOT, COW, (), cow_fuse, fuse=True, missing=missing or missing_ours),
        Server("QEMU FUSE, qcow2", PEER, programs, storage_daemon_fuse, True, missing),
    ]


# ---------------------------------------------------------------- all of them on the same jobs


def compete(
    servers: list[Server], jobs: list[fio.Job], folder: Path, scale: Scale
) -> dict[fio.Job, list[Figures]]:
    """Give every job to every server, one after the other, on fresh images in each round."""
    found = {job: {server.name: server.figures() for server in servers} for job in jobs}

    def run(job: fio.Job, server: Server) -> None:
        if job.rw not in ("read", "randread") and not scale.sample:
            use_memory(folder, 2 * job.area[1])  # a copy, and what is written, in whole clusters
        cost, cpu = server.run(job)
        found[job][server.name].costs.append(cost)
        found[job][server.name].cpu.append(cpu)

    running = [server for server in servers if not server.missing]
    for number in range(scale.peer_rounds):
        running = [*running[1:], *running[:1]]  # whoever is first is so once
        image = make_file(folder / f"image{number}", scale.served_size)
        stamp(image)
        try:
            for server in running:
                place = folder / f"round{number}" / slug(server.name)
                place.mkdir(parents=True)
                server.open(Site(image, place, scale.served_size))
            lists = errands(running, jobs, scale.sample)
            with ThreadPoolExecutor(max(1, len(lists))) as pool:
                list(pool.map(lambda errands: [run(*errand) for errand in errands], lists))
        finally:
            for server in running:
                server.close()
            shutil.rmtree(folder / f"round{number}", ignore_errors=True)
            image.unlink()
    for by_name in found.values():
        for figures in by_name.values():
            if not figures.costs:
                figures.missing = figures.missing or "left out of a small run"
    return {job: list(by_name.values()) for job, by_name in found.items()}


def errands(
    servers: list[Server], jobs: list[fio.Job], sample: bool
) -> list[list[tuple[fio.Job, Server]]]:
    """Return who does what when: lists that are gone through at the same time.

    One list where it is measured. For a look whether everything runs each server has its own, with
    some of the jobs.
    """
    if not sample:
        return [[(job, server) for job in jobs for server in servers]]
    count = len(servers)
    return [[(job, server) for job in jobs[n::count]] for n, server in enumerate(servers)]


def slug(name: str) -> str:
    """Return a name for a folder; short, as a socket in it has a path of at most 107 bytes."""
    return "".join(c for c in name if c.isalnum())[-24:]
