"""What an attach request comes to: account, namespace, options; and the refusals."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.config import Exemptions, Settings
from meshbpf.agent.core.errors import ConfigError, Exit, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime import attach_plan
from meshbpf.agent.runtime.attach_plan import (
    Located,
    NetnsPath,
    awaits_mesh,
    find_netns,
    identity,
    next_life,
)
from meshbpf.agent.runtime.attachments import Attachment

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def settings(**given: object) -> Settings:
    folder = Path("/nowhere")
    base = {"node": "node1", "state_dir": folder, "ca_dir": folder, "local_xds": folder}
    return Settings.from_flags({**base, **given})


def workload(name: str, account: str, **given: object) -> Workload:
    uid = f"cluster//{name}/{account}/{given.get('network', '')}/{given.get('node', '')}"
    fields: dict[str, object] = {
        "uid": uid,
        "name": name,
        "namespace": "web",
        "service_account": account,
        "addresses": (ip_address("198.18.1.1"),),
        **given,
    }
    return Workload(**fields)  # type: ignore[arg-type]


def mesh(*workloads: Workload) -> Snapshot:
    return Snapshot.of(MeshState(workloads=workloads), 1)


@pytest.fixture
def netns(monkeypatch: pytest.MonkeyPatch) -> str:
    """A path that stands for a namespace of a pod: another inode on the same device."""
    real = os.stat
    own = real("/proc/self/ns/net")

    def stat(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path) == "/run/netns/pod-a":
            return os.stat_result((*own[:1], own.st_ino + 1, *own[2:10]))
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    return "pod-a"


def asked(netns: str, **given: object) -> AttachRequest:
    return AttachRequest(pod="web/a", netns=netns, **given)  # type: ignore[arg-type]


def plan(request: AttachRequest, base: Settings, known: Snapshot, now: datetime) -> Attachment:
    """A plan for a pod whose namespace the caller named."""
    assert request.netns is not None
    return attach_plan.plan(request, Located(find_netns(request.netns)), base, known, now)


def test_the_account_comes_from_the_mesh_state(netns: str) -> None:
    wanted = plan(asked(netns), settings(), mesh(workload("a", "shop")), NOW)
    assert wanted.service_account == "shop"
    assert wanted.netns == "/run/netns/pod-a"


def test_an_unknown_pod_is_refused_unless_its_account_is_given(netns: str) -> None:
    with pytest.raises(MeshbpfError, match="does not know pod web/a") as caught:
        plan(asked(netns), settings(), mesh(), NOW)
    assert (caught.value.code, caught.value.exit_status) == ("unknown-pod", Exit.FAILED)
    assert plan(asked(netns, service_account="shop"), settings(), mesh(), NOW).service_account == (
        "shop"
    )


def test_an_account_that_the_mesh_contradicts_is_refused(netns: str) -> None:
    with pytest.raises(MeshbpfError, match="the mesh state has web/a under shop") as caught:
        plan(asked(netns, service_account="root"), settings(), mesh(workload("a", "shop")), NOW)
    assert caught.value.code == "account-contradicted"


def test_two_accounts_of_one_name_must_be_told_apart_by_the_caller(netns: str) -> None:
    both = mesh(workload("a", "shop"), workload("a", "stock"))
    with pytest.raises(MeshbpfError, match="shop, stock"):
        plan(asked(netns), settings(), both, NOW)
    assert plan(asked(netns, service_account="stock"), settings(), both, NOW).service_account == (
        "stock"
    )


def test_of_workloads_with_one_name_this_nodes_counts(netns: str) -> None:
    both = mesh(workload("a", "shop", node="node1"), workload("a", "stock", node="node2"))
    assert plan(asked(netns), settings(), both, NOW).service_account == "shop"
    other = settings(node="node2")
    assert plan(asked(netns), other, both, NOW).service_account == "stock"


@pytest.mark.parametrize("account", ["", "a/b", "UPPER", "x" * 254])
def test_what_cannot_be_an_account_is_refused(netns: str, account: str) -> None:
    with pytest.raises(MeshbpfError, match="not a service account"):
        plan(asked(netns, service_account=account), settings(), mesh(), NOW)


def test_options_default_to_those_of_run_and_are_replaced_by_the_request(netns: str) -> None:
    base = settings(
        on_agent_down="open",
        exempt=Exemptions(frozenset({22}), (ip_network("10.0.0.0/8"),), frozenset({"eth1"})),
    )
    known = mesh(workload("a", "shop"))
    default = plan(asked(netns), base, known, NOW)
    assert default.on_agent_down == "open"
    assert default.exempt_ports == (22,)
    assert default.exempt_cidrs == ("10.0.0.0/8",)
    assert default.exempt_interfaces == ("eth1",)
    own = asked(netns, on_agent_down="closed", exempt_ports=(), exempt_cidrs=("fd00::/8",))
    chosen = plan(own, base, known, NOW)
    assert chosen.on_agent_down == "closed"
    assert chosen.exempt_ports == ()
    assert chosen.exempt_cidrs == ("fd00::/8",)
    assert chosen.exempt_interfaces == ("eth1",)


@pytest.mark.parametrize(
    "given", [{"exempt_ports": (0,)}, {"exempt_ports": (65536,)}, {"exempt_cidrs": ("10.0.0.1/8",)}]
)
def test_wrong_options_are_refused(netns: str, given: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        plan(asked(netns, **given), settings(), mesh(workload("a", "shop")), NOW)


def test_a_missing_namespace_is_named() -> None:
    with pytest.raises(MeshbpfError, match="/run/netns/nobody-made-this: No such file") as caught:
        find_netns("nobody-made-this")
    assert (caught.value.code, caught.value.exit_status) == ("no-netns", Exit.FAILED)


def test_the_agents_own_namespace_is_refused() -> None:
    with pytest.raises(MeshbpfError, match="the agent's own"):
        find_netns("/proc/self/ns/net")


@pytest.mark.parametrize("text", ["", "a/b", "./x", "../x"])
def test_a_relative_path_means_nothing_to_the_agent(text: str) -> None:
    with pytest.raises(MeshbpfError, match="does not name a network namespace"):
        find_netns(text)


def test_a_file_that_is_no_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(MeshbpfError, match="is not a network namespace"):
        find_netns(str(tmp_path / "x"))


def test_the_identity_is_in_the_meshs_trust_domain_or_else_in_ours(netns: str) -> None:
    known = mesh(workload("a", "shop", trust_domain="td1"))
    attachment = plan(asked(netns), settings(), known, NOW)
    ours = settings(trust_domain="td2")
    assert identity(attachment, ours, known) == SpiffeId("td1", "web", "shop")
    assert identity(attachment, ours, mesh()) == SpiffeId("td2", "web", "shop")


# --- by name ----------------------------------------------------------------

HERE = Located(
    NetnsPath(Path("/run/netns/cni-1"), 4, 77),
    sandbox="5" * 64,
    uid="u-1",
    cgroup="/kubepods/podu-1",
    addresses=frozenset({ip_address("198.18.1.1"), ip_address("fd00:6d62::1")}),
)
BY_NAME = AttachRequest(pod="web/a")


def test_by_name_the_account_is_that_of_the_workload_with_the_pods_addresses() -> None:
    elsewhere = workload("a", "stock", addresses=(ip_address("198.18.1.9"),), node="node1")
    known = mesh(elsewhere, workload("a", "shop"))
    wanted = attach_plan.plan(BY_NAME, HERE, settings(), known, NOW)
    assert wanted.service_account == "shop"
    assert (wanted.by_name, wanted.account_given) == (True, False)
    assert (wanted.sandbox, wanted.uid, wanted.cgroup) == ("5" * 64, "u-1", "/kubepods/podu-1")
    assert (wanted.netns, wanted.netns_inode) == ("/run/netns/cni-1", 77)


def test_a_workload_of_that_name_with_other_addresses_is_another_pod() -> None:
    known = mesh(workload("a", "shop", addresses=(ip_address("198.18.1.9"),)))
    assert awaits_mesh(BY_NAME, HERE, settings(), known)
    with pytest.raises(
        MeshbpfError, match=r"with 198\.18\.1\.9, and the pod here has 198"
    ) as caught:
        attach_plan.plan(BY_NAME, HERE, settings(), known, NOW)
    assert caught.value.code == "other-addresses"


def test_only_a_pod_found_by_name_waits_for_the_mesh_state(netns: str) -> None:
    assert awaits_mesh(BY_NAME, HERE, settings(), mesh())
    assert not awaits_mesh(BY_NAME, HERE, settings(), mesh(workload("a", "shop")))
    given = AttachRequest(pod="web/a", service_account="shop")
    assert not awaits_mesh(given, HERE, settings(), mesh())
    assert not awaits_mesh(asked(netns), Located(find_netns(netns)), settings(), mesh())


def test_by_name_an_account_is_taken_that_the_mesh_state_does_not_contradict() -> None:
    given = AttachRequest(pod="web/a", service_account="shop")
    stale = mesh(workload("a", "stock", addresses=(ip_address("198.18.1.9"),)))
    assert attach_plan.plan(given, HERE, settings(), mesh(), NOW).account_given
    for known in (mesh(workload("a", "stock")), stale):
        with pytest.raises(MeshbpfError, match="under stock") as caught:
            attach_plan.plan(given, HERE, settings(), known, NOW)
        assert caught.value.code == "account-contradicted"


def test_neither_the_mesh_state_nor_the_caller_knowing_it_is_refused() -> None:
    with pytest.raises(MeshbpfError, match="its service account is not known") as caught:
        attach_plan.plan(BY_NAME, HERE, settings(), mesh(), NOW)
    assert caught.value.code == "unknown-pod"


def test_the_next_life_keeps_the_options_and_asks_for_the_account_again() -> None:
    first = attach_plan.plan(
        AttachRequest(pod="web/a", on_agent_down="open", exempt_ports=(22,)),
        HERE,
        settings(),
        mesh(workload("a", "shop")),
        NOW,
    )
    there = Located(
        NetnsPath(Path("/run/netns/cni-2"), 4, 78),
        sandbox="6" * 64,
        addresses=frozenset({ip_address("198.18.1.2")}),
    )
    with pytest.raises(MeshbpfError, match="not the same pod"):
        next_life(first, there, settings(), mesh(workload("a", "shop")), NOW)
    moved = mesh(workload("a", "till", addresses=(ip_address("198.18.1.2"),)))
    second = next_life(first, there, settings(), moved, NOW)
    assert second.service_account == "till"
    assert (second.netns, second.sandbox, second.uid) == ("/run/netns/cni-2", "6" * 64, "")
    assert (second.on_agent_down, second.exempt_ports) == ("open", (22,))


def test_an_account_that_the_caller_gave_holds_for_the_next_life() -> None:
    given = AttachRequest(pod="web/a", service_account="shop")
    first = attach_plan.plan(given, HERE, settings(), mesh(), NOW)
    assert next_life(first, HERE, settings(), mesh(), NOW).service_account == "shop"


def test_a_pod_whose_sidecar_speaks_hbone_is_not_attached(netns: str) -> None:
    known = mesh(workload("a", "app", native_tunnel=True))
    with pytest.raises(MeshbpfError) as raised:
        plan(asked(netns), settings(), known, NOW)
    assert raised.value.code == "native-tunnel"
