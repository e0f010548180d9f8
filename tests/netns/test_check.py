"""`meshbpf check` on a node that others work on too."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.progs.program import run_inside
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


def beside(bed: Testbed) -> dict[str, dict[str, Any]]:
    """The findings about neighbours, on node 1."""
    done = bed.agents[1].cli("check", "-o", "json", check=False)
    categories = json.loads(done.stdout)["categories"]
    found = next(each for each in categories if each["name"] == "beside meshbpf")
    return {each["name"]: each for each in found["findings"]}


def nft(netns: str, text: str) -> None:
    argv = ["nsenter", f"--net=/run/netns/{netns}", "nft", "-f", "-"]
    subprocess.run(argv, input=text, text=True, check=True)


def test_a_node_with_us_alone_has_no_warning_about_others(bed: Testbed) -> None:
    found = beside(bed)
    assert found["kube-proxy"]["found"].startswith("no rules of it")
    assert not [name for name in found if name.startswith("capture in pod")]
    assert found["tcx programs of others"]["outcome"] == "ok"


def test_kube_proxys_mode_is_told_and_ipvs_is_a_warning(bed: Testbed) -> None:
    node = bed.node_netns(1)
    nft(node, "add table ip kube-proxy\n")
    try:
        assert beside(bed)["kube-proxy"]["found"] == "nftables"
    finally:
        nft(node, "delete table ip kube-proxy\n")
    nft(node, "add table ip nat\nadd chain ip nat KUBE-SERVICES\n")
    try:
        assert beside(bed)["kube-proxy"]["found"] == "iptables"
    finally:
        nft(node, "delete table ip nat\n")
    # A veth in the dummy's stead, which not every kernel has: the name is what tells.
    run_inside(node, ["ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "ipvs1"])
    try:
        found = beside(bed)["kube-proxy"]
        assert (found["outcome"], found["found"]) == ("warning", "IPVS")
        assert "--proxy-mode=nftables" in found["hint"]
    finally:
        run_inside(node, ["ip", "link", "delete", "kube-ipvs0"])


def test_another_meshs_capture_in_a_pod_is_a_warning_with_its_remedy(bed: Testbed) -> None:
    pod = bed["n1a"]
    chains = ("ISTIO_OUTPUT", "PROXY_INIT_OUTPUT")
    rules = ["add table ip nat", *(f"add chain ip nat {chain}" for chain in chains)]
    nft(pod.netns, "\n".join(rules) + "\n")
    try:
        found = beside(bed)[f"capture in pod {pod.key}"]
        assert (found["outcome"], found["found"]) == ("warning", "rules of Istio and Linkerd")
        assert "two proxies" in found["consequence"]
        assert "take the pod out of one mesh" in found["hint"]
    finally:
        nft(pod.netns, "delete table ip nat\n")
