"""Each verb of the CNI plugin, against a real agent and bare network namespaces."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from meshbpf.agent.api import PodsRequest
from tests.cni.plugin import PREVIOUS, Done, Plugin
from tests.netns.talk import passes
from tests.progs.pod import Pod
from tests.progs.sniffer import Sniffer
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.cni]


def attached(bed: Testbed, node: int = 1) -> list[str]:
    return [one.pod for one in bed.agents[node].ask(PodsRequest()).pods if one.state == "attached"]


def add(plugin: Plugin, pod: Pod, container: str = "") -> Done:
    return plugin.run("ADD", pod.name, pod.netns, container)


def test_version_is_answered_without_an_agent(binary: Path, tmp_path: Path) -> None:
    done = Plugin(binary, tmp_path / "nobody").run("VERSION")
    assert done.status == 0
    assert done.answer["cniVersion"] == "1.1.0"
    assert "1.0.0" in done.answer["supportedVersions"]


def test_add_enrols_a_pod_by_its_labels_and_its_first_packet_is_captured(
    bed: Testbed, plugin: Plugin
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    done = add(plugin, client)
    assert (done.status, done.answer) == (0, PREVIOUS)
    assert attached(bed) == [client.key]
    other = Plugin(plugin.binary, bed.agents[2].state_dir / "cni.sock")
    assert add(other, server).status == 0
    with Sniffer(bed.node_netns(1), "trunk", ()) as sniffer:
        passes(bed, client, server.ipv4)
    assert sniffer.seen.tcp_service_ports() == {15008}


def test_add_may_be_repeated(bed: Testbed, plugin: Plugin) -> None:
    for _ in range(2):
        assert add(plugin, bed["n1a"]).status == 0
    assert attached(bed) == [bed["n1a"].key]


def test_a_pod_that_opts_out_and_a_namespace_that_is_not_enrolled_are_left_alone(
    bed: Testbed, plugin: Plugin
) -> None:
    done = add(plugin, bed["n1x"])
    assert (done.status, done.answer) == (0, PREVIOUS)
    foreign = plugin.run("ADD", "x", bed["n1a"].netns, namespace="elsewhere")
    assert (foreign.status, foreign.answer) == (0, PREVIOUS)
    assert attached(bed) == []


def test_what_is_no_pod_of_kubernetes_passes(plugin: Plugin) -> None:
    done = plugin.run("ADD", container="x")
    assert (done.status, done.answer) == (0, PREVIOUS)


def test_a_pod_of_an_enrolled_namespace_that_nobody_knows_does_not_start(
    bed: Testbed, plugin: Plugin
) -> None:
    done = plugin.run("ADD", "stranger", bed["n1a"].netns)
    assert done.status == 1
    assert "nobody knows pod apps/stranger" in done.answer["msg"]
    assert done.answer["cniVersion"] == "1.0.0"
    assert attached(bed) == []


def test_a_namespace_that_cannot_be_entered_is_refused(bed: Testbed, plugin: Plugin) -> None:
    done = plugin.run("ADD", "n1a", "not-there")
    assert done.status == 1
    assert done.answer["code"] >= 100
    assert "/run/netns/not-there: No such file" in done.answer["msg"]
    assert "lsns" in done.answer["details"]


def test_del_leaves_nothing_and_may_be_repeated(bed: Testbed, plugin: Plugin) -> None:
    agent = bed.agents[1]
    before = pins(agent.agent_id())
    add(plugin, bed["n1a"], "one")
    assert pins(agent.agent_id()) != before
    for _ in range(2):
        done = plugin.run("DEL", "n1a", bed["n1a"].netns, "one")
        assert (done.status, done.text) == (0, "")
    assert attached(bed) == []
    assert pins(agent.agent_id()) == before
    assert json.loads((agent.state_dir / "attachments.json").read_text())["attachments"] == []


def test_del_of_an_earlier_life_leaves_the_successor_attached(bed: Testbed, plugin: Plugin) -> None:
    add(plugin, bed["n1a"], "old")
    add(plugin, bed["n1a"], "new")
    assert plugin.run("DEL", "n1a", bed["n1a"].netns, "old").status == 0
    assert attached(bed) == [bed["n1a"].key]


def test_check_says_whether_a_pod_is_steered(bed: Testbed, plugin: Plugin) -> None:
    pod = bed["n1a"]
    before = plugin.run("CHECK", pod.name, pod.netns)
    assert before.status == 1
    assert "its traffic is not steered" in before.answer["msg"]
    add(plugin, pod)
    assert (plugin.run("CHECK", pod.name, pod.netns)) == Done(0, "")
    assert plugin.run("CHECK", "n1x", bed["n1x"].netns) == Done(0, "")


def test_gc_removes_what_is_not_valid_any_more_and_nothing_else(
    bed: Testbed, plugin: Plugin
) -> None:
    add(plugin, bed["n1a"], "keep")
    add(plugin, bed["n1b"], "stale")
    valid = [{"containerID": "keep", "ifname": "eth0"}]
    assert plugin.run("GC", **{"cni.dev/valid-attachments": valid}) == Done(0, "")
    assert attached(bed) == [bed["n1a"].key]
    assert plugin.run("GC", **{"cni.dev/valid-attachments": []}) == Done(0, "")
    assert attached(bed) == []


def test_status_says_whether_the_agent_is_ready(plugin: Plugin, tmp_path: Path) -> None:
    assert plugin.run("STATUS") == Done(0, "")
    nobody = Plugin(plugin.binary, tmp_path / "nobody").run("STATUS")
    assert (nobody.status, nobody.answer["code"]) == (1, 50)


def test_without_an_agent_no_pod_starts_but_every_pod_can_be_removed(
    bed: Testbed, plugin: Plugin
) -> None:
    pod = bed["n1a"]
    add(plugin, pod, "one")
    bed.agents[1].stop()
    done = add(plugin, bed["n1b"])
    assert (done.status, done.answer["code"]) == (1, 11)
    assert "no agent answers at" in done.answer["msg"]
    assert "pod apps/n1b is not started, since it could talk past the mesh" in done.answer["msg"]
    assert "meshbpf cni uninstall" in done.answer["details"]
    excluded = plugin.run("ADD", "dns", pod.netns, namespace="kube-system",
                          excludeNamespaces=["a", "kube-system"])  # fmt: skip
    assert (excluded.status, excluded.answer) == (0, PREVIOUS)
    assert plugin.run("DEL", pod.name, pod.netns, "one") == Done(0, "")
    assert plugin.run("GC", **{"cni.dev/valid-attachments": []}) == Done(0, "")
    # The agent that comes back still has it, and the runtime's next GC removes it.
    bed.agents[1].start()
    assert attached(bed) == [pod.key]
    plugin.run("GC", **{"cni.dev/valid-attachments": []})
    assert attached(bed) == []


@pytest.mark.parametrize(
    ("stdin", "code"),
    [("", 6), ("{", 6), ('{"a": [1, 2}', 6), ("[]", 6), ('{"socket": "relative"}', 7)],
)
def test_a_configuration_that_is_none_is_refused(binary: Path, stdin: str, code: int) -> None:
    done = Plugin(binary, Path("/nobody")).run("ADD", "web", stdin=stdin)
    assert (done.status, done.answer["code"]) == (1, code)


def test_other_verbs_do_not_exist_on_the_plugins_socket(bed: Testbed, plugin: Plugin) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(plugin.socket))
        sock.sendall(b'{"verb":"detach","args":{"pod":"apps/n1a"}}\n')
        answer = json.loads(sock.makefile().readline())
    assert answer["error"]["code"] == "unknown-verb"
    assert plugin.socket.stat().st_mode & 0o777 == 0o600


def pins(agent_id: str) -> set[str]:
    """Every pin of one agent."""
    folder = Path("/sys/fs/bpf/meshbpf") / agent_id
    return {str(path) for path in folder.rglob("*")}
