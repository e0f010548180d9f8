"""A page for every command, in roff that the formatter accepts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from meshbpf.cli import manpages
from meshbpf.cli.main import COMMANDS


def test_every_command_has_a_page_with_all_its_options(tmp_path: Path) -> None:
    manpages.main(tmp_path)
    verbs = {f"meshbpf-{name}" for name in COMMANDS}
    of_ca = {f"meshbpf-ca-{verb}" for verb in ("init", "import", "show")}
    of_config = {f"meshbpf-config-{verb}" for verb in ("check", "view")}
    of_cni = {f"meshbpf-cni-{verb}" for verb in ("install", "uninstall")}
    pages = {page.stem for page in tmp_path.iterdir()}
    assert pages == {"meshbpf"} | verbs | of_ca | of_config | of_cni
    attach = (tmp_path / "meshbpf-attach.8").read_text()
    for option in ("pod", "netns", "exempt\\-port", "on\\-agent\\-down", "state\\-dir"):
        assert f"\n.B \\-\\-{option}" in attach or f", \\-\\-{option}" in attach
    ca = (tmp_path / "meshbpf-ca.8").read_text()
    assert ".B import\nCopy a CA made elsewhere into a folder." in ca


def test_the_formatter_has_no_complaint(tmp_path: Path) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    manpages.main(tmp_path)
    for page in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            [groff, "-man", "-ww", "-z", str(page)], capture_output=True, text=True, check=True
        )
        assert done.stderr == "", page.name
