"""`check`: how findings come out, on prepared facts and on this very machine."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from meshbpf.agent.datapath.features import Feature, probe
from meshbpf.cli.checks.host import SYSCTLS, open_files, settings
from meshbpf.cli.checks.model import Category, Finding, result_of, view
from meshbpf.cli.checks.running import running_agent
from meshbpf.cli.commands.check import capture, kernel
from meshbpf.cli.options import Session
from tests.cli import samples
from tests.cli.conftest import as_root

HAS = Feature(
    name="sk_lookup hook", supported=True, required=True, least_kernel=(5, 10), consequence="none"
)
LACKS = (
    Feature(
        name="tcx",
        supported=False,
        required=False,
        least_kernel=(6, 6),
        consequence="TC programs are attached as clsact filters, which others may remove",
        detail="bpf link-create: Invalid argument (EINVAL)",
    ),
    Feature(
        name="kernel headers",
        supported=False,
        required=True,
        least_kernel=None,
        consequence="the programs cannot be compiled",
        detail="no kernel headers were found\n  hint: apt-get install linux-headers-amd64",
    ),
    Feature(
        name="cgroup v2",
        supported=False,
        required=False,
        least_kernel=None,
        consequence="capture by TC alone; the kubelet's probes are captured too",
        detail="no cgroup2 filesystem is mounted\n  hint: mount -t cgroup2 none /mnt",
    ),
)
GOOD_SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "2",
    "net.core.somaxconn": "4096",
    "net.core.bpf_jit_enable": "1",
    "kernel.unprivileged_bpf_disabled": "2",
}


def proc_sys(root: Path, values: dict[str, str]) -> Path:
    for name, value in values.items():
        path = root / name.replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def test_a_poor_machine_looks_as_it_was_read(golden: Any, tmp_path: Path) -> None:
    poor = GOOD_SYSCTLS | {"net.ipv4.ip_forward": "0", "net.core.somaxconn": "128"}
    limits = open_files(1024)
    host = settings(proc_sys(tmp_path, poor))
    result = result_of(
        (
            kernel("kernel", (HAS, *LACKS)),
            Category(name="capture", findings=(capture(LACKS, None),)),
            Category(name="host settings", findings=(*host.findings[:-1], limits)),
            running_agent(Session(state_dir=Path("/nonexistent")))[0],
        )
    )
    golden("check-poor", click.unstyle(view(result)) + "\n")


def test_a_running_agent_is_asked(agent: Any, tmp_path: Path, golden: Any) -> None:
    agent(status=samples.STATUS_NOT_READY)
    found, status = running_agent(Session(state_dir=tmp_path))
    capturing = Category(name="capture", findings=(capture((), status),))
    golden("check-agent-not-ready", click.unstyle(view(result_of((capturing, found)))) + "\n")


def test_an_agent_that_is_well_gives_no_warning(agent: Any, tmp_path: Path, golden: Any) -> None:
    agent(status=samples.STATUS)
    found, status = running_agent(Session(state_dir=tmp_path))
    capturing = Category(name="capture", findings=(capture((), status),))
    golden("check-agent-ready", click.unstyle(view(result_of((capturing, found)))) + "\n")


def test_tc_that_was_asked_for_is_no_warning() -> None:
    asked = msgspec.structs.replace(
        samples.STATUS,
        capture=msgspec.structs.replace(
            samples.STATUS.capture, requested="tc", in_force="tc", reason="asked for"
        ),
    )
    assert capture((), asked).outcome == "ok"


def test_good_settings_are_all_ok(tmp_path: Path) -> None:
    found = settings(proc_sys(tmp_path, GOOD_SYSCTLS)).findings[:-1]
    assert {finding.name: finding.outcome for finding in found} == dict.fromkeys(GOOD_SYSCTLS, "ok")


@pytest.mark.parametrize("sysctl", SYSCTLS, ids=lambda sysctl: sysctl.name)
def test_each_setting_warns_when_it_is_bad(tmp_path: Path, sysctl: Any) -> None:
    bad = "1" if sysctl.wanted(0) else "0"
    found = sysctl.look(proc_sys(tmp_path, {sysctl.name: bad}))
    assert (found.outcome, found.found) == ("warning", bad)
    assert found.consequence
    better = found.hint.rpartition("=")[2]
    assert sysctl.look(proc_sys(tmp_path, {sysctl.name: better})).outcome == "ok"


@pytest.mark.parametrize("sysctl", SYSCTLS, ids=lambda sysctl: sysctl.name)
def test_each_setting_is_one_that_this_kernel_has_or_may_lack(sysctl: Any) -> None:
    path = Path("/proc/sys") / sysctl.name.replace(".", "/")
    assert path.exists() or sysctl.look(Path("/proc/sys")).outcome == "ok"


def test_an_unlimited_number_of_open_files_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    assert settings(Path("/nonexistent")).findings[-1].outcome == "ok"


@pytest.mark.parametrize(
    ("outcomes", "strict", "status"),
    [
        (("ok",), False, 0),
        (("ok", "warning"), False, 0),
        (("ok", "warning"), True, 79),
        (("ok", "failed"), False, 79),
    ],
)
def test_problems_end_with_79_and_warnings_only_when_strict(
    invoke: Any,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: tuple[Any, ...],
    strict: bool,
    status: int,
) -> None:
    findings = tuple(Finding(name=f"f{i}", outcome=o) for i, o in enumerate(outcomes))
    only = Category(name="all", findings=findings)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("meshbpf.agent.datapath.features.probe", lambda: ())
    monkeypatch.setattr("meshbpf.cli.commands.check.settings", lambda: only)
    monkeypatch.setattr("meshbpf.cli.commands.check.running_agent", lambda _: (only, None))
    done = invoke("check", *(("--strict",) if strict else ()))
    assert done.exception is None
    assert done.return_value == status


@as_root
@pytest.mark.root
def test_this_machine_is_told_what_the_probes_say(meshbpf: Any, tmp_path: Path) -> None:
    ran = meshbpf("--state-dir", tmp_path, "check", "-o", "json")
    body = json.loads(ran.stdout)
    kernel_findings = {
        finding["name"]: finding["outcome"]
        for category in body["categories"][:2]
        for finding in category["findings"]
    }
    probed = {
        item.name: "ok" if item.supported else "failed" if item.required else "warning"
        for item in probe()
    }
    assert kernel_findings == probed
    assert ran.status == (79 if "failed" in probed.values() else 0)
    assert ran.stderr == ""
