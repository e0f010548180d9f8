"""How the API server is reached: a kubeconfig, or what Kubernetes puts into a pod.

Only what a client must know is read, and what would make it less than sure of
the server is refused: plain HTTP and insecure-skip-tls-verify.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from meshbpf.agent.core.errors import ConfigError

IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a pod's token, renewed in place, and the cluster's CA."""


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """A program that prints credentials (client.authentication.k8s.io)."""

    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    api_version: str = "client.authentication.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """One server, and one way to prove who asks."""

    origin: str
    """For people."""
    host: str
    port: int
    path: str
    """Before every path of the API; empty for most servers."""
    server_name: str
    ca: bytes
    """PEM; empty means the system's."""
    client_cert: bytes = b""
    client_key: bytes = b""
    token: str = ""
    token_file: Path | None = None
    exec_plugin: ExecPlugin | None = None


def load(path: Path | None, environ: Mapping[str, str]) -> KubeConfig:
    """From `path`, else from KUBECONFIG, else from the pod that this is. Raises ConfigError."""
    if path is None and "KUBECONFIG" in environ:
        path = Path(environ["KUBECONFIG"].partition(os.pathsep)[0])
    return of_file(path) if path is not None else in_cluster(environ)


def in_cluster(environ: Mapping[str, str], secrets: Path = IN_CLUSTER) -> KubeConfig:
    """What Kubernetes gives every pod."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port or not port.isdigit():
        raise ConfigError(
            "no-kubernetes",
            "this is no pod of a cluster, and no kubeconfig is given",
            "give --kubeconfig FILE",
        )
    ca = _read(secrets / "ca.crt")
    return KubeConfig(
        origin=f"https://{host}:{port}",
        host=host,
        port=int(port),
        path="",
        server_name=host,
        ca=ca,
        token_file=secrets / "token",
    )


def of_file(path: Path) -> KubeConfig:
    """The current context of a kubeconfig."""
    try:
        text = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise _bad(path, f"not YAML: {error}") from error
    try:
        context = _named(text, "contexts", text["current-context"])["context"]
        cluster = _named(text, "clusters", context["cluster"])["cluster"]
        user = _named(text, "users", context["user"]).get("user") or {}
        server = str(cluster["server"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, f"no current context with its cluster and user ({error})") from error
    parts = urlsplit(server)
    try:
        port = parts.port or 443
    except ValueError as error:
        raise _bad(path, f"{server}: {error}") from error
    if parts.scheme != "https" or not parts.hostname:
        raise _bad(path, f"the server {server} is not an https:// address")
    if cluster.get("insecure-skip-tls-verify"):
        raise _bad(path, "insecure-skip-tls-verify: whoever answers would command the mesh")
    for unknown in ("username", "auth-provider"):
        if unknown in user:
            raise _bad(path, f"users.user.{unknown} is not supported")
    token_file = user.get("tokenFile")
    return KubeConfig(
        origin=server,
        host=parts.hostname,
        port=port,
        path=parts.path.rstrip("/"),
        server_name=cluster.get("tls-server-name") or parts.hostname,
        ca=_bytes(path, cluster, "certificate-authority"),
        client_cert=_bytes(path, user, "client-certificate"),
        client_key=_bytes(path, user, "client-key"),
        token=str(user.get("token") or ""),
        token_file=_beside(path, token_file) if token_file else None,
        exec_plugin=_exec(path, user["exec"]) if user.get("exec") else None,
    )


def _exec(path: Path, found: Any) -> ExecPlugin:
    try:
        command = str(found["command"])
        # A name with a slash is meant from the file's folder, as kubectl has it.
        if "/" in command:
            command = str(_beside(path, command))
        return ExecPlugin(
            command,
            tuple(map(str, found.get("args") or ())),
            {str(each["name"]): str(each["value"]) for each in found.get("env") or ()},
            str(found["apiVersion"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad(path, f"users.user.exec: {error}") from error


def _named(text: Any, key: str, name: str) -> dict[str, Any]:
    for each in text[key] or ():
        if each.get("name") == name:
            return dict(each)
    raise KeyError(f"{key}: no {name!r}")


def _bytes(path: Path, found: Mapping[str, Any], key: str) -> bytes:
    data, file = found.get(f"{key}-data"), found.get(key)
    if data:
        try:
            return base64.b64decode(str(data), validate=True)
        except binascii.Error as error:
            raise _bad(path, f"{key}-data: {error}") from error
    return _read(_beside(path, str(file))) if file else b""


def _beside(path: Path, name: str) -> Path:
    return path.parent / name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "unreadable-kubeconfig", f"{path} cannot be read: {error.strerror}"
        ) from error


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError("bad-kubeconfig", f"{path}: {why}", "`kubectl config view` shows it")
