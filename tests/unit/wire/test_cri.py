"""Reading a container runtime's answers."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from meshbpf.agent.wire import cri
from meshbpf.agent.wire.cri import CriError
from meshbpf.agent.wire.pb import cri_pb2

LABELS = {cri.POD_NAMESPACE_LABEL: "web", cri.POD_NAME_LABEL: "a"}


def item(name: str, **given: object) -> cri_pb2.PodSandbox:
    attempt = given.pop("attempt", 0)
    fields: dict[str, object] = {"id": name, "labels": LABELS, **given}
    return cri_pb2.PodSandbox(metadata=cri_pb2.PodSandboxMetadata(attempt=attempt), **fields)


def test_the_dead_sandbox_of_a_name_is_not_the_pod() -> None:
    dead = item("dead", state=cri_pb2.SANDBOX_NOTREADY, attempt=7, created_at=9)
    alive = item("alive", state=cri_pb2.SANDBOX_READY, attempt=0, created_at=1)
    assert cri.newest([dead, alive]) == alive
    assert cri.newest([dead]) is None
    answer = cri_pb2.ListPodSandboxResponse(items=[alive, dead])
    assert cri.current(answer) == {"web/a": "alive"}


def test_of_two_that_are_ready_the_one_made_last_is_the_pod() -> None:
    # A pod deleted and made anew counts its attempts from 0 again.
    old, new = item("old", attempt=3, created_at=1), item("new", attempt=0, created_at=2)
    for order in ([old, new], [new, old]):
        assert cri.newest(order) == new
        assert cri.current(cri_pb2.ListPodSandboxResponse(items=order)) == {"web/a": "new"}


def test_a_sandbox_without_a_pods_labels_is_no_pod() -> None:
    answer = cri_pb2.ListPodSandboxResponse(
        items=[item("x", labels={}), item("y", labels={"a": ""})]
    )
    assert cri.current(answer) == {}


def test_the_question_names_state_and_both_labels() -> None:
    request = cri.list_request("web", "a")
    assert dict(request.filter.label_selector) == LABELS
    assert request.filter.HasField("state")
    assert request.filter.state.state == cri_pb2.SANDBOX_READY
    assert cri.ready_request().filter.HasField("state")
    # READY is 0, proto3's default: it must be on the wire all the same.
    assert cri.ready_request().SerializeToString() == b"\x0a\x02\x12\x00"


def status(info: object = None, **given: object) -> cri_pb2.PodSandboxStatusResponse:
    fields: dict[str, object] = {
        "id": "5" * 64,
        "metadata": cri_pb2.PodSandboxMetadata(name="a", namespace="web", uid="u-1", attempt=2),
        "network": cri_pb2.PodSandboxNetworkStatus(
            ip="198.18.64.3", additional_ips=[cri_pb2.PodIP(ip="fd00:6d62::3")]
        ),
        **given,
    }
    text = info if isinstance(info, str) else json.dumps(info)
    return cri_pb2.PodSandboxStatusResponse(
        status=cri_pb2.PodSandboxStatus(**fields), info={} if info is None else {"info": text}
    )


CONTAINERD = {
    "pid": 4711,
    "runtimeSpec": {
        "linux": {
            "cgroupsPath": "kubepods-podx.slice:cri-containerd:5",
            "namespaces": [
                {"type": "pid"},
                {"type": "network", "path": "/var/run/netns/cni-1"},
            ],
        }
    },
}


def test_containerds_and_crios_answer_has_everything() -> None:
    found = cri.sandbox(status(CONTAINERD))
    assert (found.namespace, found.name, found.uid, found.attempt) == ("web", "a", "u-1", 2)
    assert (found.netns, found.pid) == ("/var/run/netns/cni-1", 4711)
    assert found.addresses == (ip_address("198.18.64.3"), ip_address("fd00:6d62::3"))


@pytest.mark.parametrize(
    "info",
    [
        None,
        {},
        {"pid": "x", "runtimeSpec": []},
        {"pid": -1, "runtimeSpec": {"linux": None}},
        {"runtimeSpec": {"linux": {"namespaces": [7, {"type": "network"}]}}},
        {"runtimeSpec": {"linux": {"namespaces": [{"type": "network", "path": 7}]}}},
    ],
)
def test_a_runtime_that_says_less_leaves_it_open(info: object) -> None:
    found = cri.sandbox(status(info))
    assert (found.netns, found.pid) == ("", 0)


def test_a_host_network_pod_is_refused_with_the_reason() -> None:
    options = cri_pb2.NamespaceOption(network=cri_pb2.NODE)
    linux = cri_pb2.LinuxPodSandboxStatus(namespaces=cri_pb2.Namespace(options=options))
    with pytest.raises(CriError, match="web/a uses the node's own network") as caught:
        cri.sandbox(status(CONTAINERD, linux=linux))
    assert caught.value.code == "host-network"
    assert "leave it out of the mesh" in caught.value.hint


def test_a_pod_that_died_since_it_was_listed_is_refused() -> None:
    with pytest.raises(CriError, match="not running any more"):
        cri.sandbox(status(CONTAINERD, state=cri_pb2.SANDBOX_NOTREADY))


@pytest.mark.parametrize("info", ["{", "[]", '"x"'])
def test_an_answer_that_is_no_json_object_is_refused(info: str) -> None:
    with pytest.raises(CriError, match="no JSON object"):
        cri.sandbox(status(info))


def test_an_address_that_is_none_is_refused() -> None:
    network = cri_pb2.PodSandboxNetworkStatus(ip="10.0.0.x")
    with pytest.raises(CriError, match=r"'10\.0\.0\.x' is not an IP address"):
        cri.sandbox(status(CONTAINERD, network=network))
