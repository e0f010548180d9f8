"""HBONE clients that nobody here wrote the protocol of: node's http2 and Go's x/net/http2.

Each is a small program of ours around a library of theirs, with one way to be
called. Programs that have to be built are built into .cache/, once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.peers.certs import Credentials
from tests.progs.inside import NETNS_DIR
from tests.progs.program import BedError

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
CALL_LIMIT_S = 20.0
BUILD_LIMIT_S = 300.0  # a toolchain without compiled packages compiles crypto/tls first


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client saw: how it went, as it said, and the bytes that came back."""

    status: int | None
    peer: str | None
    alpn: str | None
    stage: str | None
    error: str | None
    received: bytes


@dataclass(frozen=True, slots=True)
class Http2Client:
    """A program that opens one HBONE tunnel, from whatever namespace it is put in."""

    name: str
    argv: tuple[str, ...]

    def ask(
        self,
        netns: str,
        address: str,
        authority: str,
        *,
        root: Path,
        credentials: Credentials | None,
        send: bytes = b"",
        method: str = "CONNECT",
        port: int = 15008,
    ) -> Answer:
        """Open the tunnel, send, end, and read all; BedError when the program itself fails."""
        if self.name == "go":
            where = [f"[{address}]:{port}" if ":" in address else f"{address}:{port}"]
        else:
            where = [address, str(port)]
        files = [str(credentials.cert), str(credentials.key)] if credentials else []
        argv = [*self.argv, *where, authority, method, str(root), *files]
        done = subprocess.run(
            ["nsenter", f"--net={NETNS_DIR / netns}", *argv],
            input=send,
            capture_output=True,
            timeout=CALL_LIMIT_S,
            check=False,
        )
        try:
            said: dict[str, Any] = json.loads(done.stderr)
        except ValueError as error:
            raise BedError(f"{self.name}: {done.stderr.decode()}") from error
        if said.get("stage") == "arguments":
            raise BedError(f"{self.name}: {said['error']}")
        fields = {key: said.get(key) for key in ("status", "peer", "alpn", "stage", "error")}
        return Answer(**fields, received=done.stdout)


def node_client() -> Http2Client | None:
    """None when there is no node on this machine."""
    if not (node := shutil.which("node")):
        return None
    return Http2Client("node", (node, str(HERE / "http2_client.mjs")))


def go_client() -> Http2Client | None:
    """None when there is no Go on this machine; BedError when the build fails."""
    if not (go := shutil.which("go")):
        return None
    program = CACHE / "goclient"
    _build([go, "build", "-o", str(program), "."], HERE / "goclient")
    return Http2Client("go", (str(program),))


def _build(argv: Sequence[str], directory: Path) -> None:
    CACHE.mkdir(exist_ok=True)
    done = subprocess.run(
        argv,
        cwd=directory,
        # Go keeps its caches below HOME, which a service or a container may lack.
        env={"HOME": str(CACHE), **os.environ},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise BedError(f"{' '.join(argv)}:\n{done.stderr}")
