"""`cow serve`: the mapper as a process, in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from cow.cli import OK, Verb
from cow.daemon import systemd
from cow.errors import CowError, CowOSError, InvalidArgument

if TYPE_CHECKING:
    from cow.daemon.server import Export
    from cow.export.nbd_tls import Tls
    from cow.mapper import Mapper

log = logging.getLogger("cow")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="the control socket (default: COW_SOCKET, else cow/control.sock in XDG_RUNTIME_DIR)",
    )
    parser.add_argument("--tables", metavar="FILE", help="create these devices first; - is stdin")
    parser.add_argument(
        "--durability",
        choices=("power", "process"),
        default="power",
        help="what an acknowledged write survives: a power cut (the default), or the process",
    )
    parser.add_argument(
        "--nbd",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="serve the devices over NBD, at unix:PATH or tcp:HOST:PORT; may be repeated",
    )
    parser.add_argument(
        "--tls-certificates",
        metavar="DIR",
        help="use TLS for NBD, with server-cert.pem, server-key.pem and ca-cert.pem of this "
        "directory; over a network there is no NBD without",
    )
    parser.add_argument(
        "--tls",
        choices=("off", "on", "require"),
        help="off: none; on: NBD clients of this machine may do without; require: nobody may "
        "(the default where there are certificates)",
    )
    parser.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="NBD clients show a certificate that ca-cert.pem has signed",
    )
    parser.add_argument(
        "--mount",
        metavar="DIR",
        action="append",
        default=[],
        help="show the devices as files in a directory (FUSE); may be repeated",
    )


def _serve(options: argparse.Namespace) -> int:
    from cow.daemon.server import Server
    from cow.mapper import Mapper

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="cow: %(message)s")
    stopped = _stop_signals()
    tls = _tls(options)
    control, inherited = _take_sockets(options)
    mapper = Mapper(durability=options.durability)
    try:
        server = Server(mapper, options.socket, listening=control)
        exports: list[Export] = []
        try:
            if options.tables:
                _create(mapper, _read_tables(options.tables))
            exports.extend(
                _export("cow.export.nbd", "NbdServer", mapper, address, tls=tls)
                for address in [*inherited, *options.nbd]
            )
            exports.extend(
                _export("cow.export.fuse", "FuseMount", mapper, path) for path in options.mount
            )
            for export in exports:
                export.start()
            server.start()
            log.info("process %d serves %s", os.getpid(), server.path)
            systemd.notify("READY=1")
            os.read(stopped, 1)
            log.info("stopping")
            systemd.notify("STOPPING=1")
        finally:
            server.stop()
            _stop_exports(exports)
            _flush(mapper)
    finally:
        mapper.close()
    return OK


def _stop_signals() -> int:
    """Return a pipe that SIGTERM and SIGINT write to. A second one ends the process at once.

    Whichever thread the signal goes to writes, so that the main thread wakes up in any case.
    """
    stopped, stop = os.pipe()
    os.set_blocking(stop, False)
    signal.set_wakeup_fd(stop)

    def handler(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return stopped


def _read_tables(path: str) -> str:
    """Read --concise text, a device a line if one likes; lines that begin with # are skipped."""
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin if path == "-" else stack.enter_context(open(path, encoding="utf-8"))
            lines = [line.strip("\n") for line in file]
    except OSError as error:
        raise CowOSError(f"{path}: {error.strerror}", error.errno) from error
    except UnicodeDecodeError as error:
        raise CowOSError(f"{path}: not UTF-8 text") from error
    entries = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return ";".join(line.removesuffix(";") for line in entries)


def _create(mapper: Mapper, text: str) -> None:
    """Make the devices of a --concise text; one whose table is empty has none."""
    from cow.table import parse_concise

    for entry in parse_concise(text):
        mapper.create(
            entry.name,
            entry.table or None,
            uuid=entry.uuid or None,
            readonly=bool(entry.readonly),
            minor=entry.minor,
        )


def _tls(options: argparse.Namespace) -> Tls | None:
    """Return what the options about TLS say; None where there is none."""
    mode, directory = options.tls, options.tls_certificates
    if mode == "off" or (mode is None and directory is None):
        if options.tls_verify_peer:
            raise InvalidArgument("--tls-verify-peer needs --tls-certificates, and TLS")
        return None
    if directory is None:
        raise InvalidArgument(f"--tls={mode} needs --tls-certificates")
    from cow.export.nbd_tls import Tls

    return Tls(directory, required=mode != "on", verify_peer=options.tls_verify_peer)


def _take_sockets(
    options: argparse.Namespace,
) -> tuple[socket.socket | None, list[socket.socket]]:
    """Return the control socket and the NBD sockets that systemd listens at for us."""
    found = systemd.take_sockets()
    control = [each for name, each in found if name == "control"]
    if len(control) > 1:
        raise InvalidArgument("LISTEN_FDNAMES: more than one control socket")
    if control and options.socket:
        raise InvalidArgument(f"{options.socket}: there is a control socket from systemd already")
    return control[0] if control else None, [each for name, each in found if name != "control"]


def _export(
    module: str,
    name: str,
    mapper: Mapper,
    where: str | socket.socket,
    **settings: Any,  # noqa: ANN401
) -> Export:
    try:
        made: Export = getattr(importlib.import_module(module), name)(mapper, where, **settings)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise CowError(f"{where}: this version has no {module}") from error
        raise CowError(f"{where}: needs the Python module {error.name}") from error
    log.info("serving the devices at %s", getattr(made, "address", where))
    return made


def _stop_exports(exports: list[Export]) -> None:
    """Stop all at once. One whose clients wait for a suspended device is not waited for."""
    from cow.daemon.server import STOP_SECONDS

    threads = [threading.Thread(target=_stop_export, args=(e,), daemon=True) for e in exports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            log.warning("an export still waits for its clients; they lose their devices")


def _stop_export(export: Export) -> None:
    try:
        export.stop()
    except Exception:
        log.exception("an export did not stop cleanly")


def _flush(mapper: Mapper) -> None:
    for name in mapper.names():
        info = mapper.info(name)
        if info.live and not info.suspended:
            try:
                mapper.device(name).flush()
            except CowError as error:
                log.warning("%s: flush: %s", name, error)


EPILOG = """\
Runs in the foreground until SIGTERM or SIGINT; then what was asked is answered, the exports are
drained, the devices flushed. `cow dm` speaks to it. FILE holds a line for each device, as
`cow dm table --concise --names` prints them: NAME,UUID,MINOR,FLAGS,TABLE[,TABLE…]; sizes in
tables are in sectors.
"""

VERB = Verb("serve", "serve devices to other programs", _add_arguments, _serve, EPILOG)
