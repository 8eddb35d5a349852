"""Certificates for a test: an authority, a server's and a client's, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

CURVE = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split()
USAGE = "keyUsage=critical,digitalSignature,keyEncipherment"


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)


def make_authority(folder: Path) -> Path:
    """Make ca-cert.pem and ca-key.pem; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _openssl(
        *("req", "-x509", *CURVE, "-subj", "/CN=authority"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-keyout", f"{folder}/ca-key.pem", "-out", f"{folder}/ca-cert.pem"),
    )
    return folder


def make_certificate(folder: Path, name: str, *extensions: str) -> None:
    """Make NAME-cert.pem and NAME-key.pem, signed by the authority in the folder."""
    _openssl(
        *("req", "-x509", *CURVE, "-subj", f"/CN={name}"),
        *("-CA", f"{folder}/ca-cert.pem", "-CAkey", f"{folder}/ca-key.pem"),
        *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", USAGE),
        *(word for each in extensions for word in ("-addext", each)),
        *("-keyout", f"{folder}/{name}-key.pem", "-out", f"{folder}/{name}-cert.pem"),
    )


def make_all(folder: Path) -> Path:
    """Make an authority, a server for localhost and a client; return the folder."""
    make_authority(folder)
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    make_certificate(folder, "server", names, "extendedKeyUsage=serverAuth")
    make_certificate(folder, "client", "extendedKeyUsage=clientAuth")
    return folder


def make_revoked(folder: Path) -> None:
    """Make ca-crl.pem, which revokes the client's certificate."""
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = here\n[here]\ndatabase = {folder}/index\ncrlnumber = {folder}/serial\n"
        "default_md = sha256\ndefault_crl_days = 2\n"
    )
    authority = ["-config", f"{folder}/ca.cnf"]
    authority += ["-cert", f"{folder}/ca-cert.pem", "-keyfile", f"{folder}/ca-key.pem"]
    _openssl("ca", *authority, "-revoke", f"{folder}/client-cert.pem")
    _openssl("ca", *authority, "-gencrl", "-out", f"{folder}/ca-crl.pem")
