"""Create a cluster's certificates, signed by an authority that only this cluster knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650")


def openssl(*args: str) -> None:
    """Raises RuntimeError with what openssl said."""
    done = subprocess.run(["openssl", *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {' '.join(args)}: {done.stderr.strip()}")


def authority(into: Path) -> None:
    """Writes ca.crt and ca.key, which signs the tokens of service accounts too: a key is a key. Its
    form, and the name kueue-ca, are what Kueue takes for an authority."""
    into.mkdir(mode=0o700)
    openssl("genrsa", "-traditional", "-out", str(into / "ca.key"), "2048")
    extensions = (
        "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
        "subjectAltName=DNS:kueue-ca",
    )
    added = [word for extension in extensions for word in ("-addext", extension)]
    files = ("-key", str(into / "ca.key"), "-out", str(into / "ca.crt"))
    openssl("req", "-x509", "-days", "3650", "-subj", "/CN=test-cluster", *added, *files)


def certificate(into: Path, name: str, subject: str, names: str = "DNS:localhost") -> None:
    """Writes NAME.crt and NAME.key: `subject` is who a client is (its O: the group), `names` what a
    server is called ("IP:127.0.0.1,DNS:localhost"). Each is good for both ends."""
    signed = ("-CA", str(into / "ca.crt"), "-CAkey", str(into / "ca.key"))
    files = ("-keyout", str(into / f"{name}.key"), "-out", str(into / f"{name}.crt"))
    extensions = (
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        "extendedKeyUsage=clientAuth,serverAuth",
        f"subjectAltName={names}",
    )
    added = [word for extension in extensions for word in ("-addext", extension)]
    openssl("req", "-x509", *EC, "-subj", subject, *added, *signed, *files)
