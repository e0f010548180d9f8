"""ztunnel's environment variables, where their meaning is that of a setting of ours.

So that the environment of its manifests carries over. A name of our own
(MESHBPF_...) comes before ztunnel's, and ztunnel's before the configuration
file. What is not here has no counterpart: docs/configuration.md says why.

Source: istio/ztunnel, src/config.rs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshbpf.agent.config import parse_duration_s
from meshbpf.agent.config_keys import BY_NAME, Value, misplaced
from meshbpf.agent.core.errors import ConfigError

# What duration_str, which ztunnel reads them with, takes beyond our own: 1h30m.
_PARTS = re.compile(r"(\d+(?:\.\d+)?(?:ms|s|m|h|d))")
_LEVELS = {"trace": "debug", "warn": "warning", "off": "error"}
# ztunnel's own: below this much, a grace period leaves one second, above it five.
_SHORT_GRACE_S = 10


@dataclass(frozen=True, slots=True)
class Alias:
    """One of ztunnel's variables."""

    environment: str
    key: str
    """Our setting's name."""
    read: Callable[[str], Any]
    """From the variable's text to the setting's value; None: it says nothing that we can use."""


def _text(text: str) -> str:
    return text


def url(text: str) -> str:
    """https:// is what ztunnel puts before an address without a scheme."""
    return text if "://" in text else f"https://{text}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError("bad-type", f"{text!r} is not a whole number")
    return int(text)


def _root(text: str) -> str:
    """A file, or SYSTEM. ztunnel also takes PEM itself."""
    if "-----BEGIN" in text:
        raise ConfigError("bad-type", "only the path of a file can be used here", "write a file")
    return text


def _token(text: str) -> Path:
    """A file. ztunnel also takes the token itself."""
    if not text.startswith(("/", "./")):
        raise ConfigError("bad-type", "only the path of a file can be used here", "write a file")
    return Path(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError("bad-type", f"{text!r} is not true or false")
    return text == "true"


def duration_s(text: str) -> float:
    """Seconds of "30s", "1h30m" or "24h0m0s"."""
    parts = _PARTS.findall(text.strip())
    if parts and "".join(parts) == text.strip():
        return sum(map(parse_duration_s, parts))
    return parse_duration_s(text)


def grace_s(text: str) -> float:
    """The deadline that ztunnel takes from a pod's terminationGracePeriodSeconds."""
    if not text.isdigit():
        raise ConfigError("bad-type", f"{text!r} is not a whole number of seconds")
    seconds = int(text)
    return float(max(seconds - (5 if seconds > _SHORT_GRACE_S else 1), 0))


def level(text: str) -> str | None:
    """The level without a scope in RUST_LOG: `info` of "access=debug,info"."""
    general = [part.strip().lower() for part in text.split(",") if "=" not in part and part.strip()]
    if not general:
        return None
    named = _LEVELS.get(general[-1], general[-1])
    return named if named in ("debug", "info", "warning", "error") else None


ALIASES: tuple[Alias, ...] = (
    Alias("NODE_NAME", "node", _text),
    Alias("NETWORK", "network", _text),
    Alias("CLUSTER_DOMAIN", "cluster-domain", _text),
    Alias("LOCAL_XDS_PATH", "local-xds", Path),
    Alias("CLUSTER_ID", "cluster-id", _text),
    Alias("XDS_ADDRESS", "xds", url),
    Alias("XDS_ROOT_CA", "xds-root", _root),
    Alias("ALT_XDS_HOSTNAME", "xds-name", _text),
    Alias("CA_ADDRESS", "ca", url),
    Alias("CA_ROOT_CA", "ca-root", _root),
    Alias("ALT_CA_HOSTNAME", "ca-name", _text),
    Alias("AUTH_TOKEN", "token-file", _token),
    Alias("SECRET_TTL", "cert-ttl", duration_s),
    Alias("CRL_PATH", "crl-dir", Path),
    Alias("KEEPALIVE_ENABLED", "keepalive", _flag),
    Alias("KEEPALIVE_TIME", "keepalive-time", duration_s),
    Alias("KEEPALIVE_INTERVAL", "keepalive-interval", duration_s),
    Alias("KEEPALIVE_RETRIES", "keepalive-retries", _number),
    Alias("USER_TIMEOUT_ENABLED", "user-timeout", _flag),
    Alias("HTTP2_STREAM_WINDOW_SIZE", "stream-window", _number),
    Alias("HTTP2_CONNECTION_WINDOW_SIZE", "tunnel-window", _number),
    Alias("POOL_MAX_STREAMS_PER_CONNECTION", "tunnel-streams", _number),
    Alias("POOL_UNUSED_RELEASE_TIMEOUT", "tunnel-idle", duration_s),
    Alias("CONNECTION_TERMINATION_DEADLINE", "termination-deadline", duration_s),
    Alias("TERMINATION_GRACE_PERIOD_SECONDS", "termination-deadline", grace_s),
    Alias("ISTIO_META_DNS_CAPTURE", "dns", _flag),
    Alias("LOG_FORMAT", "log-format", _text),
    Alias("RUST_LOG", "log-level", level),
)
"""Of two that mean the same setting, the first that is there counts."""


def of_environment(key: str, environ: Mapping[str, str]) -> Value | None:
    """What ztunnel's variables say of a setting. Raises ConfigError naming the variable."""
    for alias in ALIASES:
        text = environ.get(alias.environment, "")
        if alias.key != key or not text:
            continue  # to ztunnel an empty variable is an absent one, too
        origin = f"env {alias.environment}"
        try:
            value = alias.read(text)
            if value is None:
                continue
            if isinstance(value, str):
                value = BY_NAME[key].check(value)
        except ConfigError as error:
            raise misplaced(origin, key, error) from None
        return Value(value, origin)
    return None
