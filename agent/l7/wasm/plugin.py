"""WasmPlugin and TrafficExtension (extensions.istio.io), parsed to one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.l7.attachment import TARGET_FIELDS, Target, read_targets
from meshbpf.agent.l7.filter import Phase
from meshbpf.agent.l7.spec import Value

GROUP = "extensions.istio.io"
KINDS = ("WasmPlugin", "TrafficExtension")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEMES = ("file", "http", "https", "oci")
_PHASES = {
    "UNSPECIFIED_PHASE": Phase.WASM,
    "UNSPECIFIED": Phase.WASM,
    "AUTHN": Phase.WASM_AUTHN,
    "AUTHZ": Phase.WASM_AUTHZ,
    "STATS": Phase.WASM_STATS,
}
_OF_WASM = (
    "url",
    "sha256",
    "imagePullPolicy",
    "imagePullSecret",
    "verificationKey",
    "pluginConfig",
    "pluginName",
    "failStrategy",
    "vmConfig",
    "type",
)
_COMMON = (*TARGET_FIELDS, "phase", "priority", "match")
_MODES = {"UNDEFINED": True, "CLIENT": False, "SERVER": True, "CLIENT_AND_SERVER": True}


class FailStrategy(StrEnum):
    """What happens to requests when the plugin cannot run."""

    CLOSE = "FAIL_CLOSE"
    OPEN = "FAIL_OPEN"
    RELOAD = "FAIL_RELOAD"  # closed, until a new machine has started


@dataclass(frozen=True, slots=True)
class ModuleSource:
    """Where the code is."""

    url: str
    sha256: str = ""
    pull_always: bool = False
    pull_secret: str = ""
    """NAMESPACE/NAME of a Secret of the type kubernetes.io/dockerconfigjson."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin."""

    key: ObjectKey
    source: ModuleSource
    targets: tuple[Target, ...]
    phase: Phase
    priority: int
    name: str
    fail: FailStrategy
    configuration: bytes
    environment: tuple[tuple[str, str], ...]
    ports: frozenset[int] | None
    """Service ports to run at; None for all, empty for none."""


def parse_plugin(source: KubeObject, environ: Mapping[str, str]) -> Plugin:
    """Read either kind; ObjectError names the field that makes it unusable.

    `environ` is what `valueFrom: HOST` takes its values from.
    """
    spec = Value.spec(source)
    if source.key.kind == "TrafficExtension":
        fields = spec.record((*_COMMON, "wasm", "lua"))
        if "lua" in fields:
            raise fields["lua"].error("this proxy runs no Lua: write a Wasm plugin")
        body = spec.need(fields, "wasm")
        wasm = body.record(_OF_WASM)
    else:
        fields = spec.record((*_COMMON, *_OF_WASM))
        body, wasm = spec, fields
    kind = wasm["type"].text() if "type" in wasm else "HTTP"
    if kind not in ("HTTP", "UNSPECIFIED_PLUGIN_TYPE"):
        raise wasm["type"].error(f"{kind} plugins are not supported: HTTP only")
    if "verificationKey" in wasm:
        # To run code whose signature was asked for, and not looked at, would be worse.
        raise wasm["verificationKey"].error("signatures are not checked: use sha256")
    table = {each.value: each for each in FailStrategy}
    return Plugin(
        source.key,
        _source(body, wasm),
        read_targets(fields),
        fields["phase"].choice(_PHASES) if "phase" in fields else Phase.WASM,
        fields["priority"].integer(-(2**31), 2**31 - 1) if "priority" in fields else 0,
        wasm["pluginName"].text(empty=True) if "pluginName" in wasm else "",
        wasm["failStrategy"].choice(table) if "failStrategy" in wasm else FailStrategy.CLOSE,
        _configuration(wasm.get("pluginConfig")),
        _environment(wasm.get("vmConfig"), environ),
        _ports(fields.get("match")),
    )


def _source(body: Value, wasm: Mapping[str, Value]) -> ModuleSource:
    field = body.need(wasm, "url")
    url = field.text()
    if "://" not in url:
        url = f"oci://{url}"  # as Istio reads it
    try:
        parts = urlsplit(url)
    except ValueError:
        raise field.error(f"{url!r} is not a URL") from None
    if parts.scheme not in _SCHEMES:
        raise field.error(f"{parts.scheme}: is none of {', '.join(_SCHEMES)}")
    if (parts.scheme == "file") is bool(parts.netloc) or not parts.path.strip("/"):
        raise field.error(f"{url!r} names no file")
    sha256 = wasm["sha256"].text(empty=True).lower() if "sha256" in wasm else ""
    if sha256 and _SHA256.fullmatch(sha256) is None:
        raise wasm["sha256"].error("is not 64 hexadecimal digits")
    policy = wasm["imagePullPolicy"].text() if "imagePullPolicy" in wasm else ""
    secret = wasm["imagePullSecret"].text(empty=True) if "imagePullSecret" in wasm else ""
    return ModuleSource(
        url,
        sha256,
        policy == "Always",
        f"{body.object.namespace}/{secret}" if secret else "",
    )


def _configuration(value: Value | None) -> bytes:
    if value is None:
        return b""
    if not isinstance(value.raw, Mapping):
        raise value.error("must be a mapping")
    return json.dumps(value.raw, separators=(",", ":"), ensure_ascii=False).encode()


def _environment(value: Value | None, environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    found: list[tuple[str, str]] = []
    fields = value.record(("env",))
    for item in fields["env"].items() if "env" in fields else ():
        entry = item.record(("name", "value", "valueFrom"))
        name = item.need(entry, "name").text()
        if "\0" in name or "=" in name:
            raise entry["name"].error(f"{name!r} is no variable's name")
        if "valueFrom" in entry and entry["valueFrom"].choice({"INLINE": False, "HOST": True}):
            if name in environ:
                found.append((name, environ[name]))
            continue
        text: Any = entry["value"].text(empty=True) if "value" in entry else ""
        found.append((name, text.replace("\0", "")))
    return tuple(found)


def _ports(value: Value | None) -> frozenset[int] | None:
    """Traffic selectors, as a waypoint reads them: it is on the server's side."""
    if value is None:
        return None
    ports: set[int] = set()
    for item in value.items():
        fields = item.record(("mode", "ports"))
        if "mode" in fields and not fields["mode"].choice(_MODES):
            continue
        if "ports" not in fields:
            return None
        for port in fields["ports"].items():
            numbers = port.record(("number",))
            ports.add(port.need(numbers, "number").integer(1, 65535))
    return frozenset(ports)
