"""Each view, compared with a file that a person has read."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import yaml

from meshbpf.agent.api import Result
from tests.cli import samples

# name of the golden file, verb, answer, command line
VIEWS: tuple[tuple[str, str, Result, tuple[str, ...]], ...] = (
    ("status-ready", "status", samples.STATUS, ("status",)),
    ("status-not-ready", "status", samples.STATUS_NOT_READY, ("status",)),
    ("status-reloaded", "status", samples.STATUS_RELOADED, ("status",)),
    ("reloaded", "reload", samples.RELOADED, ("reload",)),
    ("pods", "pods", samples.PODS, ("pods",)),
    ("pods-none", "pods", samples.NO_PODS, ("pods",)),
    ("pods-of-a-namespace", "pods", samples.PODS, ("pods", "-n", "default")),
    ("workloads", "workloads", samples.WORKLOADS, ("workloads",)),
    ("workloads-of-a-namespace", "workloads", samples.WORKLOADS, ("workloads", "-n", "default")),
    ("services", "services", samples.SERVICES, ("services",)),
    ("services-of-a-namespace", "services", samples.SERVICES, ("services", "-n", "shop")),
    ("policies", "policies", samples.POLICIES, ("policies",)),
    ("policies-of-a-namespace", "policies", samples.POLICIES, ("policies", "-n", "default")),
    ("explain", "explain", samples.EXPLANATION, ("explain", "default/web-0", "db")),
    ("log", "log", samples.LOG, ("log",)),
    ("certs", "certs", samples.CERTS, ("certs",)),
    ("connections", "connections", samples.CONNECTIONS, ("connections",)),
    ("connections-none", "connections", samples.NO_CONNECTIONS, ("connections",)),
    ("connections-of-a-namespace", "connections", samples.CONNECTIONS, ("connections", "-nshop")),
    ("attached", "attach", samples.ATTACHED, ("attach", "--pod=default/web", "--netns=x")),
    ("attach-updated", "attach", samples.UPDATED, ("attach", "--pod=default/web", "--netns=x")),
    ("attach-unchanged", "attach", samples.UNCHANGED, ("attach", "--pod=default/web", "--netns=x")),
    ("detached", "detach", samples.DETACHED, ("detach", "--pod=default/web")),
    ("detach-not-attached", "detach", samples.NOT_ATTACHED, ("detach", "--pod=default/web")),
)
IDS = [view[0] for view in VIEWS]


@pytest.mark.parametrize(("name", "verb", "answer", "arguments"), VIEWS, ids=IDS)
def test_a_table_looks_as_it_was_read(
    agent: Any, invoke: Any, golden: Any, name: str, verb: str, answer: Result, arguments: Any
) -> None:
    agent(**{verb: answer})
    done = invoke(*arguments)
    assert done.exception is None
    golden(name, done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "verb", "answer", "arguments"), VIEWS, ids=IDS)
def test_json_and_yaml_say_the_same_and_no_less_than_the_agent(
    agent: Any, invoke: Any, name: str, verb: str, answer: Result, arguments: Any
) -> None:
    agent(**{verb: answer})
    from_json = json.loads(invoke(*arguments, "-o", "json").stdout)
    from_yaml = yaml.safe_load(invoke(*arguments, "-o", "yaml").stdout)
    assert from_json == from_yaml
    assert from_json.pop("apiVersion") == "meshbpf/v1"
    assert from_json.pop("kind") == verb.capitalize()
    if "-n" not in " ".join(arguments).split("--netns")[0]:
        assert msgspec.convert(from_json, type(answer)) == answer


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_machine_output_of_status_is_an_interface(
    agent: Any, invoke: Any, golden: Any, form: str
) -> None:
    agent(status=samples.STATUS)
    golden(f"status-{form}", invoke("status", "-o", form).stdout)


@pytest.mark.parametrize("form", ["table", "json", "yaml"])
@pytest.mark.parametrize(
    ("verb", "answer"),
    [
        ("workloads", samples.WORKLOADS),
        ("pods", samples.PODS),
        ("policies", samples.POLICIES),
        ("status", samples.STATUS_NOT_READY),
    ],
)
def test_no_byte_of_a_hostile_name_reaches_the_terminal(
    agent: Any, invoke: Any, verb: str, answer: Result, form: str
) -> None:
    agent(**{verb: answer})
    output = invoke(verb, "-o", form).stdout
    assert "evil" in output
    assert output.isascii()
    assert all(char.isprintable() or char == "\n" for char in output)


def test_colour_is_for_terminals_only_and_no_color_turns_it_off(
    agent: Any, invoke: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent(status=samples.STATUS)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32mready" in invoke("status", color=True).stdout
    assert "\x1b" not in invoke("status").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in invoke("status", color=True).stdout


def test_status_ends_with_1_while_not_ready_and_0_when_ready(agent: Any, invoke: Any) -> None:
    fake = agent(status=samples.STATUS_NOT_READY)
    assert invoke("status").return_value == 1
    fake.answers = {"status": samples.STATUS}
    assert invoke("status").return_value == 0


def test_a_cut_list_of_connections_says_so_on_stderr(agent: Any, invoke: Any) -> None:
    cut = msgspec.structs.replace(samples.CONNECTIONS, total=40)
    fake = agent(connections=cut)
    done = invoke("connections", "--limit", "2", "--direction", "inbound", "--pod", "db-0.shop")
    assert done.stderr == "2 of 40 connections shown: see --limit\n"
    (request,) = fake.requests
    assert (request.limit, request.direction, request.pod) == (2, "inbound", "shop/db-0")


def test_attach_passes_each_option_on(agent: Any, invoke: Any) -> None:
    fake = agent(attach=samples.ATTACHED)
    invoke(
        *("attach", "--pod", "web", "-n", "default", "--netns", "/run/netns/web"),
        *("--service-account", "sa", "--on-agent-down", "open", "--exempt-port", "22,8000-8002"),
        *("--exempt-port", "9", "--exempt-cidr", "198.51.100.0/24", "--exempt-interface", "eth1"),
        "--no-dns",
        "--same-node",
        "hbone",
    )
    (request,) = fake.requests
    assert msgspec.structs.asdict(request) == {
        "pod": "default/web",
        "netns": "/run/netns/web",
        "pid": None,
        "container": None,
        "service_account": "sa",
        "on_agent_down": "open",
        "same_node": "hbone",
        "exempt_ports": (9, 22, 8000, 8001, 8002),
        "exempt_cidrs": ("198.51.100.0/24",),
        "exempt_interfaces": ("eth1",),
        "dns": False,
    }


def test_attach_leaves_what_was_not_given_to_the_agent(agent: Any, invoke: Any) -> None:
    fake = agent(attach=samples.ATTACHED)
    invoke("attach", "--pod", "default/web", "--netns", "web")
    (request,) = fake.requests
    given = {name: value for name, value in msgspec.structs.asdict(request).items() if value}
    assert given == {"pod": "default/web", "netns": "web"}


@pytest.mark.parametrize(
    ("argv", "place"),
    [
        ((), {}),
        (("--pid", "4711"), {"pid": 4711}),
        (("--container", "0123456789ab"), {"container": "0123456789ab"}),
    ],
)
def test_attach_needs_no_place_and_takes_three_kinds(
    agent: Any, invoke: Any, argv: tuple[str, ...], place: dict[str, object]
) -> None:
    fake = agent(attach=samples.ATTACHED)
    invoke("attach", "--pod", "default/web", *argv)
    (request,) = fake.requests
    given = {name: value for name, value in msgspec.structs.asdict(request).items() if value}
    assert given == {"pod": "default/web", **place}


def test_log_passes_levels_on_and_says_how_long_they_last(agent: Any, invoke: Any) -> None:
    fake = agent(log=samples.LOG_FOR_A_TIME)
    done = invoke("log", "--level", "debug", "--level", "access=off", "--reset", "--for", "5m")
    assert done.stderr == "the change is taken back in 5m\n"
    (request,) = fake.requests
    assert (request.level, request.reset, request.for_s) == ("debug,access=off", True, 300.0)


def test_log_for_a_time_without_a_change_is_wrong_usage(invoke: Any) -> None:
    assert "add --level or --reset" in str(invoke("log", "--for", "5m").exception)


def test_version_without_an_agent_is_no_failure(invoke: Any) -> None:
    done = invoke("version", "-o", "json")
    body = json.loads(done.stdout)
    assert done.exception is None
    assert body["agent"] is None
    assert body["error"]["code"] == "agent-not-running"
    assert body["client"]["version"] == "0.1.0"


def test_version_shows_both_sides(agent: Any, invoke: Any) -> None:
    agent(version=samples.VERSION)
    body = json.loads(invoke("version", "-o", "json").stdout)
    assert body["agent"]["kernel"] == "6.1.0-28-amd64"
    assert "agent:    0.1.0 (Python 3.11.2, API meshbpf/v1)" in invoke("version").stdout
