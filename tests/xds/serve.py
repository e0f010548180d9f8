"""The test control plane as a process: resources are files, whose changes it tells.

    python -m tests.xds.serve DIRECTORY CA-DIR HOST PORT

DIRECTORY/resources/TYPE/NAME holds a resource (the name URL-quoted); token and
root are written beside, for the agents. A number in DIRECTORY/churn has so many
pushes a second made up beside: policies of NAMESPACE, as DIRECTORY/churn-of
names it, come, change and go, none of which has to do with anybody.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote, unquote

import trio

from meshbpf.agent import ca_files
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION
from tests.xds import records
from tests.xds.istiod import TOKEN, Istiod, serving

CHURNED = 50
"""Policies that come and go."""
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
            for name in [name for name in known if name not in found and "/churn-" not in name]:
                istiod.drop(url, name)
        await trio.sleep(0.05)


async def churn(istiod: Istiod) -> None:
    """Push policies one by one, as fast as the file says; tell how many in `churned`."""
    told, count = istiod.directory / "churn", 0
    while True:
        rate = float(told.read_text()) if told.exists() else 0.0
        if not rate:
            await trio.sleep(0.05)
            continue
        namespace = (istiod.directory / "churn-of").read_text()
        began = trio.current_time()
        for number in range(round(rate)):
            await trio.sleep_until(began + number / rate)
            name = f"churn-{count % CHURNED}"
            key = f"{namespace}/{name}"
            if count // CHURNED % 3 == 2:
                istiod.drop(AUTHORIZATION, key)
            else:
                who = f"cluster.local/ns/elsewhere/sa/nobody-{count}"
                packed = records.policy(name, who, namespace=namespace, action=1)
                istiod.put(AUTHORIZATION, key, packed)
            count += 1
        (istiod.directory / "churned").write_text(str(count))


async def main(directory: Path, ca_dir: Path, host: str, port: int) -> None:
    istiod = Istiod(directory, ca_files.load(ca_dir), port)
    istiod.token_file.write_text(TOKEN)
    istiod.root_file.write_bytes(istiod.authority.roots_pem)
    async with serving(directory, host=host, istiod=istiod):
        print(json.dumps({"event": "serving"}), flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, istiod)
            nursery.start_soon(churn, istiod)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
