"""The test image: one static program, in an archive that needs no registry and no daemon.

The format is Docker's image archive (`docker save`): a layer, a configuration
that names the layer by its digest, and a manifest that names both.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

IMAGE = "meshbpf.test/app:1"
SOURCE = Path(__file__).with_name("app.c")


def build(directory: Path) -> Path:
    """Compile the program and write `app.tar` into `directory`; the archive's path."""
    program = directory / "app"
    subprocess.run(
        ["gcc", "-static", "-Os", "-s", "-Wall", "-Werror", "-o", str(program), str(SOURCE)],
        check=True,
    )
    layer = _tar({"app": program.read_bytes()}, mode=0o755)
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/app"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_digest(layer)}"]},
        }
    ).encode()
    name = f"{_digest(configuration)}.json"
    manifest = [{"Config": name, "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    archive = directory / "app.tar"
    archive.write_bytes(
        _tar(
            {
                name: configuration,
                "layer.tar": layer,
                "manifest.json": json.dumps(manifest).encode(),
            }
        )
    )
    return archive


def _tar(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
