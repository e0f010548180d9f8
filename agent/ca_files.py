"""The embedded CA on disk: `meshbpf ca init|import|show`, and what `run` loads.

A folder with `root-cert.pem` (the trust bundle), `ca-cert.pem` (the issuing
certificate, then its intermediates) and `ca-key.pem` (0600), named as in
Istio's `cacerts` secret. It may be shared by several agents: nothing in it
is ever written again. Whoever reads the key can be anyone in the mesh, so a
key that others may read is refused rather than used with a warning. Links
are followed on purpose: that is how Kubernetes mounts a secret.

The command and the agent both use it, so there is no trio here.
"""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from meshbpf.agent.api import CaInfo, CertificateInfo
from meshbpf.agent.core import ca
from meshbpf.agent.core.ca import CaError, CertificateAuthority
from meshbpf.agent.core.errors import ConfigError, MeshbpfError, PrivilegeError

ROOTS = "root-cert.pem"
CHAIN = "ca-cert.pem"
KEY = "ca-key.pem"

_MAX_FILE_BYTES = 1024 * 1024
# The key goes first: O_EXCL on it decides who makes the CA when two try at once.
_MODES = {KEY: 0o600, CHAIN: 0o644, ROOTS: 0o644}
NAMES = tuple(_MODES)
"""All files of a CA."""


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
    """Describe the CA in a folder. Raises as `load` does."""
    return describe(directory, load(directory))


def load(directory: Path) -> CertificateAuthority:
    """The CA in a folder.

    Raises PrivilegeError when it may not be read, and ConfigError: no-ca,
    ca-key-permissions, ca-unreadable, or bad-ca for contents that make no CA.
    """
    missing = [name for name in _MODES if not _present(directory / name)]
    if missing:
        raise ConfigError(
            "no-ca",
            f"{directory} holds no CA: {', '.join(sorted(missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            f"make one with `meshbpf ca init {directory}`, "
            "or bring your own with `meshbpf ca import`",
        )
    key = _read(directory / KEY, private=True)
    try:
        return ca.load(_read(directory / ROOTS), _read(directory / CHAIN), key)
    except CaError as error:
        raise CaError(f"{directory}: {error.what}", error.hint) from error


def describe(directory: Path, authority: CertificateAuthority) -> CaInfo:
    """What a person wants to know of a CA; nothing of its key."""
    return CaInfo(
        directory=str(directory),
        trust_domain=authority.trust_domain or "",
        issuer=_info(authority.issuer),
        intermediates=tuple(map(_info, authority.chain[1:])),
        roots=tuple(map(_info, authority.roots)),
    )


def _refuse_existing(directory: Path) -> None:
    found = sorted(name for name in _MODES if _present(directory / name))
    if found:
        raise _exists(directory, ", ".join(found))


def _exists(directory: Path, names: str) -> ConfigError:
    return ConfigError(
        "ca-exists",
        f"{directory} holds a CA already ({names})",
        "name another folder; every certificate of a replaced CA would be worth nothing",
    )


def _present(path: Path) -> bool:
    """Whether there is anything of that name, a broken link too."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    return True


def _check_key(path: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(
            "ca-key-permissions",
            f"CA key {path} has mode {mode:04o}: others than its owner may use it",
            f"it must be 0600: `chmod 600 {path}`, and think of who may have read it",
        )
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            "ca-key-permissions",
            f"CA key {path} belongs to uid {found.st_uid}",
            f"`chown root {path}`",
        )


def _write(directory: Path, authority: CertificateAuthority) -> None:
    """Put the three files there, all or none."""
    contents = {KEY: authority.key_pem, CHAIN: authority.chain_pem, ROOTS: authority.roots_pem}
    written: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, mode in _MODES.items():
            _create(directory / name, contents[name], mode, written)
    except BaseException as error:
        # Also for a key press: half a CA would be refused by every later command.
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError) and directory.is_dir():
            raise _exists(directory, Path(error.filename).name) from error
        if isinstance(error, OSError):
            raise ConfigError(
                "ca-not-written",
                f"CA folder {directory}: {error.strerror}",
                "name a folder on a writable disk that holds no CA",
            ) from error
        raise


def _create(path: Path, content: bytes, mode: int, written: list[Path]) -> None:
    # O_EXCL follows no link and replaces no file.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    written.append(path)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)  # whatever the umask
        file.write(content)
        file.flush()
        os.fsync(fd)


def _read(path: Path, *, private: bool = False) -> bytes:
    """All of a small file; a `private` one is judged by what was opened, not by its name."""
    try:
        with path.open("rb") as file:
            if private:
                _check_key(path, os.fstat(file.fileno()))
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError("ca-unreadable", f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    return content


def _unreadable(path: Path, error: OSError) -> MeshbpfError:
    if isinstance(error, PermissionError):
        return PrivilegeError(
            "ca-unreadable",
            f"{path} may not be read by uid {os.geteuid()}",
            "run the command as root, or as the owner of the CA",
        )
    return ConfigError("ca-unreadable", f"{path}: {error.strerror}")


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
