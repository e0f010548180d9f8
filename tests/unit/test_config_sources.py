"""Settings from flags, the environment and a file: which one counts, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest

from meshbpf.agent import config_place
from meshbpf.agent.config import OptionError, Settings, duration_text, parse_duration_s
from meshbpf.agent.config_keys import EXEMPT_FIELDS, KEYS
from meshbpf.agent.config_place import STATE_DIR_VARIABLE, client_state_dir, find_file
from meshbpf.agent.config_sources import resolve
from meshbpf.agent.core.errors import ConfigError, Exit

NEEDED = "ca-dir: /etc/ca\nlocal-xds: /etc/mesh.yaml\n"


@pytest.fixture(autouse=True)
def _no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_place, "DEFAULT_FILE", tmp_path / "not-there.yaml")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refused(file: Path, text: str) -> ConfigError:
    """What is said of a file that holds `text` on its third line and on."""
    file.write_text(NEEDED + text)
    with pytest.raises(ConfigError) as caught:
        resolve({}, {}, file).settings()
    assert caught.value.exit_status is Exit.CONFIG
    return caught.value


def test_every_setting_can_be_given_by_key() -> None:
    known = {item.name for item in fields(Settings)} - {"origins", "exempt"} | set(EXEMPT_FIELDS)
    assert {key.field for key in KEYS} == known


def test_flag_before_environment_before_file_before_default(file: Path) -> None:
    file.write_text(NEEDED + "lease: 1m\nnetwork: from-file\ncert-ttl: 2h\n")
    environ = {"MESHBPF_LEASE": "2m", "MESHBPF_NETWORK": "from-env", "MESHBPF_PORT": "tcp://1"}
    found = resolve({"lease_s": 180.0}, environ, file)
    shown = {name: (one.value, one.origin) for name, one in found.values.items()}
    assert shown["lease"] == (180.0, "flag")
    assert shown["network"] == ("from-env", "env MESHBPF_NETWORK")
    assert shown["cert-ttl"] == (7200.0, f"{file}:5")
    assert shown["capture"] == ("auto", "default")
    settings = found.settings()
    assert (settings.lease_s, settings.network, settings.cert_ttl_s) == (180.0, "from-env", 7200.0)
    assert settings.origins["lease_s"] == "flag"
    assert settings.origins["cert_ttl_s"] == f"{file}:5"


def test_a_whole_file_becomes_settings(file: Path) -> None:
    file.write_text(
        NEEDED
        + """\
node: node-7          # a comment
state-dir: "/srv/meshbpf"
on-agent-down: open
exempt-ports: [22, 8000-8002]
exempt-cidrs:
  - 198.51.100.0/24
exempt-interfaces: [eth1]
probe-cgroups: [/sys/fs/cgroup/kubelet.slice]
lease: 30
heartbeat-limit: 750ms
admin-open: true
readiness-port: 15121
cri-socket: /run/cri.sock
"""
    )
    settings = resolve({}, {}, file).settings()
    assert (settings.node, settings.state_dir) == ("node-7", Path("/srv/meshbpf"))
    assert settings.on_agent_down == "open"
    assert settings.exempt.ports == {22, 8000, 8001, 8002}
    assert settings.exempt.cidrs == (ip_network("198.51.100.0/24"),)
    assert settings.exempt.interfaces == {"eth1"}
    assert settings.probe_cgroups == (Path("/sys/fs/cgroup/kubelet.slice"),)
    assert (settings.lease_s, settings.heartbeat_limit_s) == (30.0, 0.75)
    assert (settings.admin_open, settings.readiness_port) == (True, 15121)
    assert settings.cri_socket == Path("/run/cri.sock")


def test_the_environment_gives_lists_numbers_and_truths(file: Path) -> None:
    file.write_text(NEEDED)
    environ = {
        "MESHBPF_EXEMPT_PORTS": "22, 8000-8001",
        "MESHBPF_EXEMPT_CIDRS": "198.51.100.0/24,fd00::/8",
        "MESHBPF_READINESS_PORT": "15121",
        "MESHBPF_ADMIN_OPEN": "true",
    }
    settings = resolve({}, environ, file).settings()
    assert settings.exempt.ports == {22, 8000, 8001}
    assert len(settings.exempt.cidrs) == 2
    assert (settings.readiness_port, settings.admin_open) == (15121, True)
    assert settings.origins["exempt"] == "env MESHBPF_EXEMPT_CIDRS"


@pytest.mark.parametrize("text", ["", "# only a comment\n\n", "{}\n"])
def test_a_file_without_a_value_is_no_fault(file: Path, text: str) -> None:
    file.write_text(text)
    found = resolve({}, {}, file)
    assert {one.origin for one in found.values.values()} == {"default"}


def test_an_unknown_key_is_refused_with_its_line_and_a_guess(file: Path) -> None:
    error = refused(file, "lees: 5m\n")
    assert (error.what, error.hint) == (f"{file}:3: no setting 'lees'", "did you mean 'lease'?")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lease: [1]", "lease: [1] is not a time such as 30s"),
        ("lease: soon", "lease: 'soon' is not a duration"),
        ("lease: 90d", "lease: 7776000.0 cannot be used"),
        ("node: 12", "node: 12 is not a text"),
        ("node: ''", "node: '' cannot be used"),
        ("node:", "node: None is not a text"),
        ("capture: iptables", "capture: 'iptables' is not one of: auto, tc"),
        ("admin-open: yes", "admin-open: 'yes' is not true or false"),
        ("readiness-port: '7'", "readiness-port: '7' is not a whole number"),
        ("readiness-port: 7.5", "readiness-port: 7.5 is not a whole number"),
        ("readiness-port: 0", "readiness-port: 0 cannot be used"),
        ("exempt-ports: 22", "exempt-ports: 22 is not a list of ports"),
        ("exempt-ports: [70000]", "exempt-ports: '70000' is not a port"),
        ("exempt-cidrs: [10.0.0.1/8]", "exempt-cidrs: '10.0.0.1/8' is not a network"),
        ("exempt-cidrs: {a: b}", "exempt-cidrs: {'a': 'b'} is not a list of texts"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(file: Path, text: str, what: str) -> None:
    assert refused(file, f"{text}\n").what.startswith(f"{file}:3: {what}")


def test_a_key_given_twice_is_refused(file: Path) -> None:
    assert refused(file, "node: a\nnode: b\n").what == f"{file}:4: node is given twice"


def test_what_is_no_yaml_is_refused_with_its_line(file: Path) -> None:
    assert re.match(rf"{file}:\d: not YAML", refused(file, "node: [a\n").what)


def test_what_is_no_mapping_is_refused(file: Path) -> None:
    file.write_text("- node\n")
    with pytest.raises(ConfigError, match="is no mapping"):
        resolve({}, {}, file)


def test_bytes_that_are_no_text_are_refused_with_their_line(file: Path) -> None:
    file.write_bytes(b"node: a\nnetwork: \xff\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2: not UTF-8"):
        resolve({}, {}, file)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    for flag, environ in ((tmp_path / "x", {}), (None, {"MESHBPF_CONFIG": str(tmp_path / "x")})):
        with pytest.raises(ConfigError, match="No such file") as caught:
            resolve({}, environ, flag)
        assert caught.value.exit_status is Exit.CONFIG


def test_a_wrong_variable_is_named(file: Path) -> None:
    file.write_text(NEEDED)
    for name, value in (("LEASE", "soon"), ("CAPTURE", "x"), ("READINESS_PORT", "many")):
        with pytest.raises(ConfigError, match=f"^env MESHBPF_{name}: "):
            resolve({}, {f"MESHBPF_{name}": value}, file)
    with pytest.raises(ConfigError, match=r"^env MESHBPF_LEASE: lease: 7776000\.0"):
        resolve({}, {"MESHBPF_LEASE": "90d"}, file).settings()


def test_a_wrong_flag_stays_a_fault_of_the_command_line(file: Path) -> None:
    file.write_text(NEEDED)
    with pytest.raises(OptionError, match="--lease"):
        resolve({"lease_s": 1e9}, {}, file).settings()


def test_what_is_set_nowhere_is_asked_for_in_three_ways() -> None:
    with pytest.raises(ConfigError, match="ca-dir or ca is set nowhere") as caught:
        resolve({}, {}).settings()
    assert caught.value.exit_status is Exit.CONFIG
    assert caught.value.hint.startswith("give --ca-dir (or --ca), MESHBPF_CA_DIR, or ca-dir in ")


def test_commands_find_the_agent_where_run_put_it(file: Path) -> None:
    named = {"MESHBPF_CONFIG": str(file)}
    file.write_text("state-dir: /srv/a\n")
    assert client_state_dir({**named, "MESHBPF_STATE_DIR": "/srv/b"}) == Path("/srv/b")
    assert client_state_dir(named) == Path("/srv/a")
    for text in ("# no state-dir\n", "state-dir: [\n", "node: a\n"):
        file.write_text(text)
        assert client_state_dir(named) == Path("/var/lib/meshbpf")
    assert client_state_dir({}) == Path("/var/lib/meshbpf")
    assert STATE_DIR_VARIABLE in {key.environment for key in KEYS}


def test_the_usual_file_is_read_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    assert find_file({}) is None
    file.touch()
    monkeypatch.setattr(config_place, "DEFAULT_FILE", file)
    assert find_file({}) == file


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(86400.0, "1d"), (7200.0, "2h"), (90.0, "90s"), (0.75, "750ms"), (1.5, "1500ms"), (0.0, "0s")],
)
def test_durations_are_shown_as_they_are_read(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
    assert parse_duration_s(text) == seconds


def test_the_documentation_has_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", text, re.MULTILINE))
    assert list(rows) == [key.name for key in KEYS]
    for key in KEYS:
        assert f"`{key.option}`" in rows[key.name]
        assert f"`{key.environment}`" in rows[key.name]
