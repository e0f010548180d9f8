"""A ztunnel that somebody else built, running in a node of the testbed.

    ZTUNNEL=PATH make peers      ZTUNNEL=PATH make bench

The binary must be built with `--features testing`: then FAKE_CA makes it issue
its own certificates from a test CA that stands in its source tree. That CA is
read when a test runs, from ZTUNNEL_CA=DIR or from the source tree that the
binary lies in, and never copied into this project. A ztunnel in a node gets its
pods over ZDS and its mesh from a LOCAL_XDS file, which it reads once, at start.

Its capture is netfilter: the rules below say in iptables-restore's language
what Istio's node agent sets up in a pod, of which our own pods need none.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from meshbpf.agent.api import StatusRequest
from tests.peers.zds import ZdsServer
from tests.progs import server
from tests.progs.inside import NETNS_DIR, socket_inside
from tests.progs.pod import NAMESPACE, TRUST_DOMAIN, Pod
from tests.progs.program import BedError, Program, eventually
from tests.testbed import Testbed

READY_LIMIT_S = 15.0
READINESS_PORT = 15021
# Where Istio's node agent moves the kubelet's probes to, to tell them apart.
PROBE_SOURCES = {
    "iptables": "169.254.7.127/32",
    "ip6tables": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128",
}
STRING_MATCHES = {"Exact", "Prefix", "Suffix", "Presence"}
LOOPBACKS = {"iptables": "127.0.0.1/32", "ip6tables": "::1/128"}


@dataclass(frozen=True, slots=True)
class ZtunnelBuild:
    """The binary under test and, where it was found, its test CA."""

    binary: Path
    root_cert: Path | None
    root_key: Path | None


def zds_socket(bed: Testbed, node: int) -> Path:
    """Where a node's ztunnel asks for pods."""
    return bed.directory / f"zds{node}.sock"


def find_build() -> ZtunnelBuild | None:
    """What ZTUNNEL and ZTUNNEL_CA name; None when ZTUNNEL is not set or empty."""
    given = os.environ.get("ZTUNNEL", "")
    if not given:
        return None
    return build_at(Path(given))


def build_at(binary: Path) -> ZtunnelBuild:
    """The build with this binary; BedError when there is none, or no CA where one is said to be."""
    binary = binary.resolve()
    if not os.access(binary, os.X_OK) or binary.is_dir():
        raise BedError(f"ZTUNNEL={binary} is no program")
    if directory := os.environ.get("ZTUNNEL_CA", ""):
        places = [Path(directory)]
    else:
        places = [parent / "src/tls" for parent in binary.parents]
    for place in places:
        cert, key = place / "root-cert.pem", place / "ca-key.pem"
        if cert.is_file() and key.is_file():
            return ZtunnelBuild(binary, cert, key)
    if directory:
        raise BedError(f"ZTUNNEL_CA={directory} holds no root-cert.pem with a ca-key.pem")
    return ZtunnelBuild(binary, None, None)


class Ztunnel:
    """One ztunnel in a node's netns, from `start` to the end of the `with` block."""

    def __init__(self, bed: Testbed, node: int, build: ZtunnelBuild) -> None:
        self.bed, self.node, self.build = bed, node, build
        self._zds: ZdsServer | None = ZdsServer(zds_socket(bed, node))
        self._wrapper: tuple[str, ...] = ()
        self._program: Program | None = None

    @classmethod
    def of_agent(cls, bed: Testbed, node: int, build: ZtunnelBuild) -> Ztunnel:
        """One that asks the node's agent for pods, in the testbed's cgroup.

        Start the agent with `--proxy ztunnel` and the socket of `zds_socket`.
        """
        self = cls.__new__(cls)
        self.bed, self.node, self.build = bed, node, build
        self._zds, self._program = None, None
        join = f'echo $$ > {bed.cgroup}/cgroup.procs && exec "$@"'
        self._wrapper = ("sh", "-c", join, "ztunnel")
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._program is not None:
            self._program.end()
        if self._zds is not None:
            self._zds.close()

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def program(self) -> Program:
        if self._program is None:
            raise BedError(f"the ztunnel of node{self.node} was never started")
        return self._program

    def start(self, **settings: str) -> None:
        """Run it with the mesh file as it is now; returns when it is ready."""
        environment = {
            "FAKE_CA": "true",
            "XDS_ADDRESS": "",
            "CA_ADDRESS": "",
            "LOCAL_XDS_PATH": str(self._write_mesh()),
            "NODE_NAME": f"node{self.node}",
            "INPOD_UDS": str(zds_socket(self.bed, self.node)),
            "PROXY_MODE": "shared",
            "RUST_LOG": "warn,access=info",
        }
        assignments = [f"{name}={value}" for name, value in (environment | settings).items()]
        argv = [*self._wrapper, "env", *assignments, str(self.build.binary)]
        name, netns = f"ztunnel{self.node}", self.bed.node_netns(self.node)
        self._program = Program(self.bed.directory, name, netns, argv)
        if self._zds is not None:
            try:
                self._zds.meet()
            except TimeoutError as error:
                raise BedError(f"{name} does not connect:\n{self.program.tail()}") from error
        eventually(f"{name} is ready", self._ready, READY_LIMIT_S)

    def attach(self, pod: Pod) -> None:
        """Hand the pod over and turn its traffic to ztunnel, as Istio's node agent would."""
        namespace, name = pod.key.split("/")
        if self._zds is None:
            raise BedError("the agent hands pods to this ztunnel")
        self._zds.add(pod.key, name, namespace, pod.service_account, NETNS_DIR / pod.netns)
        redirect(self.bed, pod)

    def kill9(self) -> None:
        self.program.end(signal.SIGKILL)

    def log(self) -> str:
        return self.program.log.read_text(errors="replace")

    def _write_mesh(self) -> Path:
        """The testbed's mesh, in the two ways spelt out that ztunnel insists on.

        A workload without a trust domain would be spiffe:///ns/... to it, and a
        string match must be a YAML tag (`!Exact text`), where we take a map as well.
        """
        mesh = yaml.safe_load(self.bed.mesh_file.read_text())
        for workload in mesh["workloads"]:
            workload.setdefault("trustDomain", TRUST_DOMAIN)
        mesh["policies"] = _with_tags(mesh["policies"])
        path = self.bed.directory / f"ztunnel{self.node}.yaml"
        path.write_text(yaml.dump(mesh, Dumper=_Dumper, sort_keys=False))
        return path

    def _ready(self) -> bool:
        if not self.program.running:
            raise BedError(f"ztunnel ended:\n{self.program.tail()}")
        sock = socket_inside(self.bed.node_netns(self.node), socket.AF_INET)
        sock.settimeout(2.0)
        connection = http.client.HTTPConnection("127.0.0.1", READINESS_PORT)
        try:
            sock.connect(("127.0.0.1", READINESS_PORT))
        except (TimeoutError, ConnectionRefusedError):
            sock.close()
            return False
        connection.sock = sock
        try:
            connection.request("GET", "/healthz/ready")
            return connection.getresponse().status == 200
        finally:
            connection.close()


def redirect(bed: Testbed, pod: Pod) -> None:
    """Turn the pod's traffic to the proxy's ports, as Istio's node agent would."""
    for command, listing in (("iptables", "-4"), ("ip6tables", "-6")):
        rules = bed.directory / f"{pod.name}.{command}"
        rules.write_text(capture_rules(command))
        bed.run(pod.netns, [f"{command}-restore", "--noflush", str(rules)])
        route = "route add local default dev lo table 100"
        bed.run(pod.netns, ["ip", listing, *route.split()])
        # What goes back to a client whose address the proxy has taken on stays in the pod.
        rule = "rule add fwmark 0x111/0xfff pref 32764 lookup 100"
        bed.run(pod.netns, ["ip", listing, *rule.split()])


def start_steering(bed: Testbed) -> None:
    """Both agents, each with the ztunnel beside it as its proxy: `Ztunnel.of_agent`."""
    bed.cgroup.mkdir()
    bed.ca_options = ()
    for node, agent in bed.agents.items():
        # In a cluster ztunnel has a network namespace of its own; here it is the node's.
        ports = ("--readiness-port", "16021", "--admin-port", "16000", "--stats-port", "16020")
        agent.start("--proxy", "ztunnel", "--zds-socket", str(zds_socket(bed, node)), *ports)


def wait_served(bed: Testbed, node: int) -> None:
    """Until the node's ztunnel has every pod that the agent has."""

    def served() -> bool:
        proxy = bed.agents[node].ask(StatusRequest()).proxy
        return proxy is not None and proxy.pid != 0 and proxy.unserved == ()

    eventually(f"ztunnel of node{node} serves", served, READY_LIMIT_S)


@dataclass(frozen=True, slots=True)
class _StringMatch:
    kind: str
    text: Any


class _Dumper(yaml.SafeDumper):
    """Writes a _StringMatch as a tagged value."""


def _represent(dumper: _Dumper, match: _StringMatch) -> yaml.Node:
    if match.kind == "Presence":
        return dumper.represent_sequence("!Presence", [])
    return dumper.represent_scalar(f"!{match.kind}", match.text)


_Dumper.add_representer(_StringMatch, _represent)


def _with_tags(value: Any) -> Any:
    """The same with each {"Exact": text} and its like as a _StringMatch."""
    if isinstance(value, list):
        return [_with_tags(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))) in STRING_MATCHES:
        return _StringMatch(kind, value[kind])
    return {key: _with_tags(each) for key, each in value.items()}


def capture_rules(command: str) -> str:
    """The pod's rules for iptables-restore, or ip6tables-restore, by ztunnel's marks and ports.

    ztunnel's own sockets carry mark 0x539. Outbound TCP goes to 15001 and DNS to
    15053 unless it is ztunnel's or stays on loopback; inbound TCP goes to 15006
    unless it is HBONE. A connection that ztunnel opens to the app under the
    client's address is remembered by connection mark 0x111, and the answers to
    it get that mark back, which sends them to loopback (table 100).
    """
    loopback, probes = LOOPBACKS[command], PROBE_SOURCES[command]
    foreign = "-m mark ! --mark 0x539/0xfff"
    return f"""\
*mangle
:MESH_IN - [0:0]
:MESH_OUT - [0:0]
-A PREROUTING -j MESH_IN
-A OUTPUT -j MESH_OUT
-A MESH_IN -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A MESH_OUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark
COMMIT
*nat
:MESH_IN - [0:0]
:MESH_OUT - [0:0]
-A PREROUTING -j MESH_IN
-A OUTPUT -j MESH_OUT
-A MESH_IN -s {probes} -p tcp -j ACCEPT
-A MESH_IN ! -d {loopback} -p tcp ! --dport 15008 {foreign} -j REDIRECT --to-ports 15006
-A MESH_OUT -d {probes} -p tcp -j ACCEPT
-A MESH_OUT ! -o lo -p udp {foreign} --dport 53 -j REDIRECT --to-ports 15053
-A MESH_OUT ! -d {loopback} -p tcp --dport 53 {foreign} -j REDIRECT --to-ports 15053
-A MESH_OUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A MESH_OUT ! -d {loopback} -o lo -j ACCEPT
-A MESH_OUT ! -d {loopback} -p tcp {foreign} -j REDIRECT --to-ports 15001
COMMIT
"""


def deny_greeting(bed: Testbed, *pods: str) -> None:
    """Port GREET refuses the accounts of these pods, from the next writing of the mesh on."""
    who = [{"Exact": bed[name].identity.removeprefix("spiffe://")} for name in pods]
    bed.policies.append(
        {
            "name": "no-greeting",
            "namespace": NAMESPACE,
            "scope": "Namespace",
            "action": "Deny",
            "dryRun": False,
            "rules": [[[{"principals": who, "destinationPorts": [server.GREET]}]]],
        }
    )


def greeting(bed: Testbed, client: Pod, address: str) -> bytes:
    """What the greeting server says first; b"" when the connection ends instead.

    ztunnel ends a refused connection with FIN or RST, whichever comes out, and
    an RST may be there before connect() has returned.
    """
    try:
        with bed.connect(client, address, server.GREET) as sock:
            return sock.recv(100)
    except ConnectionResetError:
        return b""
