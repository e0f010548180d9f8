"""Bearer tokens for the API server, read anew as they are renewed.

The kubelet writes a pod's token afresh well before it expires, and an exec
plugin says when its own does; in between a request costs a stat() at most.
`refused` is called on a 401: whatever is held is then asked for again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.file_signature import Signature
from meshbpf.agent.runtime.kube_config import ExecPlugin, KubeConfig

EXEC_LIMIT_S = 30.0
EARLY_S = 30.0
"""A token is not used up to its last second: the request must get there too."""


class CredentialError(MeshbpfError):
    """There is no token to ask with."""


class _Status(msgspec.Struct):
    token: str = ""
    expiration: datetime | None = msgspec.field(name="expirationTimestamp", default=None)


class _ExecCredential(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


class Credentials:
    """The token of one configuration; None where a client certificate says who asks."""

    def __init__(self, config: KubeConfig, now: Callable[[], datetime]) -> None:
        self._config = config
        self._now = now
        self._held = ""
        self._until: datetime | None = None
        self._signature: Signature | None = None
        self._asking = trio.Lock()

    async def token(self) -> str | None:
        """The token in force. Raises CredentialError."""
        config = self._config
        if config.token_file is not None:
            return self._of_file(config.token_file)
        if config.exec_plugin is not None:
            async with self._asking:  # of many requests one asks
                if not self._held or (self._until is not None and self._now() >= self._until):
                    await self._ask(config.exec_plugin)
                return self._held
        return config.token or None

    def refused(self) -> None:
        """The server does not take it: forget what is held."""
        self._held, self._signature = "", None

    def _of_file(self, path: Path) -> str:
        try:
            signature = Signature.of(path.stat())
            if signature != self._signature:
                self._held = path.read_text().strip()
                self._signature = signature
        except OSError as error:
            raise CredentialError(
                "no-token", f"service account token {path}: {error.strerror}"
            ) from error
        return self._held

    async def _ask(self, plugin: ExecPlugin) -> None:
        info = {"apiVersion": plugin.api_version, "kind": "ExecCredential"}
        info |= {"spec": {"interactive": False}}  # type: ignore[dict-item]
        environ = {**os.environ, **plugin.env}
        environ["KUBERNETES_EXEC_INFO"] = msgspec.json.encode(info).decode()
        try:
            with trio.fail_after(EXEC_LIMIT_S):
                done = await trio.run_process(
                    [plugin.command, *plugin.args],
                    env=environ,
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                )
        except trio.TooSlowError as error:
            what = f"{plugin.command} printed nothing in {EXEC_LIMIT_S:g} s"
            raise CredentialError("exec-plugin", what) from error
        except OSError as error:
            raise CredentialError("exec-plugin", f"{plugin.command}: {error.strerror}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-300:]
            raise CredentialError(
                "exec-plugin", f"{plugin.command} ended with {done.returncode}: {said}"
            )
        try:
            status = msgspec.json.decode(done.stdout, type=_ExecCredential).status
        except msgspec.DecodeError as error:
            raise CredentialError("exec-plugin", f"{plugin.command}: {error}") from error
        if not status.token:
            raise CredentialError("exec-plugin", f"{plugin.command} printed no token")
        self._held = status.token
        self._until = None
        if status.expiration is not None:
            expiration = status.expiration
            if expiration.tzinfo is None:
                expiration = expiration.replace(tzinfo=UTC)
            self._until = expiration - timedelta(seconds=EARLY_S)
