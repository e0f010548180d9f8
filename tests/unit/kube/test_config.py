"""How the API server is reached, and the tokens with which it is asked."""

from __future__ import annotations

import base64
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.runtime import kube_config
from meshbpf.agent.runtime.kube_config import ExecPlugin, KubeConfig
from meshbpf.agent.runtime.kube_credentials import CredentialError, Credentials

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def write(folder: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    path = folder / "kubeconfig"
    text = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(text))
    return path


def test_a_kubeconfig_with_everything_inside(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"server": "https://api.example:6443/k8s/", "certificate-authority-data": encoded("CA")},
        {"client-certificate-data": encoded("C"), "client-key-data": encoded("K"), "token": "t"},
    )
    found = kube_config.load(path, {})
    assert (found.host, found.port, found.path) == ("api.example", 6443, "/k8s")
    assert (found.ca, found.client_cert, found.client_key, found.token) == (b"CA", b"C", b"K", "t")
    assert kube_config.load(None, {"KUBECONFIG": f"{path}:/elsewhere"}) == found


def test_files_are_meant_from_the_kubeconfigs_folder(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("CA")
    path = write(
        tmp_path,
        {"server": "https://a", "certificate-authority": "ca.pem", "tls-server-name": "b"},
        {"tokenFile": "token", "exec": {"apiVersion": "v", "command": "./plugin", "args": ["x"]}},
    )
    found = kube_config.of_file(path)
    assert (found.ca, found.server_name, found.port) == (b"CA", "b", 443)
    assert found.token_file == tmp_path / "token"
    assert found.exec_plugin == ExecPlugin(str(tmp_path / "plugin"), ("x",), {}, "v")


def test_in_a_pod_the_mounted_account_is_used(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("CA")
    environ = {"KUBERNETES_SERVICE_HOST": "198.19.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    found = kube_config.in_cluster(environ, tmp_path)
    assert (found.host, found.ca, found.token_file) == ("198.19.0.1", b"CA", tmp_path / "token")
    with pytest.raises(ConfigError, match="no kubeconfig is given"):
        kube_config.load(None, {})


@pytest.mark.parametrize(
    ("cluster", "user", "what"),
    [
        ({"server": "http://a"}, {}, "not an https:// address"),
        ({"server": "https://a", "insecure-skip-tls-verify": True}, {}, "whoever answers"),
        ({"server": "https://a"}, {"username": "x"}, "username is not supported"),
        ({"server": "https://a:x"}, {}, "https://a:x"),
        ({"server": "https://a", "certificate-authority-data": "***"}, {}, "authority-data"),
        ({"server": "https://a", "certificate-authority": "nope"}, {}, "cannot be read"),
        ({"server": "https://a"}, {"exec": {"args": []}}, "exec"),
        ({}, {}, "no current context with its cluster"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_told(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        kube_config.of_file(write(tmp_path, cluster, user))


def plugin(folder: Path, script: str) -> ExecPlugin:
    path = folder / "plugin"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return ExecPlugin(str(path), env={"ANSWER": "x"})


def config(**more: Any) -> KubeConfig:
    return KubeConfig("o", "h", 1, "", "h", b"", **more)


def credential(token: str, expires: datetime | None = None) -> str:
    status: dict[str, str] = {"token": token}
    if expires is not None:
        status["expirationTimestamp"] = expires.isoformat().replace("+00:00", "Z")
    return json.dumps({"apiVersion": "v1", "kind": "ExecCredential", "status": status})


async def test_an_exec_plugin_is_asked_again_when_its_token_ends(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    found = plugin(tmp_path, f'echo x >>{tmp_path}/asked; [ "$ANSWER" = x ] && cat {answer}')
    now = [NOW]
    credentials = Credentials(config(exec_plugin=found), lambda: now[0])
    answer.write_text(credential("one", NOW + timedelta(minutes=10)))
    assert [await credentials.token() for _ in range(3)] == ["one"] * 3
    assert (tmp_path / "asked").read_text() == "x\n"
    answer.write_text(credential("two"))
    now[0] = NOW + timedelta(minutes=9, seconds=45)  # close to the end is too late
    assert await credentials.token() == "two"
    credentials.refused()
    answer.write_text(credential("three"))
    assert await credentials.token() == "three"


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("echo broken >&2; exit 3", "ended with 3: broken"),
        ("echo not json", "JSON"),
        ("echo '{\"status\": {}}'", "printed no token"),
    ],
)
async def test_an_exec_plugin_that_fails_is_told(tmp_path: Path, script: str, what: str) -> None:
    credentials = Credentials(config(exec_plugin=plugin(tmp_path, script)), lambda: NOW)
    with pytest.raises(CredentialError, match=what):
        await credentials.token()


async def test_a_token_file_is_read_again_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "token"
    credentials = Credentials(config(token_file=path), lambda: NOW)
    with pytest.raises(CredentialError, match="No such file"):
        await credentials.token()
    path.write_text("one\n")
    assert await credentials.token() == "one"
    fresh = tmp_path / "fresh"
    fresh.write_text("two\n")
    fresh.replace(path)
    assert await credentials.token() == "two"
