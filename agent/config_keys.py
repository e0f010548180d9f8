"""Every setting of `run` that a file, the environment or a flag can give.

One table is the whole interface: the key in the file is the flag's long name
(in the plural where the flag may be repeated), and the environment's name is
the key's in capitals with MESHBPF_ before it. docs/configuration.md shows the
same table; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from meshbpf.agent.config import (
    CaptureName,
    LogFormat,
    LogLevel,
    OnAgentDownName,
    ProxyName,
    SameNodeName,
    parse_cidrs,
    parse_duration_s,
    parse_ports,
)
from meshbpf.agent.core.errors import ConfigError

ENVIRONMENT_PREFIX = "MESHBPF_"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting."""

    name: str
    """In the file."""
    field: str
    """The field of Settings, or of its exemptions."""
    type: Any
    """What the file may hold, for msgspec."""
    parse: Callable[[Any], Any]
    """From the file's value to the field's; ConfigError when it makes no sense."""
    flag: str = ""

    @property
    def environment(self) -> str:
        """Its variable."""
        return ENVIRONMENT_PREFIX + self.name.upper().replace("-", "_")

    @property
    def option(self) -> str:
        """Its flag on the command line."""
        return self.flag or f"--{self.name}"

    @property
    def expected(self) -> str:
        """What its value is, in words."""
        if choices := get_args(self.type) if get_origin(self.type) is Literal else ():
            return f"one of: {', '.join(choices)}"
        return _IN_WORDS[self.type]

    def of_text(self, text: str) -> Any:
        """The value of an environment variable: lists with commas, numbers in digits."""
        value: Any = text
        if self.type in (list[str], list[int | str]):
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif self.type is int:
            value = int(text) if text.isascii() and text.strip().isdigit() else text
        elif self.type is bool:
            value = {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
        return self.check(value)

    def check(self, value: Any) -> Any:
        """The setting of a value that was written; ConfigError when it cannot be one."""
        try:
            typed = msgspec.convert(value, self.type, strict=True)
        except msgspec.ValidationError:
            quotes = self.type is str and isinstance(value, int | float)
            raise ConfigError(
                "bad-type",
                f"{value!r} is not {self.expected}",
                "put quotes round it" if quotes else "",
            ) from None
        return self.parse(typed)


def _as_is(value: Any) -> Any:
    return value


def _duration(value: float | str) -> float:
    return parse_duration_s(value) if isinstance(value, str) else float(value)


def _ports(values: Sequence[int | str]) -> frozenset[int]:
    return parse_ports(map(str, values))


def _paths(values: Sequence[str]) -> tuple[Path, ...]:
    return tuple(map(Path, values))


_DURATION = int | float | str
_IN_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list[str]: "a list of texts",
    list[int | str]: "a list of ports",
    _DURATION: "a time such as 30s",
}

KEYS: tuple[Key, ...] = (
    Key("node", "node", str, _as_is),
    Key("state-dir", "state_dir", str, Path),
    Key("ca-dir", "ca_dir", str, Path),
    Key("local-xds", "local_xds", str, Path),
    Key("manifests", "manifests", str, Path),
    Key("kubernetes", "kubernetes", bool, _as_is),
    Key("kubeconfig", "kubeconfig", str, Path),
    Key("xds", "xds", str, _as_is),
    Key("xds-root", "xds_root", str, _as_is),
    Key("xds-name", "xds_name", str, _as_is),
    Key("ca", "ca", str, _as_is),
    Key("ca-root", "ca_root", str, _as_is),
    Key("ca-name", "ca_name", str, _as_is),
    Key("token-file", "token_file", str, Path),
    Key("cluster-id", "cluster_id", str, _as_is),
    Key("trust-domain", "trust_domain", str, _as_is),
    Key("network", "network", str, _as_is),
    Key("capture", "capture", CaptureName, _as_is),
    Key("on-agent-down", "on_agent_down", OnAgentDownName, _as_is),
    Key("same-node", "same_node", SameNodeName, _as_is),
    Key("proxy", "proxy", ProxyName, _as_is),
    Key("zds-socket", "zds_socket", str, Path),
    Key("require-waypoint", "require_waypoint", bool, _as_is),
    Key("pods-from", "pods_from", str, _as_is),
    Key("exempt-ports", "exempt_ports", list[int | str], _ports, "--exempt-port"),
    Key("exempt-cidrs", "exempt_cidrs", list[str], parse_cidrs, "--exempt-cidr"),
    Key("exempt-interfaces", "exempt_interfaces", list[str], frozenset, "--exempt-interface"),
    Key("dns", "dns", bool, _as_is),
    Key("cluster-domain", "cluster_domain", str, _as_is),
    Key("probe-cgroups", "probe_cgroups", list[str], _paths, "--probe-cgroup"),
    Key("cert-ttl", "cert_ttl_s", _DURATION, _duration),
    Key("crl-dir", "crl_dir", str, Path),
    Key("lease", "lease_s", _DURATION, _duration),
    Key("heartbeat-limit", "heartbeat_limit_s", _DURATION, _duration),
    Key("cri-socket", "cri_socket", str, Path),
    Key("account-wait", "account_wait_s", _DURATION, _duration),
    Key("enrol", "enrol", bool, _as_is),
    Key("pod-connections", "pod_connections", int, _as_is),
    Key("pod-memory", "pod_memory", int, _as_is),
    Key("keepalive", "keepalive", bool, _as_is),
    Key("keepalive-time", "keepalive_time_s", _DURATION, _duration),
    Key("keepalive-interval", "keepalive_interval_s", _DURATION, _duration),
    Key("keepalive-retries", "keepalive_retries", int, _as_is),
    Key("user-timeout", "user_timeout", bool, _as_is),
    Key("stream-window", "stream_window", int, _as_is),
    Key("tunnel-window", "tunnel_window", int, _as_is),
    Key("tunnel-streams", "tunnel_streams", int, _as_is),
    Key("tunnel-idle", "tunnel_idle_s", _DURATION, _duration),
    Key("termination-deadline", "termination_deadline_s", _DURATION, _duration),
    Key("reload-deadline", "reload_deadline_s", _DURATION, _duration),
    Key("readiness-port", "readiness_port", int, _as_is),
    Key("admin-port", "admin_port", int, _as_is),
    Key("admin-open", "admin_open", bool, _as_is),
    Key("stats-port", "stats_port", int, _as_is),
    Key("metric-labels", "metric_labels", list[str], tuple, "--metric-label"),
    Key("metrics-grace", "metrics_grace_s", _DURATION, _duration),
    Key("otlp", "otlp", str, _as_is),
    Key("log-level", "log_level", LogLevel, _as_is),
    Key("log-format", "log_format", LogFormat, _as_is),
)

STATE_SOURCES = ("local-xds", "manifests", "kubernetes", "xds")
CERTIFICATE_SOURCES = ("ca-dir", "ca")
"""Exactly one of each is to be set; of certificates none where ztunnel is the proxy."""

BY_NAME = {key.name: key for key in KEYS}
EXEMPT_FIELDS = {
    "exempt_ports": "ports",
    "exempt_cidrs": "cidrs",
    "exempt_interfaces": "interfaces",
}


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's value, and where it stands."""

    value: Any
    origin: str
    """`default`, `flag`, `env NAME`, or FILE:LINE."""


def misplaced(origin: str, key: str, error: ConfigError) -> ConfigError:
    """`error` about the value of `key`, with the place where it stands."""
    what = error.what.removeprefix(f"--{key}: ")
    return ConfigError(error.code, f"{origin}: {key}: {what}", error.hint)
