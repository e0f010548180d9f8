"""The admin and metrics ports of running agents, as a person or a scraper meets them."""

from __future__ import annotations

import gzip
import json
import subprocess
from typing import Any

import pytest

from tests.progs.pod import NAMESPACE
from tests.progs.program import eventually
from tests.progs.server import ECHO
from tests.telemetry.web import Web
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

NOBODY = 65534
PROTECTED = (
    ("GET", "/config_dump"),
    ("GET", "/overview"),
    ("POST", "/logging?level=debug"),
    ("POST", "/quitquitquit"),
    ("GET", "/debug/pprof/profile?seconds=1"),
    ("GET", "/debug/pprof/heap"),
    ("POST", "/debug/pprof/heap/profiling?activate=true"),
    ("GET", "/debug/tasks"),
)


@pytest.mark.compat
def test_metrics_are_served_in_both_formats_by_accept_and_on_both_paths(web: Web) -> None:
    for path in ("/metrics", "/stats/prometheus"):
        status, headers, body = web(1, 15020, path)
        assert (status, headers["content-type"]) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        assert "# TYPE istio_tcp_connections_opened_total counter\n" in body
        assert not body.endswith("# EOF\n")
        status, headers, body = web(
            1, 15020, path, headers={"Accept": "application/openmetrics-text;q=0.9"}
        )
        assert headers["content-type"].startswith("application/openmetrics-text")
        assert "# TYPE istio_tcp_connections_opened counter\n" in body
        assert body.endswith("# EOF\n")
    metrics = web.metrics(1)
    assert any('component="ztunnel"' in labels for labels in metrics["istio_build"])
    assert metrics["process_open_fds"][""] > 10
    assert metrics["process_max_fds"][""] >= metrics["process_open_fds"][""]
    assert metrics["meshbpf_pods"]['{state="attached"}'] == 2
    assert web(1, 15020, "/other")[0] == 404


@pytest.mark.compat
@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_who_is_not_root_gets_the_page_and_nothing_else(web: Web, method: str, path: str) -> None:
    status, _headers, body = web(1, 15000, path, method, user=NOBODY)
    assert status == 403
    assert "only root" in body
    assert web(1, 15000, "/", user=NOBODY)[0] == 200


@pytest.mark.compat
def test_both_loopback_addresses_answer_root_and_no_other_address_does(
    bed: Testbed, web: Web
) -> None:
    for host in ("127.0.0.1", "::1"):
        assert web(1, 15000, "/overview", host=host)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        bed.connect(bed["n1a"], "198.18.0.1", 15000)


@pytest.mark.compat
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example:15000"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Origin": "http://attacker.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_page_of_another_site_is_refused_even_in_roots_browser(
    web: Web, headers: dict[str, str]
) -> None:
    status, _, body = web(1, 15000, "/quitquitquit", "POST", headers=headers)
    assert status == 403
    assert "answered" in body or "not this agent" in body


@pytest.mark.compat
def test_the_configuration_dump_has_ztunnels_shape_and_live_connections(
    bed: Testbed, web: Web
) -> None:
    client, server = bed["n1a"], bed["n2a"]
    with bed.connect(client, server.ipv4, ECHO) as sock:
        port = sock.getsockname()[1]
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        dumps: list[dict[str, Any]] = [
            json.loads(web(node, 15000, "/config_dump")[2]) for node in (1, 2)
        ]
    assert set(dumps[0]) == {
        *("workloads", "services", "policies", "stagedServices", "staticConfig", "version"),
        *("config", "certificates", "workloadState"),
    }
    source, destination = dumps
    (outbound,) = [
        one
        for state in source["workloadState"].values()
        for one in state["connections"]["outbound"]
        if one["src"] == f"{client.ipv4}:{port}"
    ]
    assert outbound == {
        "src": f"{client.ipv4}:{port}",
        "originalDst": f"{server.ipv4}:{ECHO}",
        "actualDst": f"{server.ipv4}:15008",
        "protocol": "HBONE",
    }
    inbound = [
        one
        for state in destination["workloadState"].values()
        if state["info"]["name"] == server.name
        for one in state["connections"]["inbound"]
    ]
    assert [one["actualDst"] for one in inbound] == [f"{server.ipv4}:{ECHO}"]
    states = {cert["identity"]: cert for cert in source["certificates"]}
    assert states[client.identity]["state"] == "Available"
    assert states[client.identity]["certChain"][0]["serialNumber"].isdigit()
    names = {one["name"]: one for one in source["workloads"]}
    assert names["n1a"]["namespace"] == NAMESPACE
    assert names["n1a"]["protocol"] == "HBONE"
    assert names["n1a"]["workloadIps"] == [client.ipv4, client.ipv6]


@pytest.mark.compat
def test_log_levels_change_by_http_and_by_command_and_return(bed: Testbed, web: Web) -> None:
    assert web(1, 15000, "/logging", "POST")[2] == "current log level is info\n"
    assert web(1, 15000, "/logging?level=access=debug", "POST")[2] == (
        "current log level is access=debug,info\n"
    )
    with bed.connect(bed["n1a"], bed["n2a"].ipv4, ECHO):

        def told() -> bool:
            return any(one["message"] == "connection opened" for one in web.log_lines(1))

        eventually("the opening was logged", told, 10.0)
    shown = bed.agents[1].cli("log").stdout
    assert "access  debug" in shown
    bed.agents[1].cli("log", "--level", "pods:error", "--for", "1s")
    assert web(1, 15000, "/logging?reset", "POST")[2] == "current log level is info\n"
    status, _, body = web(1, 15000, "/logging?level=loud", "POST")
    assert status == 400
    assert "usage: POST /logging" in body
    assert web(1, 15000, "/logging")[0] == 405
    assert bed.agents[1].cli("log", "--level", "nowhere=debug", check=False).returncode == 1


@pytest.mark.compat
def test_a_level_for_a_time_is_taken_back(bed: Testbed, web: Web) -> None:
    bed.agents[1].cli("log", "--level", "pods=error", "--for", "1s")

    def back() -> bool:
        return web(1, 15000, "/logging", "POST")[2] == "current log level is info\n"

    eventually("the level is back", back, 10.0)


@pytest.mark.compat
def test_policies_are_listed_by_the_command(bed: Testbed) -> None:
    rules = [[[{"destinationPorts": [9]}]]]
    with bed.policy(action="Deny", name="no-nine", rules=rules):
        shown = bed.agents[1].cli("policies").stdout
    assert f"{NAMESPACE}  " in shown
    assert "no-nine" in shown
    assert "DENY" in shown


@pytest.mark.compat
def test_profiles_and_the_task_dump_come_from_the_live_agent(web: Web) -> None:
    status, headers, body = web(1, 15000, "/debug/pprof/profile?seconds=1&frequency=50")
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert b"nanoseconds" in gzip.decompress(body.encode("latin-1"))
    assert web(1, 15000, "/debug/pprof/profile?seconds=1&format=collapsed&waiting")[0] == 200
    assert web(1, 15000, "/debug/pprof/profile?seconds=301")[0] == 400
    assert web(1, 15000, "/debug/pprof/profile?frequency=1001")[0] == 400
    assert web(1, 15000, "/debug/pprof/heap")[0] == 500
    assert web(1, 15000, "/debug/pprof/heap/profiling?activate=true", "POST")[2] == (
        "heap profiling active: true\n"
    )
    try:
        status, _, body = web(1, 15000, "/debug/pprof/heap")
        assert status == 200
        assert b"inuse_space" in gzip.decompress(body.encode("latin-1"))
    finally:
        web(1, 15000, "/debug/pprof/heap/profiling?activate=false", "POST")
    tasks = web(1, 15000, "/debug/tasks")[2]
    assert "Heartbeat.tick" in tasks
    assert "httpd.py" in tasks


@pytest.mark.slow
def test_series_of_a_pod_that_is_gone_are_forgotten_after_the_grace(
    bed: Testbed, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sweep comes every 30 s; the grace of these agents is 1 s.
    pod = bed.add_pod("n2z", 2)
    try:
        bed.wait_mesh()
        bed.start_servers(pod)
        bed.agents[2].attach(pod)
        with bed.connect(bed["n1a"], pod.ipv4, ECHO) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        name = "istio_tcp_connections_opened_total"
        assert any(pod.identity in labels for labels in web.metrics(2)[name])
        bed.agents[2].detach(pod)
    finally:
        bed.remove_pod(pod)

    def gone() -> bool:
        return not any(pod.identity in labels for labels in web.metrics(2).get(name, {}))

    eventually("the series are gone", gone, 40.0)


@pytest.mark.compat
def test_quitquitquit_ends_the_agent_in_order(bed: Testbed, web: Web) -> None:
    agent = bed.agents[2]
    assert web(2, 15000, "/quitquitquit")[0] == 405
    assert web(2, 15000, "/quitquitquit", "POST")[2] == "shutdown now\n"
    try:
        assert agent.program.process.wait(15) == 0
    except subprocess.TimeoutExpired:
        raise AssertionError("the agent runs on") from None
    finally:
        if not agent.running:
            agent.start(*agent.options)
