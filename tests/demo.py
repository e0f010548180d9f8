"""The main job shown step by step: `./dev demo`.

Builds two nodes out of network namespaces, runs an agent in each, attaches
four pods, and shows what their traffic becomes. Each step says what is done
and prints what was really seen; a step whose check fails ends the demo with
exit status 1. Nothing is left behind, also after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tests.netns.talk import MARKER, echo, receive_all
from tests.progs.inside import nftables, xtables
from tests.progs.pod import Family, Pod
from tests.progs.program import BedError, run_inside
from tests.progs.server import ECHO, WHOAMI
from tests.progs.sniffer import Packet, Sniffer
from tests.waypoint.bed import WaypointBed, an_object, route, to, vip

HBONE = 15008
FAMILIES: tuple[Family, ...] = (4, 6)


class Demo:
    """The steps, in order; each one is a method that fails by BedError."""

    def __init__(self, bed: WaypointBed) -> None:
        self.bed = bed
        self._steps = 0
        self._began = time.monotonic()

    def run(self) -> None:
        self.topology()
        with self.step("Direct traffic, before any agent", "n1a calls n2a; the link is watched"):
            self.watch([("n1a", "n2a")], {ECHO}, plaintext=True)
        self.agents()
        self.attach()
        self.traffic()
        self.identities()
        with self.step(
            "The link between the nodes while captured pods talk",
            "n1a and n1b call n2a and n2b and back, by IPv4 and IPv6",
        ):
            pairs = [("n1a", "n2a"), ("n1b", "n2b"), ("n2a", "n1a"), ("n2b", "n1b")]
            self.watch(pairs, {HBONE}, plaintext=False)
        self.no_netfilter()
        self.waypoint()
        if "STAY" in os.environ:
            self.stay()
        self.detach()
        with self.step("Direct traffic again", "the same call as in step 2"):
            self.watch([("n1a", "n2a")], {ECHO}, plaintext=True)

    # --- steps --------------------------------------------------------------

    def topology(self) -> None:
        with self.step("Two nodes and seven pods", "each one is a network namespace"):
            for node in (1, 2):
                say(f"{self.bed.node_netns(node)}: pods")
                for pod in self.bed.pods.values():
                    if pod.node == node:
                        kind = "to be captured" if pod.captured else "never captured"
                        say(f"  {pod.name}  {pod.ipv4:<12} {pod.ipv6:<16} {kind}")
            self.bed.start_servers()
            say("a real TCP server listens in each pod")

    def agents(self) -> None:
        what = "meshbpf ca init CA; meshbpf run --node NODE --state-dir DIR --ca-dir CA ..."
        with self.step("An agent on each node", what):
            self.bed.start_agents()
            for agent in self.bed.agents.values():
                for text in agent.cli("status").stdout.splitlines()[:6]:
                    say(f"{agent.netns}: {text}")

    def attach(self) -> None:
        with self.step("Attach four pods", "meshbpf attach --pod NS/NAME --netns NETNS"):
            for pod in self.bed.captured:
                argv = ("attach", "--pod", pod.key, "--netns", pod.netns)
                for text in self.bed.agent_of(pod).cli(*argv).stdout.splitlines():
                    say(text)

    def traffic(self) -> None:
        cases = [
            ("cross-node", "n1a", "n2a"),
            ("same node", "n1a", "n1b"),
            ("out of the mesh", "n1a", "n2x"),
            ("into the mesh", "n2x", "n1a"),
        ]
        what = "each server answers with the addresses that it sees"
        with self.step("Traffic", what):
            for what, client, server in cases:
                for family in FAMILIES:
                    self.call(what, self.bed[client], self.bed[server], family)
            for family in FAMILIES:
                source, target = self.bed["n1a"], self.bed["n2a"]
                with self.bed.connect(source, target.vip(family), 80) as sock:
                    echo(sock)
                say(f"by service      n1a -> {target.vip(family)} port 80: echoed by n2a")

    def call(self, what: str, client: Pod, server: Pod, family: Family) -> None:
        """One call: the server must see both true addresses."""
        with self.bed.connect(client, server.address(family), WHOAMI) as sock:
            seen = json.loads(receive_all(sock))
        say(f"{what:<16}{client.name} -> {server.name}: it sees {seen['peer']} -> {seen['local']}")
        expect(
            seen["peer"] == client.address(family) and seen["local"] == server.address(family),
            f"{server.name} saw other addresses than {client.name}'s and its own",
        )

    def identities(self) -> None:
        what = "meshbpf connections -o json, while n1a holds one to n2a and n2b one to n1b"
        with self.step("Who is at the other end: identities proven by mutual TLS", what):
            one = self.bed.connect(self.bed["n1a"], self.bed["n2a"].ipv4, ECHO)
            two = self.bed.connect(self.bed["n2b"], self.bed["n1b"].ipv6, ECHO)
            with one, two:
                echo(one)
                echo(two)
                expected = {
                    (1, "outbound"): self.bed["n2a"].identity,
                    (2, "inbound"): self.bed["n1a"].identity,
                    (2, "outbound"): self.bed["n1b"].identity,
                    (1, "inbound"): self.bed["n2b"].identity,
                }
                seen = {}
                for node, agent in self.bed.agents.items():
                    answer = json.loads(agent.cli("connections", "-o", "json").stdout)
                    for entry in connections(answer):
                        peer = entry["peer_identity"]
                        seen[node, entry["direction"]] = peer
                        ends = f"{entry['source']} -> {entry['destination']}"
                        say(f"node{node} {entry['direction']:<9}{entry['protocol']} {ends}")
                        say(f"      the peer is {peer}")
                expect(seen == expected, f"expected {expected}")

    def no_netfilter(self) -> None:
        netns = [self.bed.node_netns(node) for node in (1, 2)]
        netns += [pod.netns for pod in self.bed.pods.values()]
        with self.step("No iptables, no nftables", "the rule sets of both nodes and all pods"):
            for name in netns:
                found = nftables(name) + xtables(name)
                said = [f"kernel: {len(found)} tables"]
                for argv in (["nft", "list", "ruleset"], ["iptables-save"], ["ip6tables-save"]):
                    if shutil.which(argv[0]):
                        text = run_inside(name, argv).stdout.strip()
                        said.append(f"{' '.join(argv)}: {text or 'empty'}")
                        found += [text] if text else []
                say(f"{name:<12} {', '.join(said)}")
                expect(not found, f"{name} has rules")

    def waypoint(self) -> None:
        bed = self.bed
        what = "meshbpf waypoint --name apps/waypoint --ca-dir CA --manifests DIR --address IP"
        with self.step("A waypoint for the service echo, in a pod of its own", what):
            bed.start_webs()
            bed.start_waypoint()
            answer = bed.get("echo-v1")
            say(
                f"n1a -> echo-v1 ({vip('echo-v1')}), through the waypoint: {answer.status}, "
                f"answered by {answer.name}"
            )
        split = route("echo", to("echo-v1=70", "echo-v2=30"))
        with bed.objects(split):
            with self.step("An HTTPRoute by weight", "70 of 100 to echo-v1, 30 to echo-v2"):
                count = Counter(bed.get("echo").name for _ in range(100))
                say(", ".join(f"{name}: {number}" for name, number in sorted(count.items())))
                expect(set(count) == {"echo-v1", "echo-v2"}, "only two backends have a weight")
                expect(50 <= count["echo-v1"] <= 90, "the weights do not hold")
            spec = {
                "targetRefs": [{"group": "", "kind": "Service", "name": "echo"}],
                "action": "DENY",
                "rules": [{"to": [{"operation": {"paths": ["/admin*"]}}]}],
            }
            group = "security.istio.io"
            policy = an_object("AuthorizationPolicy", "no-admin", group=group, spec=spec)
            what = "an AuthorizationPolicy for the service: DENY /admin*"
            with bed.objects(policy), self.step("A denied path", what):
                for path, expected in (("/shop", 200), ("/admin/users", 403), ("/x/../admin", 403)):
                    status = bed.get("echo", path).status
                    say(f"n1a -> echo {path:<14}{status}")
                    expect(status == expected, f"expected {expected}")
                bed.wait_mesh()
                asked = ("explain", bed["n1a"].key, f"{vip('echo')}:80", "--path", "/admin/users")
                for text in bed.agents[1].cli(*asked).stdout.splitlines()[-9:]:
                    say(text)

    def stay(self) -> None:
        with self.step("The mesh stays", "from another shell; Ctrl-C here removes it"):
            say(f"objects: {self.bed.mesh_file.parent}")
            say(f"n1a:     nsenter --net=/run/netns/{self.bed['n1a'].netns} COMMAND")
            say(f"echo:    {vip('echo')} port 80")
            signal.pause()

    def detach(self) -> None:
        with self.step("Detach", "meshbpf detach --pod NS/NAME"):
            for pod in self.bed.captured:
                agent = self.bed.agent_of(pod)
                for text in agent.cli("detach", "--pod", pod.key).stdout.splitlines():
                    say(text)

    # --- tools --------------------------------------------------------------

    def watch(self, pairs: list[tuple[str, str]], ports: set[int], *, plaintext: bool) -> None:
        """Talk while a packet socket reads the inter-node link; check ports and payloads."""
        with Sniffer(self.bed.node_netns(1), "trunk", (MARKER,)) as sniffer:
            for client, server in pairs:
                for family in FAMILIES:
                    address = self.bed[server].address(family)
                    with self.bed.connect(self.bed[client], address, ECHO) as sock:
                        echo(sock, MARKER * 100)
        seen = sniffer.seen
        for (low, between), count in sorted(tcp_flows(seen.packets).items()):
            say(f"TCP port {low:<6}{between}: {count} packets")
        say(f"packets with the text {MARKER.decode()!r} readable in them: {len(seen.plaintext)}")
        expect(seen.tcp_service_ports() == ports, f"expected TCP ports {ports} and no others")
        expect("udp" not in seen.protocols(), "UDP crossed the link")
        expect(bool(seen.plaintext) == plaintext, "plaintext crossed, or did not, unlike expected")

    @contextmanager
    def step(self, title: str, what: str) -> Iterator[None]:
        self._steps += 1
        at = time.monotonic() - self._began
        print(f"\n[{self._steps}] {title}  ({at:.0f} s)\n    # {what}", flush=True)
        yield


def tcp_flows(packets: Counter[Packet]) -> Counter[tuple[int, str]]:
    """Packets a dialled port and pair of hosts."""
    flows: Counter[tuple[int, str]] = Counter()
    for packet, count in packets.items():
        if packet.protocol == "tcp":
            low = min(packet.source_port, packet.destination_port)
            flows[low, " and ".join(sorted((packet.source, packet.destination)))] += count
    return flows


def connections(answer: object) -> list[dict[str, str]]:
    """The list in the output of `connections -o json`."""
    found: list[dict[str, str]] = answer["connections"]  # type: ignore[index]
    return found


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def expect(truth: bool, otherwise: str) -> None:
    if not truth:
        raise BedError(otherwise)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    if os.geteuid() != 0:
        print("demo: network namespaces and BPF need root: run it as root", file=sys.stderr)
        return 77
    signal.signal(signal.SIGTERM, _terminated)
    began = time.monotonic()
    try:
        with WaypointBed("demo") as bed:
            Demo(bed).run()
    except (BedError, OSError, AssertionError) as error:
        print(f"\ndemo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything is removed", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - began:.0f} s: all checks held, everything is removed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
