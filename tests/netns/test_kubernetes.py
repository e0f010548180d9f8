"""`meshbpf run --kubernetes`: real agents on two nodes, fed by an API server of ours."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from meshbpf.agent.api import StatusRequest
from tests.netns.talk import echo, ends, passes, refused
from tests.progs.inside import socket_inside
from tests.progs.kube_objects import mesh_objects
from tests.progs.pod import NAMESPACE
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.progs.sniffer import Sniffer
from tests.testbed import SUITE_TAG, Testbed
from tests.unit.kube.api_server import ApiServer, certificates

pytestmark = [pytest.mark.root, pytest.mark.netns]

REDIRECTION = "ambient.istio.io/redirection"
PORT = 16443
DENY = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "no-echo", "namespace": NAMESPACE},
    "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"ports": [str(ECHO)]}}]}]},
}


class Cluster:
    """An API server in a thread of its own, which listens on loopback of each node."""

    def __init__(self, bed: Testbed, folder: Path) -> None:
        self.server = ApiServer(*certificates(folder))
        self.kubeconfig = folder / "kubeconfig"
        (folder / "ca.pem").write_bytes(self.server.ca)
        text = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [
                {
                    "name": "c",
                    "cluster": {
                        "server": f"https://127.0.0.1:{PORT}",
                        "certificate-authority": "ca.pem",
                    },
                }
            ],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        self.kubeconfig.write_text(json.dumps(text))
        self._listeners = []
        for node in (1, 2):
            sock = socket_inside(bed.node_netns(node), socket.AF_INET)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", PORT))
            sock.listen(128)
            self._listeners.append(sock)
        self._up = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            self._up.set()
            listeners = [
                trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                for sock in self._listeners
            ]
            await trio.serve_listeners(self.server.serve, listeners)

    def __enter__(self) -> Cluster:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.do(lambda _server: self._scope.cancel())
        self._thread.join()

    def do(self, what: Callable[[ApiServer], Any]) -> Any:
        """Something with the server, in its own thread."""
        return trio.from_thread.run_sync(what, self.server, trio_token=self._token)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Testbed, Cluster]]:
    with (
        Testbed(f"{SUITE_TAG}kub") as bed,
        Cluster(bed, tmp_path_factory.mktemp("kube")) as cluster,
    ):
        for body in mesh_objects(bed.pods.values()):
            if body["kind"] != "ServiceAccount":
                cluster.do(lambda server, body=body: server.put(body))
        bed.state_options = ("--kubernetes", "--kubeconfig", str(cluster.kubeconfig))
        bed.start_agents()
        bed.start_servers()
        bed.attach_all()
        yield bed, cluster


def test_steered_pods_are_annotated_and_then_spoken_to_by_hbone(
    made: tuple[Testbed, Cluster],
) -> None:
    bed, cluster = made
    state = bed.agents[1].ask(StatusRequest()).state
    assert (state.kind, state.origin) == ("kubernetes", f"https://127.0.0.1:{PORT}")

    def annotated() -> list[str]:
        objects = cluster.do(lambda server: dict(server.objects))
        return sorted(
            name
            for (kind, _, name), body in objects.items()
            if kind == "Pod" and REDIRECTION in (body["metadata"].get("annotations") or {})
        )

    eventually("pods are annotated", lambda: annotated() == ["n1a", "n1b", "n2a", "n2b"], 20.0)
    client, server = bed["n1a"], bed["n2a"]

    def tunneled() -> bool:
        with Sniffer(bed.node_netns(1), "trunk", ()) as sniffer:
            passes(bed, client, server.ipv4)
            passes(bed, client, server.vip(6), 80)
        return sniffer.seen.tcp_service_ports() == {15008}

    eventually("it goes by HBONE", tunneled, 20.0)


def test_a_policy_of_the_cluster_cuts_a_live_connection_and_goes_again(
    made: tuple[Testbed, Cluster],
) -> None:
    bed, cluster = made
    client, target = bed["n1a"], bed["n2a"].ipv4
    with bed.connect(client, target, ECHO) as sock:
        echo(sock)
        cluster.do(lambda server: server.put(DENY))
        assert ends(sock, 5.0)
    refused(bed, client, target)
    cluster.do(lambda server: server.take("AuthorizationPolicy", NAMESPACE, "no-echo"))

    def open_again() -> bool:
        try:
            passes(bed, client, target)
        except OSError:
            return False
        return True

    eventually("it is open again", open_again, 10.0)
