"""The test control plane as a process: resources are files, whose changes it tells.

    python -m tests.xds.serve DIRECTORY CA-DIR HOST PORT

DIRECTORY/resources/TYPE/NAME holds a resource (the name URL-quoted); token and
root are written beside, for the agents.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote, unquote

import trio

from meshbpf.agent import ca_files
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION
from tests.xds.istiod import TOKEN, Istiod, serving

FOLDERS = {"address": ADDRESS, "authorization": AUTHORIZATION}


def path_of(directory: Path, kind: str, name: str) -> Path:
    return directory / "resources" / kind / quote(name, safe="")


def write(directory: Path, kind: str, name: str, payload: bytes) -> None:
    """Create or change a resource, in one step."""
    path = path_of(directory, kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory / "fresh"
    fresh.write_bytes(payload)
    fresh.replace(path)


async def follow(istiod: Istiod) -> None:
    """Take over what changed in the files, again and again."""
    while True:
        for kind, url in FOLDERS.items():
            known = istiod.resources[url]
            files = (istiod.directory / "resources" / kind).glob("*")
            found = {unquote(path.name): path.read_bytes() for path in files}
            for name, payload in found.items():
                if known.get(name) != payload:
                    istiod.put(url, name, payload)
            for name in [name for name in known if name not in found]:
                istiod.drop(url, name)
        await trio.sleep(0.05)


async def main(directory: Path, ca_dir: Path, host: str, port: int) -> None:
    istiod = Istiod(directory, ca_files.load(ca_dir), port)
    istiod.token_file.write_text(TOKEN)
    istiod.root_file.write_bytes(istiod.authority.roots_pem)
    async with serving(directory, host=host, istiod=istiod):
        print(json.dumps({"event": "serving"}), flush=True)
        await follow(istiod)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
