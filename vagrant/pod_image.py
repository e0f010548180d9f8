"""The testbed's container image: one static binary in a docker-archive.

    python -m vagrant.pod_image OUT.tar

There may be no registry to pull from. `ctr images import` takes the file; it
carries two names, one for the sandboxes (pause) and one for the servers.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "guest" / "pod.c"
NAMES = ("meshbpf.local/pause:1", "meshbpf.local/server:1")


def main(output: Path) -> None:
    binary = _compiled()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        _add(archive, "pod", binary, mode=0o755)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": _architecture(),
        "os": "linux",
        "config": {"Entrypoint": ["/pod"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": NAMES, "Layers": ["layer.tar"]}]
    with tarfile.open(output, "w") as archive:
        _add(archive, "layer.tar", layer.getvalue())
        _add(archive, "config.json", json.dumps(config).encode())
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def _compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "pod"
        warnings = ["-Wall", "-Wextra", "-Werror"]
        argv = ["gcc", "-Os", "-static", "-s", *warnings, "-o", str(binary), str(SOURCE)]
        subprocess.run(argv, check=True)
        return binary.read_bytes()


def _architecture() -> str:
    argv = ["dpkg", "--print-architecture"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
