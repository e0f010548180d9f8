"""The `ca` verbs on real folders, with certificates of openssl's making too."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import pytest
from cryptography import x509

from meshbpf.agent import ca_files
from meshbpf.agent.api import CaInfo, CertificateInfo
from meshbpf.agent.core.errors import ConfigError
from meshbpf.cli.commands.ca import view
from tests.cli.conftest import as_root
from tests.cli.samples import NOW

FILES = {"ca-key.pem": 0o600, "ca-cert.pem": 0o644, "root-cert.pem": 0o644}


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A root and an intermediate CA made by openssl: root.pem, sub.pem, sub.key, leaf.pem."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "ca.cnf").write_text(
        "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
    )
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        folder,
        *("req", "-x509", *curve, "-keyout", "root.key", "-out", "root.pem"),
        *("-days", "30", "-subj", "/CN=foreign root", "-addext", "keyUsage=keyCertSign"),
    )
    openssl(folder, "req", *curve, "-keyout", "sub.key", "-out", "sub.csr", "-subj", "/CN=sub")
    openssl(
        folder,
        *("x509", "-req", "-in", "sub.csr", "-CA", "root.pem", "-CAkey", "root.key"),
        *("-CAcreateserial", "-days", "20", "-extfile", "ca.cnf", "-out", "sub.pem"),
    )
    return folder


def test_init_makes_three_files_with_the_right_modes(meshbpf: Any, tmp_path: Path) -> None:
    ran = meshbpf("ca", "init", tmp_path / "a" / "ca", "--trust-domain", "td.example")
    assert ran.status == 0
    folder = tmp_path / "a" / "ca"
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "td.example" in ran.stdout
    root = x509.load_pem_x509_certificate((folder / "root-cert.pem").read_bytes())
    names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://td.example"]


def test_init_keeps_its_modes_under_any_umask(meshbpf: Any, tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    ran = meshbpf("ca", "init", folder, prefix=("sh", "-c", 'umask 0; exec "$@"', "sh"))
    assert ran.status == 0
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == FILES


def test_show_says_what_init_said(meshbpf: Any, tmp_path: Path) -> None:
    made = meshbpf("ca", "-o", "json", "init", tmp_path / "ca")
    shown = meshbpf("ca", "show", tmp_path / "ca", "-o", "json")
    assert json.loads(made.stdout) == json.loads(shown.stdout)
    assert json.loads(shown.stdout)["trust_domain"] == "cluster.local"
    assert shown.stderr == ""
    assert "KEY" not in (tmp_path / "ca" / "ca-cert.pem").read_text()


@pytest.mark.parametrize("name", FILES)
def test_init_refuses_a_folder_that_holds_any_file_of_a_ca(
    meshbpf: Any, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious")
    ran = meshbpf("ca", "init", tmp_path)
    assert ran.status == 78
    assert f"{tmp_path} holds a CA already ({name})" in ran.stderr
    assert (tmp_path / name).read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_init_does_not_follow_a_link_in_the_key_s_place(meshbpf: Any, tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca" / "ca-key.pem").symlink_to(tmp_path / "elsewhere")
    assert meshbpf("ca", "init", tmp_path / "ca").status == 78
    assert not (tmp_path / "elsewhere").exists()


def test_a_write_that_fails_leaves_no_half_of_a_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def full(fd: int) -> None:
        written.append(fd)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        ca_files.init(tmp_path, "cluster.local", NOW)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_import_takes_certificate_key_and_chain(
    meshbpf: Any, tmp_path: Path, foreign: Path
) -> None:
    ran = meshbpf(
        *("ca", "import", tmp_path / "ca", "--cert", foreign / "sub.pem"),
        *("--key", foreign / "sub.key", "--chain", foreign / "root.pem", "-o", "json"),
    )
    assert ran.status == 0, ran.stderr
    info = json.loads(ran.stdout)
    assert (info["issuer"]["subject"], info["roots"][0]["subject"]) == (
        "CN=sub",
        "CN=foreign root",
    )
    assert info["trust_domain"] == ""
    assert stat.S_IMODE((tmp_path / "ca" / "ca-key.pem").stat().st_mode) == 0o600


def test_import_says_that_the_original_key_is_open_to_others(
    meshbpf: Any, tmp_path: Path, foreign: Path
) -> None:
    (foreign / "root.key").chmod(0o644)
    ran = meshbpf(
        *("ca", "import", tmp_path / "ca", "--cert", foreign / "root.pem"),
        *("--key", foreign / "root.key"),
    )
    assert ran.status == 0, ran.stderr
    assert ran.stderr == (
        f"{foreign}/root.key can be read by others; the copy in {tmp_path}/ca cannot\n"
    )


def test_import_refuses_a_key_of_another_certificate(
    meshbpf: Any, tmp_path: Path, foreign: Path
) -> None:
    ran = meshbpf(
        *("ca", "import", tmp_path / "ca", "--cert", foreign / "root.pem"),
        *("--key", foreign / "sub.key"),
    )
    assert ran.status == 78
    assert "does not belong to the CA certificate" in ran.stderr
    assert not (tmp_path / "ca").exists()


def test_import_refuses_an_intermediate_without_its_root(
    meshbpf: Any, tmp_path: Path, foreign: Path
) -> None:
    ran = meshbpf(
        *("ca", "import", tmp_path / "ca", "--cert", foreign / "sub.pem"),
        *("--key", foreign / "sub.key"),
    )
    assert ran.status == 78
    assert "no root certificate was given" in ran.stderr


def test_import_of_a_missing_file_ends_with_78(meshbpf: Any, tmp_path: Path) -> None:
    ran = meshbpf(
        *("ca", "import", tmp_path / "ca", "--cert", tmp_path / "none"),
        *("--key", tmp_path / "none"),
    )
    assert ran.status == 78
    assert ran.stderr.startswith(f"meshbpf: {tmp_path}/none: No such file or directory\n")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_use_is_refused(meshbpf: Any, tmp_path: Path, mode: int) -> None:
    meshbpf("ca", "init", tmp_path / "ca")
    (tmp_path / "ca" / "ca-key.pem").chmod(mode)
    ran = meshbpf("ca", "show", tmp_path / "ca")
    assert ran.status == 78
    assert f"has mode {mode:04o}: others than its owner may use it" in ran.stderr


def test_a_folder_behind_links_is_read_as_kubernetes_mounts_it(
    meshbpf: Any, tmp_path: Path
) -> None:
    meshbpf("ca", "init", tmp_path / "..data")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for name in FILES:
        (mounted / name).symlink_to(tmp_path / "..data" / name)
    assert meshbpf("ca", "show", mounted).status == 0


def test_a_view_of_a_ca(golden: Any) -> None:
    def certificate(subject: str, days: int) -> CertificateInfo:
        return CertificateInfo(
            subject=subject,
            serial="0a1b",
            not_before=NOW.replace(year=2025),
            not_after=NOW.replace(day=14 + days),
            key="EC secp256r1",
            sha256="5c" * 32,
        )

    info = CaInfo(
        directory="/etc/meshbpf/ca",
        trust_domain="",
        issuer=certificate("CN=node CA", -1),
        intermediates=(certificate("CN=region", 7),),
        roots=(certificate("CN=root", 14), certificate("CN=next root", 16)),
    )
    golden("ca", click.unstyle(view(info, NOW)) + "\n")


WRONG = {
    "ca-without-verb": ("ca",),
    "ca-wrong-verb": ("ca", "shwo", "x"),
    "ca-init-without-dir": ("ca", "init"),
    "ca-init-bad-trust-domain": ("ca", "init", "STATE/x", "--trust-domain", "Not/One"),
    "ca-init-in-a-file": ("ca", "init", "STATE/file/x"),
    "ca-show-none": ("ca", "show", "STATE"),
    "ca-show-none-json": ("ca", "show", "STATE", "-o", "json"),
    "ca-show-no-folder": ("ca", "show", "STATE/none"),
    "ca-import-without-key": ("ca", "import", "STATE/x", "--cert", "y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_the_right_status(fails: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    fails(name, *WRONG[name])


def test_files_that_are_no_certificates_are_named(meshbpf: Any, tmp_path: Path) -> None:
    for file, mode in FILES.items():
        (tmp_path / file).write_text("not PEM")
        (tmp_path / file).chmod(mode)
    ran = meshbpf("ca", "show", tmp_path)
    assert ran.status == 78
    assert ran.stderr.startswith(
        f"meshbpf: {tmp_path}: the root certificates: not PEM certificates"
    )


@as_root
def test_a_ca_of_root_is_closed_to_others(meshbpf: Any, as_nobody: Any) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        closed = Path(folder) / "ca"
        assert meshbpf("ca", "init", closed).status == 0
        behind = meshbpf("ca", "show", closed, prefix=as_nobody)
        closed.chmod(0o755)
        key = meshbpf("ca", "show", closed, prefix=as_nobody)
    assert (behind.status, key.status) == (77, 77)
    assert f"{closed}/ca-key.pem may not be read by uid 65534" in behind.stderr
    assert f"{closed}/ca-key.pem may not be read by uid 65534" in key.stderr
