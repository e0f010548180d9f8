"""Two nodes with pods and agents, made of network namespaces on this machine.

    with Testbed("tb") as bed:
        bed.start_agents()
        bed.attach_all()
        bed.client(bed["n1a"], "echo", bed["n2a"].ipv4, ECHO)

What a node is: a netns `TAG-node1` with a veth `trunk` to the other node, a
route to the other's pods, and one veth for each of its own. What a pod is: a
netns whose `eth0` has one /32 and one /128 address and a default route to its
node, as Kubernetes' usual network plugins lay it. Pods n1a, n1b, n2a and n2b
are to be captured, n1x and n2x are not. Nodes share the machine's mount
namespace on purpose: they are entered with nsenter, since `ip netns exec`
would give each command a /sys of its own, in which pins die with the process.

Nothing survives a testbed: everything it makes is named by its tag or written
down below RUN_DIR, so that a sweep removes also what a killed run has left.
A tag is used by one testbed at a time (a lock sees to it); tags coexist.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import yaml

from meshbpf.agent.api import (
    ConnectionInfo,
    ConnectionsRequest,
    PodsRequest,
    ReloadRequest,
    ReloadResult,
    Request,
    StatusRequest,
)
from meshbpf.agent.api_client import call
from meshbpf.agent.core.address import SocketAddress
from tests.progs.inside import NETNS_DIR, socket_inside, sysctl_inside
from tests.progs.kube_objects import mesh_objects
from tests.progs.pod import NAMESPACE, TRUST_DOMAIN, Family, Pod, mesh_of, node_address
from tests.progs.program import Adopted, BedError, Program, end_recorded, eventually, run_inside

ROOT = Path(__file__).resolve().parent.parent
RUN_DIR = Path("/run/meshbpf-testbed")
PINS_DIR = Path("/sys/fs/bpf/meshbpf")
# The suite's tags begin so: two people may run it on one machine at once.
SUITE_TAG = os.environ.get("MESHBPF_TESTBED_TAG", "tb")
MESHBPF = Path(sys.prefix) / "bin" / "meshbpf"
BYTECODE_DIR = ROOT / ".cache" / "testbed" / "bpf"
READY_LIMIT_S = 60.0  # a cold start compiles the BPF programs first
CLI_LIMIT_S = 30.0

R = TypeVar("R")


class Agent:
    """One `meshbpf run` in a node's netns; options of `run` may differ at each start."""

    def __init__(self, bed: Testbed, node: int) -> None:
        self.bed, self.node = bed, node
        self.netns = bed.node_netns(node)
        self.state_dir = bed.directory / f"node{node}"
        self.options: tuple[str, ...] = ()
        self._program: Program | Adopted | None = None
        self._replaced: list[Program | Adopted] = []

    @property
    def program(self) -> Program | Adopted:
        if self._program is None:
            raise BedError(f"the agent of node{self.node} was never started")
        return self._program

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def running(self) -> bool:
        return self._program is not None and self._program.running

    def start(self, *options: str) -> None:
        """Run it; returns when it says that it is ready."""
        self.launch(*options)
        self.wait_ready()

    def launch(self, *options: str) -> None:
        """Run it and return at once."""
        if self.running:
            raise BedError(f"the agent of node{self.node} runs already")
        self.options = options
        copy_bytecode(BYTECODE_DIR, self.state_dir / "cache")
        argv = [*self.bed.environment(self.node), str(MESHBPF), "run", "--node", f"node{self.node}"]
        argv += ["--state-dir", str(self.state_dir)]
        # Ten times shorter than the default: most tests leave connections behind.
        argv += ["--termination-deadline", "500ms"]
        argv += [*self.bed.ca_options, *self.bed.state_options, *options]
        self._program = Program(self.bed.directory, f"agent{self.node}", self.netns, argv)

    def wait_ready(self, limit_s: float = READY_LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while self.cli("status", check=False).returncode:
            if not self.running:
                raise BedError(f"the agent of node{self.node} ended:\n{self.program.tail()}")
            if time.monotonic() > deadline:
                raise BedError(f"node{self.node} not ready in {limit_s} s:\n{self.program.tail()}")
            time.sleep(0.1)
        copy_bytecode(self.state_dir / "cache", BYTECODE_DIR)

    def cli(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`meshbpf --state-dir DIR argv...` in the node; BedError when it fails."""
        command = [str(MESHBPF), "--state-dir", str(self.state_dir), *argv]
        return self.bed.run(self.netns, command, check=check, limit_s=CLI_LIMIT_S)

    def ask(self, request: Request[R]) -> R:
        """The same question without a process, for those who ask often."""
        return call(self.state_dir, request, timeout_s=10.0)

    def carried(self, client: str = "", port: int = 0) -> list[ConnectionInfo]:
        """The connections it carries, of the client with this address and port (0: any).

        The agent of the destination knows the port of a plaintext client only:
        an HBONE tunnel does not keep it.
        """
        found = self.ask(ConnectionsRequest()).connections
        ends = [(one, SocketAddress.parse(one.source)) for one in found]
        return [
            one
            for one, source in ends
            if client in ("", str(source.ip)) and port in (0, source.port)
        ]

    def pod_state(self, key: str) -> str:
        """What it says of the pod NS/NAME: attached, failed, or unknown."""
        for pod in self.ask(PodsRequest()).pods:
            if pod.pod == key:
                return pod.state
        return "unknown"

    def attach(self, pod: Pod, *options: str) -> None:
        self.cli("attach", "--pod", pod.key, "--netns", pod.netns, *options)

    def detach(self, pod: Pod) -> None:
        self.cli("detach", "--pod", pod.key)

    def kill9(self) -> None:
        self.program.end(signal.SIGKILL)

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """Killed for the time of the block, then started again with the same options."""
        self.kill9()
        try:
            yield
        finally:
            self.start(*self.options)

    def stop(self) -> int:
        return self.program.end(signal.SIGTERM)

    def reload(self) -> ReloadResult:
        """Have it replaced by a new one; the old one ends with its last connection."""
        done = call(self.state_dir, ReloadRequest(), timeout_s=120.0)
        assert done.predecessor == self.pid
        self.adopt(done.pid)
        return done

    def adopt(self, pid: int) -> None:
        """This process has replaced the one that we know."""
        old = self.program
        self._replaced.append(old)
        self._program = Adopted(self.bed.directory, pid, old.log)

    def predecessors(self) -> list[int]:
        """The processes that a reload has replaced and that are still there."""
        return [program.pid for program in self._replaced if program.running]

    def end_predecessors(self) -> None:
        """At once; nothing of an earlier test is to be carried on."""
        for program in self._replaced:
            program.end()

    def restart(self) -> None:
        """An orderly stop and a start with the same options."""
        self.stop()
        self.start(*self.options)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Stopped as by SIGSTOP, for the time of the block; its heart beats again after it."""
        self.program.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.program.send(signal.SIGCONT)
        eventually("its heart beats", lambda: self.ask(StatusRequest()).heartbeat.beating)

    def agent_id(self) -> str:
        """The name of this agent's folder of pins."""
        return (self.state_dir / "agent-id").read_text().strip()


def remove_empty_pins() -> None:
    """The folder of all agents' pins goes with the last of them, as after a removal."""
    with contextlib.suppress(OSError):  # others have pins there, or it is gone
        PINS_DIR.rmdir()


class Testbed:
    """The namespaces, addresses, mesh file, CA and processes of one tag."""

    __test__ = False  # pytest collects classes named Test*
    live: set[Testbed] = set()  # noqa: RUF012 - the one registry, for failure reports

    def __init__(self, tag: str = "tb", *, manifests: bool = False) -> None:
        """With `manifests` the agents read Kubernetes objects in place of the mesh file."""
        if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", tag):
            raise BedError(f"a tag is one to sixteen letters and digits, not {tag!r}")
        self.tag = tag
        self.directory = RUN_DIR / tag
        self.mesh_file = self.directory / "mesh.yaml"
        self.state_options: tuple[str, ...] = ("--local-xds", str(self.mesh_file))
        if manifests:
            self.mesh_file = self.directory / "manifests" / "mesh.yaml"
            self.state_options = ("--manifests", str(self.mesh_file.parent))
        self.manifests = manifests
        self.ca_dir = self.directory / "ca"
        self.ca_options: tuple[str, ...] = ("--ca-dir", str(self.ca_dir))
        self.pods: dict[str, Pod] = {}
        self.policies: list[dict[str, Any]] = []
        # A workload in the mesh file whose packets vanish: who dials it waits.
        self.gone = Pod("gone", "", 2, 250, "gone", captured=True)
        self.servers: dict[str, Program] = {}
        self.agents = {1: Agent(self, 1), 2: Agent(self, 2)}
        self._lock: int | None = None
        self._record = threading.Lock()

    # --- life ---------------------------------------------------------------

    def __enter__(self) -> Self:
        self._lock = _lock(RUN_DIR / f"{self.tag}.lock")
        try:
            self._sweep()
            self._build()
        except BaseException:
            self.close()
            raise
        Testbed.live.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is not None and kind is not KeyboardInterrupt:
            print(self.report(), file=sys.stderr)
        self.close()

    def close(self) -> None:
        """End every process and remove every trace; a second Ctrl-C does not cut it short."""
        with _no_interrupts():
            Testbed.live.discard(self)
            for agent in self.agents.values():
                if agent.running:
                    agent.program.send(signal.SIGCONT)
                    agent.stop()
                agent.end_predecessors()
            for program in self.servers.values():
                program.end()
            self._sweep()
            if not Testbed.live:
                remove_empty_pins()
            if self._lock is not None:
                (RUN_DIR / f"{self.tag}.lock").unlink()
                os.close(self._lock)
                self._lock = None

    def report(self) -> str:
        """The ends of the agents' logs, for whoever reads a failure."""
        return "\n".join(
            f"--- {agent.netns}: {agent.program.log}\n{agent.program.tail()}"
            for agent in self.agents.values()
            if agent._program is not None
        )

    def _sweep(self) -> None:
        """Remove what this tag has left: processes, namespaces, pins, files."""
        end_recorded(self.directory)
        for agent_id in self.directory.glob("node*/agent-id"):
            shutil.rmtree(PINS_DIR / agent_id.read_text().strip(), ignore_errors=True)
        for path in NETNS_DIR.glob(f"{self.tag}-*"):
            subprocess.run(["ip", "netns", "delete", path.name], check=True)
        if self.cgroup.exists():
            self.cgroup.rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _build(self) -> None:
        self.directory.mkdir(mode=0o700)
        for node in (1, 2):
            self._make_netns(self.node_netns(node))
            sysctl_inside(self.node_netns(node), ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        first, second = self.node_netns(1), self.node_netns(2)
        _ip(first, [f"link add trunk type veth peer name trunk netns {second}"])
        for node, other in ((1, 2), (2, 1)):
            commands = ["link set trunk up"]
            families: tuple[tuple[Family, int, str], ...]
            families = ((4, 24, "198.18.{}.0/24"), (6, 64, "fd00:6d62:{}::/64"))
            for family, prefix, pods in families:
                here, there = node_address(node, family), node_address(other, family)
                nodad = "nodad" if family == 6 else ""
                commands.append(f"address add {here}/{prefix} dev trunk {nodad}")
                commands.append(f"route add {pods.format(other)} via {there} dev trunk")
            _ip(self.node_netns(node), commands)
        for node in (1, 2):
            # n1a and n1b share an account: two callers that only their address tells apart.
            shared = "shop" if node == 1 else "stock"
            self.make_pod(f"n{node}a", node, shared, captured=True)
            self.make_pod(f"n{node}b", node, "shop" if node == 1 else "billing", captured=True)
            self.make_pod(f"n{node}x", node, "legacy", captured=False)
        for address in (self.gone.ipv4, self.gone.ipv6):
            _ip(second, [f"route add blackhole {address}"])
        self.write_mesh()

    # --- topology -----------------------------------------------------------

    def __getitem__(self, name: str) -> Pod:
        return self.pods[name]

    @property
    def captured(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.captured]

    @property
    def cgroup(self) -> Path:
        """A cgroup v2 of this testbed's own, for a process that plays kubelet."""
        return cgroup2_root() / f"meshbpf-testbed-{self.tag}"

    def node_netns(self, node: int) -> str:
        return f"{self.tag}-node{node}"

    def running_agents(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.running]

    def agent_of(self, pod: Pod) -> Agent:
        return self.agents[pod.node]

    def add_pod(self, name: str, node: int, account: str = "spare", captured: bool = True) -> Pod:
        """One more pod, which the agents' mesh file names too."""
        pod = self.make_pod(name, node, account, captured)
        self.write_mesh()
        return pod

    def remove_pod(self, pod: Pod) -> None:
        self.pods.pop(pod.name)
        if program := self.servers.pop(pod.name, None):
            program.end()
        self.remove_namespaces(pod)
        self.write_mesh()

    def remove_namespaces(self, pod: Pod) -> None:
        """The pod's end, as the agents will notice by themselves."""
        _ip(self.node_netns(pod.node), [f"link delete {pod.veth}"])
        subprocess.run(["ip", "netns", "delete", pod.netns], check=True)

    def _make_netns(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", name], check=True)
        # An address is usable at once, also the link-local one that carries NDP.
        sysctl_inside(name, ipv6__conf__default__accept_dad=0, ipv6__conf__all__accept_dad=0)
        _ip(name, ["link set lo up"])

    def make_pod(self, name: str, node: int, account: str, captured: bool) -> Pod:
        taken = {pod.index for pod in self.pods.values() if pod.node == node}
        index = next(number for number in range(1, 200) if number not in taken)
        pod = Pod(name, f"{self.tag}-{name}", node, index, account, captured)
        host = self.node_netns(node)
        self._make_netns(pod.netns)
        _ip(host, [f"link add {pod.veth} type veth peer name eth0 netns {pod.netns}"])
        sysctl_inside(host, **{f"ipv4__conf__{pod.veth}__proxy_arp": 1})
        gateway4, gateway6 = node_address(node, 4), node_address(node, 6)
        _ip(
            pod.netns,
            [
                "link set eth0 up",
                f"address add {pod.ipv4}/32 dev eth0",
                f"address add {pod.ipv6}/128 dev eth0 nodad",
                f"route add {gateway4} dev eth0",
                f"route add default via {gateway4} dev eth0",
                f"route add {gateway6} dev eth0",
                f"route add ::/0 via {gateway6} dev eth0",
            ],
        )
        _ip(
            host,
            [
                f"link set {pod.veth} up",
                f"address add {gateway4}/32 dev {pod.veth}",
                f"address add {gateway6}/128 dev {pod.veth} nodad",
                f"route add {pod.ipv4} dev {pod.veth}",
                f"route add {pod.ipv6} dev {pod.veth}",
            ],
        )
        self.pods[name] = pod
        return pod

    # --- mesh state ---------------------------------------------------------

    def write_mesh(self) -> None:
        """The mesh file anew, in the format that the agents read, replaced in one step.

        `policies` are in the same format.
        """
        pods = (*self.pods.values(), self.gone)
        if self.manifests:
            self.mesh_file.parent.mkdir(exist_ok=True)
            text = yaml.safe_dump_all([*mesh_objects(pods), *self.policies], sort_keys=False)
        else:
            text = yaml.safe_dump(self.mesh(pods), sort_keys=False)
        if self.mesh_file.exists() and self.mesh_file.read_text() == text:
            return  # an agent has no reason to read it again, so nobody may wait for that
        fresh = self.mesh_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.mesh_file)

    def mesh(self, pods: Iterable[Pod]) -> dict[str, Any]:
        """What the mesh file says, but in manifests."""
        return mesh_of(pods) | {"policies": self.policies}

    @contextlib.contextmanager
    def policy(self, **fields: Any) -> Iterator[None]:
        """One more policy for the time of the block, in force when the block begins.

        `fields` as in the file: action, rules, scope (default Namespace).
        """
        defaults = {"name": "test", "namespace": NAMESPACE, "scope": "Namespace", "dryRun": False}
        self.policies.append(defaults | fields)
        self.write_mesh()
        try:
            self.wait_mesh()
            yield
        finally:
            self.policies.pop()
            self.write_mesh()
            self.wait_mesh()

    def wait_mesh(self) -> None:
        """Until every running agent works with the mesh file as it is now."""
        written = self.mesh_file.stat().st_mtime

        def read() -> bool:
            states = [agent.ask(StatusRequest()).state for agent in self.running_agents()]
            return all(s.loaded_at and s.loaded_at.timestamp() >= written for s in states)

        eventually("the agents read the mesh file", read, 10.0)

    # --- agents -------------------------------------------------------------

    def make_ca(self) -> None:
        argv = [str(MESHBPF), "ca", "init", str(self.ca_dir), "--trust-domain", TRUST_DOMAIN]
        self.run(self.node_netns(1), argv)

    def environment(self, _node: int) -> tuple[str, ...]:
        """What stands before the agent's command, for beds that set variables with env(1)."""
        return ()

    def start_agents(self, *options: str) -> None:
        """Make the CA if there is none, and start both agents at the same time."""
        if not self.ca_dir.exists():
            self.make_ca()
        for agent in self.agents.values():
            agent.launch(*options)
        for agent in self.agents.values():
            agent.wait_ready()

    def attach_all(self, *options: str) -> None:
        def attach(node: int) -> None:
            for pod in self.captured:
                if pod.node == node:
                    self.agents[node].attach(pod, *options)

        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(attach, (1, 2)):
                pass

    # --- processes and sockets ----------------------------------------------

    def run(
        self, netns: str, argv: Sequence[str], *, check: bool = True, limit_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a namespace to its end."""
        return run_inside(netns, argv, check=check, limit_s=limit_s)

    def client(
        self, where: Pod, verb: str, address: str, port: int, *options: str, limit_s: float = 60.0
    ) -> dict[str, Any]:
        """Run tests.progs.client in a pod; BedError with its words when it fails."""
        argv = [sys.executable, "-m", "tests.progs.client", verb, address, str(port), *options]
        answer: dict[str, Any] = json.loads(self.run(where.netns, argv, limit_s=limit_s).stdout)
        return answer

    def start_servers(self, *pods: Pod) -> None:
        """tests.progs.server in these pods, all pods by default."""
        for pod in pods or tuple(self.pods.values()):
            argv = [sys.executable, "-m", "tests.progs.server", "--name", pod.name]
            self.servers[pod.name] = Program(self.directory, f"server-{pod.name}", pod.netns, argv)
        for pod in pods or tuple(self.pods.values()):
            self.servers[pod.name].wait_event("ready")

    def make_socket(self, where: Pod | int, family: Family) -> socket.socket:
        """A TCP socket of a pod, or of a node, for use in this process."""
        netns = where.netns if isinstance(where, Pod) else self.node_netns(where)
        return socket_inside(netns, socket.AF_INET if family == 4 else socket.AF_INET6)

    def connect(
        self, where: Pod | int, address: str, port: int, limit_s: float = 5.0
    ) -> socket.socket:
        """A connected TCP socket of a pod or node, with `limit_s` as its timeout."""
        sock = self.make_socket(where, 6 if ":" in address else 4)
        sock.settimeout(limit_s)
        try:
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock


def cgroup2_root() -> Path:
    """Where cgroup v2 is mounted: alone, or beside version 1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise BedError("cgroup v2 is not mounted")


def _ip(netns: str, commands: Sequence[str]) -> None:
    batch = "\n".join(commands) + "\n"
    subprocess.run(["ip", "-n", netns, "-batch", "-"], input=batch, text=True, check=True)


def _lock(path: Path) -> int:
    """The descriptor of the lock file, held until it is closed."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder removes the file when it is done: what we have locked may
        # be that one, while somebody else locks a new file of the same name.
        if not path.exists() or path.stat().st_ino != os.fstat(fd).st_ino:
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(fd)
        raise BedError(f"another process uses the testbed {path.stem!r}") from error
    return fd


def copy_bytecode(source: Path, target: Path) -> None:
    """Entries of the agent's compile cache, each named by a hash of all that it was made from.

    An agent with a new state directory would compile for seconds; a suite
    starts dozens of them.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.parent.chmod(0o700)
    for entry in source.glob("*.cached"):
        if not (target / entry.name).exists():
            partial = target / f".{entry.name}.{os.getpid()}"
            shutil.copyfile(entry, partial)
            partial.chmod(0o600)
            partial.replace(target / entry.name)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
