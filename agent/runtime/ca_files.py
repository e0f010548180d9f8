"""The embedded CA on disk: `meshbpf ca init|import|show`, and what `run` loads.

A folder with `root-cert.pem` (the trust bundle), `ca-cert.pem` (the issuing
certificate, then its intermediates) and `ca-key.pem` (0600), named as in
Istio's `cacerts` secret. It may be shared by several agents: nothing in it
is ever written again. Whoever reads the key can be anyone in the mesh, so a
key that others may read is refused rather than used with a warning.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from meshbpf.agent.api import CaInfo, CertificateInfo
from meshbpf.agent.core import ca
from meshbpf.agent.core.ca import CertificateAuthority
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.identity import SpiffeId

ROOTS = "root-cert.pem"
CHAIN = "ca-cert.pem"
KEY = "ca-key.pem"

_MAX_FILE_BYTES = 1024 * 1024
_MODES = {KEY: 0o600, CHAIN: 0o644, ROOTS: 0o644}


def init(directory: Path, trust_domain: str, now: datetime) -> CaInfo:
    """Make a new CA. Raises ConfigError (ca-exists) when the folder holds one."""
    _refuse_existing(directory)
    authority = ca.create(trust_domain, now)
    _write(directory, authority)
    return describe(directory, authority)


def import_files(directory: Path, cert: Path, key: Path, chain: Path | None) -> CaInfo:
    """Copy a CA that exists elsewhere, once it has been checked.

    `cert` is the issuing certificate; `chain` holds its intermediates and
    its root, and may be left out when `cert` is self-signed or has them.
    """
    _refuse_existing(directory)
    chain_pem = _read(chain) if chain is not None else b""
    authority = ca.import_ca(_read(cert), _read(key), chain_pem)
    _write(directory, authority)
    return describe(directory, authority)


def show(directory: Path) -> CaInfo:
    """Describe the CA in a folder. Raises ConfigError as `load` does."""
    return describe(directory, load(directory))


def load(directory: Path) -> CertificateAuthority:
    """The CA in a folder.

    Raises ConfigError: no-ca, ca-key-permissions, ca-unreadable, or bad-ca
    for contents that make no CA.
    """
    missing = [name for name in _MODES if not (directory / name).exists()]
    if missing:
        raise ConfigError(
            "no-ca",
            f"{directory} holds no CA: {' and '.join(sorted(missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            f"make one with `meshbpf ca init {directory}`, "
            "or bring your own with `meshbpf ca import`",
        )
    key_path = directory / KEY
    _check_key(key_path)
    return ca.load(_read(directory / ROOTS), _read(directory / CHAIN), _read(key_path))


def describe(directory: Path, authority: CertificateAuthority) -> CaInfo:
    """What a person wants to know of a CA; nothing of its key."""
    return CaInfo(
        directory=str(directory),
        trust_domain=authority.trust_domain or "",
        issuer=_info(authority.issuer),
        intermediates=tuple(map(_info, authority.chain[1:])),
        roots=tuple(map(_info, authority.roots)),
    )


class EmbeddedIssuer:
    """The certificate store's `Issuer` over a CA in this process."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority
        self._roots_pem = authority.roots_pem

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle."""
        return self._roots_pem

    async def issue(
        self,
        identity: SpiffeId,
        public_key: ec.EllipticCurvePublicKey,
        not_before: datetime,
        not_after: datetime,
    ) -> bytes:
        """A PEM chain, leaf first; takes well under a millisecond with a P-256 CA."""
        await trio.lowlevel.checkpoint()
        return self._authority.issue(identity, public_key, not_before, not_after)


def _refuse_existing(directory: Path) -> None:
    found = sorted(name for name in _MODES if (directory / name).exists())
    if found:
        raise ConfigError(
            "ca-exists",
            f"{directory} holds a CA already ({', '.join(found)})",
            "name another folder; every certificate of a replaced CA would be worth nothing",
        )


def _check_key(path: Path) -> None:
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(
            "ca-key-permissions",
            f"CA key {path} has mode {mode:04o}: others than its owner may use it",
            f"`chmod 600 {path}`, and think of who may have read it",
        )
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            "ca-key-permissions",
            f"CA key {path} belongs to uid {found.st_uid}",
            f"`chown root {path}`",
        )


def _write(directory: Path, authority: CertificateAuthority) -> None:
    contents: Mapping[str, bytes] = {
        KEY: authority.key_pem,
        CHAIN: authority.chain_pem,
        ROOTS: authority.roots_pem,
    }
    written: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in contents.items():
            path = directory / name
            # O_EXCL: of two who make a CA here at the same time, one fails.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(path, flags, _MODES[name])
            written.append(path)
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, _MODES[name])  # whatever the umask
                file.write(content)
                file.flush()
                os.fsync(fd)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(
            "ca-not-written",
            f"CA folder {directory}: {error.strerror}",
            "name a folder on a writable disk that holds no CA",
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError("ca-unreadable", f"{path}: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError("ca-unreadable", f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    return content


def _info(certificate: x509.Certificate) -> CertificateInfo:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        kind = f"EC {key.curve.name}"
    elif isinstance(key, rsa.RSAPublicKey):
        kind = f"RSA {key.key_size}"
    else:
        kind = type(key).__name__
    return CertificateInfo(
        subject=certificate.subject.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key=kind,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )
