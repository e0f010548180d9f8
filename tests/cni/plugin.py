"""The CNI plugin, built from its source and run as a container runtime runs it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.progs.pod import NAMESPACE
from tests.testbed import ROOT

SOURCE = ROOT / "packaging" / "cni" / "meshbpf-cni.c"
FLAGS = ("-static", "-Os", "-Wall", "-Wextra", "-Werror")
PREVIOUS = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "198.18.1.1/32", "interface": 0}],
    "dns": {},
}
LIMIT_S = 60.0


def build(folder: Path) -> Path:
    binary = folder / "meshbpf-cni"
    subprocess.run(["gcc", *FLAGS, "-o", str(binary), str(SOURCE)], check=True)
    return binary


@dataclass(frozen=True, slots=True)
class Done:
    """How one call ended."""

    status: int
    text: str

    @property
    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found


@dataclass(frozen=True, slots=True)
class Plugin:
    """One binary and the socket that its configuration names."""

    binary: Path
    socket: Path

    def config(self, **more: Any) -> dict[str, Any]:
        found = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "type": "meshbpf-cni",
            "socket": str(self.socket),
            "prevResult": PREVIOUS,
        }
        return found | more

    def run(
        self,
        command: str,
        name: str = "",
        netns: str = "",
        container: str = "",
        *,
        namespace: str = NAMESPACE,
        stdin: str | None = None,
        **more: Any,
    ) -> Done:
        """One call; `more` is merged into the configuration."""
        text = json.dumps(self.config(**more), indent=1) if stdin is None else stdin
        arguments = ""
        if name:
            arguments = (
                f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};"
                f"K8S_POD_INFRA_CONTAINER_ID={container}"
            )
        done = subprocess.run(
            [str(self.binary)],
            input=text,
            text=True,
            stdout=subprocess.PIPE,
            timeout=LIMIT_S,
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": container or f"c-{name}",
                "CNI_NETNS": f"/run/netns/{netns}" if netns else "",
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": arguments,
                "CNI_PATH": str(self.binary.parent),
            },
        )
        return Done(done.returncode, done.stdout)
