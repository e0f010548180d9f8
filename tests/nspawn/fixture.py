"""What a node of these tests is made of: its tree, the package, pods and their traffic."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.nspawn.node import CACHE, PACKAGES, ROOT, Node
from tests.nspawn.traffic import Attempt, Report, Stream
from tests.progs.pod import Pod, service, workload
from tests.progs.program import BedError, eventually
from tests.progs.server import ECHO, EXEMPT

WEB, SHOP = (
    Pod(name, name, node=1, index=index, service_account=name, captured=True)
    for index, name in ((10, "web"), (11, "shop"))
)
PODS = (WEB, SHOP)
GATEWAY = "198.18.0.1"
START_LIMIT_S = 60.0

CONFIG = f"""\
node: node1
ca-dir: /etc/meshbpf/ca
local-xds: /etc/meshbpf/mesh.yaml
exempt-ports: [{EXEMPT}]
"""


def tree() -> Path:
    """The root file system of every node, made when missing (a minute)."""
    done = subprocess.run([ROOT / "tools" / "nspawn-tree"], stdout=subprocess.PIPE, check=True)
    return Path(done.stdout.decode().strip())


def packages() -> Path:
    """A folder with the package built from this checkout, made when the sources changed.

    MESHBPF_PACKAGES names a folder with a package to be tested instead.
    """
    if given := os.environ.get("MESHBPF_PACKAGES"):
        return Path(given).resolve()
    digest = hashlib.sha256()
    for name in ("meshbpf", "agent", "bpf", "cli", "packaging", "setup.cfg", "docs"):
        place = ROOT / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    folder = CACHE / f"packages-{digest.hexdigest()[:12]}"
    if not list(folder.glob("*.deb")):
        for old in CACHE.glob("packages-*/*.deb"):
            old.unlink()
            old.parent.rmdir()
        subprocess.run([ROOT / "packaging" / "build", folder], check=True)
    return folder


def main() -> None:
    """Make both beforehand, so that no test has to."""
    print(tree())
    print(packages())


def install(node: Node) -> None:
    """Install the package as a person does."""
    node.shell(f"dpkg -i {PACKAGES}/meshbpf_*.deb")


def configure(node: Node) -> None:
    """A CA, a mesh state with both pods, and the settings that name them."""
    node.run("meshbpf", "ca", "init", "/etc/meshbpf/ca")
    write_mesh(node)
    node.write("/etc/meshbpf/config.yaml", CONFIG)
    node.run("meshbpf", "config", "check")


def write_mesh(node: Node) -> None:
    mesh = {"workloads": list(map(workload, PODS)), "services": list(map(service, PODS))}
    node.write("/etc/meshbpf/mesh.yaml", yaml.safe_dump(mesh))


def make_pods(node: Node) -> None:
    """Two network namespaces with a veth each to the node, as network plugins lay them."""
    node.shell(f"ip address add {GATEWAY}/32 dev lo; sysctl -qw net.ipv4.ip_forward=1")
    for pod in PODS:
        node.shell(
            f"""
            ip netns add {pod.netns}
            ip link add {pod.veth} type veth peer name eth0 netns {pod.netns}
            # No link-local addresses, which come a second later than everything else.
            ip -n {pod.netns} link set eth0 addrgenmode none
            ip link set {pod.veth} addrgenmode none
            ip -n {pod.netns} link set lo up
            ip -n {pod.netns} address add {pod.ipv4}/32 dev eth0
            ip -n {pod.netns} link set eth0 up
            ip -n {pod.netns} route add {GATEWAY} dev eth0
            ip -n {pod.netns} route add default via {GATEWAY} dev eth0
            ip link set {pod.veth} up
            ip route add {pod.ipv4} dev {pod.veth}
            """
        )


def attach(node: Node, pod: Pod, *options: str) -> None:
    node.run("meshbpf", "attach", "--pod", pod.key, "--netns", pod.netns, *options)


def attached(node: Node) -> dict[str, str]:
    """The state of each attached pod, by NS/NAME."""
    listing = json.loads(node.run("meshbpf", "pods", "-o", "json").stdout)
    return {entry["pod"]: entry["state"] for entry in listing["pods"]}


@contextmanager
def server(node: Node, pod: Pod) -> Iterator[None]:
    """The echo servers in a pod, the captured one and the one on the exempt port."""
    log = f"/var/tmp/{pod.name}.log"
    command = f"python3 -m tests.progs.server --only echo,exempt >{log} & cat; kill $!"
    node.write(log, "")
    process = node.start("sh", "-c", command, netns=pod.netns)
    try:
        eventually(f"the server in {pod.name}", lambda: '"ready"' in node.read(log), 10.0)
        yield
    finally:
        process.communicate(timeout=10.0)  # which closes its input


class Traffic:
    """`tests.nspawn.traffic` in the pod web, dialing the pod shop."""

    def __init__(self, node: Node, *options: str) -> None:
        argv = ["python3", "-m", "tests.nspawn.traffic", SHOP.ipv4, str(ECHO), *options]
        self._process = node.start(*argv, netns=WEB.netns)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise BedError("the traffic did not start")

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.communicate(timeout=30.0)

    def finish(self) -> Report:
        """Let every attempt come to its end; what became of each."""
        said, _ = self._process.communicate(timeout=30.0)  # which closes its input
        told = json.loads(said)
        return Report(
            [Stream(**one) for one in told["streams"]],
            [Stream(**one) for one in told["direct"]],
            [Attempt(**one) for one in told["attempts"]],
        )


def dial(node: Node, *, limit_s: float = 5.0) -> str:
    """One echo from web to shop: "ok", or the name of the error."""
    argv = ["python3", "-m", "tests.progs.client", "echo", SHOP.ipv4, str(ECHO)]
    done = node.run(*argv, "--timeout", str(limit_s), netns=WEB.netns, check=False)
    said = json.loads(done.stdout)
    return str(said["error"]).partition(":")[0] if "error" in said else "ok"


def wait_active(node: Node, limit_s: float = START_LIMIT_S) -> None:
    eventually("the service is active", lambda: node.property("ActiveState") == "active", limit_s)


if __name__ == "__main__":
    main()
