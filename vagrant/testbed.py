"""The two node VMs, as the scenarios use them.

Vagrant is asked once how to reach its machines; everything after that is ssh,
one kept connection a node, since a second of Ruby in front of each command
would be most of the time. Limits are wide: an emulated node takes seconds
for what another takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "vagrant"
PODS: dict[str, dict[str, Any]] = json.loads((HERE / "guest" / "pods.json").read_text())
ECHO, WHOAMI, HBONE = 7001, 7009, 15008
SERVICE = "198.18.9.1"
"""The VIP of shop/db, port 80 is its echo."""

T = TypeVar("T")


class ScenarioError(Exception):
    """A scenario's assertion did not hold, or a command did not do what it was told."""


def expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise ScenarioError(otherwise)


def eventually(what: str, call: Callable[[], T], limit_s: float) -> T:
    """The first true answer of `call`; ScenarioError when none comes in time."""
    deadline = time.monotonic() + limit_s
    while not (answer := call()):
        if time.monotonic() > deadline:
            raise ScenarioError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.5)
    return answer


@dataclass(frozen=True, slots=True)
class Node:
    """One VM."""

    name: str
    ssh_config: Path

    def argv(self, command: str) -> list[str]:
        script = f"sudo -n /bin/bash -c {shlex.quote(command)}"
        return ["ssh", "-F", str(self.ssh_config), self.name, script]

    def try_run(
        self, command: str, *, limit_s: float = 120.0, data: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root, to its end."""
        try:
            return subprocess.run(
                self.argv(command),
                input=data,
                stdin=None if data is not None else subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ScenarioError(f"{self.name}, not within {limit_s:g} s: {command}") from error

    def run(self, command: str, *, limit_s: float = 120.0, data: str | None = None) -> str:
        """The command's output; ScenarioError with what it said when it fails."""
        done = self.try_run(command, limit_s=limit_s, data=data)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise ScenarioError(f"{self.name}, exit {done.returncode}: {command}\n{said}")
        return done.stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command; its standard output is a pipe."""
        return subprocess.Popen(
            self.argv(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def status(self) -> dict[str, Any]:
        """`meshbpf status`, also of an agent that is not ready."""
        done = self.try_run("meshbpf status -o json")
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            said = (done.stdout + done.stderr).strip()
            raise ScenarioError(f"{self.name}: no status: {said}") from error
        return answer

    def ready(self) -> bool:
        return self.try_run("meshbpf status").returncode == 0

    def unit(self, name: str, prop: str) -> str:
        return self.run(f"systemctl show --value --property={prop} {name}").strip()

    def forget(self) -> None:
        """Give up the kept connection, which a rebooting node does not end."""
        argv = ["ssh", "-F", str(self.ssh_config), "-O", "exit", self.name]
        subprocess.run(argv, capture_output=True, timeout=20, check=False)

    def boot_id(self) -> str:
        """Empty while the node cannot be reached."""
        with contextlib.suppress(ScenarioError):
            return self.try_run("cat /proc/sys/kernel/random/boot_id", limit_s=20).stdout.strip()
        return ""


@dataclass(frozen=True, slots=True)
class Testbed:
    """Both nodes, running and provisioned."""

    node1: Node
    node2: Node

    @classmethod
    def find(cls) -> Self:
        """Those that `vagrant up` has left."""
        config = CACHE / "ssh-config"
        script = "cd vagrant; vagrant ssh-config"
        if (CACHE / "box" / "stamp").exists():
            script = f". vagrant/environment; {script}"
        told = subprocess.run(
            ["bash", "-c", script], cwd=HERE.parent, capture_output=True, text=True, timeout=120
        )
        if told.returncode:
            raise ScenarioError(f"no nodes: `make vagrant-up` starts them\n{told.stderr.strip()}")
        kept = f"Host *\n  ControlMaster auto\n  ControlPersist 600\n  ControlPath {CACHE}/%n.ssh\n"
        patience = "  ConnectTimeout 20\n  ServerAliveInterval 10\n  ServerAliveCountMax 6\n"
        config.write_text(told.stdout + kept + patience)
        return cls(Node("node1", config), Node("node2", config))

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.node1, self.node2

    def node_of(self, pod: str) -> Node:
        return self.node1 if PODS[pod]["node"] == "node1" else self.node2

    def in_pod(self, pod: str, command: str) -> str:
        """`command` as a process of the pod's network namespace would run it."""
        netns = f"$(/opt/meshbpf/bin/python3 -I /opt/testbed/pods.py netns {pod})"
        return f"nsenter --net={netns} {command}"

    def call(self, pod: str, address: str, port: int, *, limit_s: float = 20.0) -> dict[str, Any]:
        """Connect from a pod; the client's JSON, with `error` when it failed."""
        command = f"python3 /opt/testbed/client.py {address} {port} --limit {limit_s:g}"
        done = self.node_of(pod).try_run(self.in_pod(pod, command), limit_s=limit_s + 60)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise ScenarioError(f"{pod}: the client said: {done.stdout}{done.stderr}") from error
        return answer

    def expect_echo(self, pod: str, address: str, port: int = ECHO) -> dict[str, Any]:
        answer = self.call(pod, address, port)
        expect("error" not in answer, f"{pod} to {address} port {port}: {answer.get('error')}")
        return answer

    def wait_ready(self, limit_s: float = 120.0) -> None:
        for node in self.nodes:
            eventually(f"the agent of {node.name} is ready", node.ready, limit_s)

    @contextlib.contextmanager
    def traffic(self, pod: str, address: str, port: int) -> Iterator[Traffic]:
        """New connections one after another, from a pod, for the time of the block."""
        command = f"python3 /opt/testbed/client.py {address} {port} --again"
        process = self.node_of(pod).start(self.in_pod(pod, command))
        traffic = Traffic(process)
        try:
            traffic.wait_first()
            yield traffic
        finally:
            self.node_of(pod).try_run("touch /run/testbed-stop")
            try:
                traffic.finish()
            finally:
                self.node_of(pod).try_run("rm -f /run/testbed-stop")


class Traffic:
    """A client that opens connections until it is told to stop, and counts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.report: dict[str, Any] = {}

    def wait_first(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        expect(line == "started\n", f"the client of the traffic said {line!r}")

    def finish(self) -> None:
        try:
            out, _ = self._process.communicate(timeout=90)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise ScenarioError("the client of the traffic does not end") from error
        self.report = json.loads(out)
