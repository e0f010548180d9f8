"""Certificates by the cluster's own CertificateSigningRequests, for a signer that takes SPIFFE ids.

Each request is an object: made, looked at until a controller has approved and
another has signed it, and deleted again. Who may be issued what is the
approver's to decide: it sees who asked (the agent's service account) and for
which identity. The API has no place for roots; they come from a file, as a
trust bundle that is mounted (trust-manager's, for one), and are followed.

Source: Kubernetes, certificates.k8s.io/v1.
"""

from __future__ import annotations

import base64
import binascii
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
import trio
from cryptography import x509

from meshbpf.agent.core.ca import new_key
from meshbpf.agent.core.csr import AnswerError, check_answer, signing_request
from meshbpf.agent.core.errors import ConfigError, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.runtime.file_signature import read_when_still, signature_of
from meshbpf.agent.runtime.issuing import Issued
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.logs import Log

PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
USAGES = ("digital signature", "server auth", "client auth")
LEAST_S = 600
"""The API takes no shorter expirationSeconds."""
SIGNED_S = 30.0
"""How long a request may wait for approver and signer."""
LOOK_FIRST_S = 0.1
LOOK_LAST_S = 2.0
WATCH_S = 2.0
DELETE_S = 5.0

log = Log("ca")


class _Condition(msgspec.Struct):
    type: str = ""
    reason: str = ""
    message: str = ""


class _Status(msgspec.Struct):
    certificate: str = ""
    conditions: list[_Condition] = []


class _Metadata(msgspec.Struct):
    name: str = ""


class _Request(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    status: _Status = msgspec.field(default_factory=_Status)


class KubernetesCsrIssuer:
    """An `Issuer` over one signer. Raises ConfigError when the roots cannot be read."""

    remote = True

    def __init__(
        self,
        api: KubeApi,
        signer: str,
        roots: Path,
        now: Callable[[], datetime],
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._signer = signer
        self._roots = roots
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311 (jitter, no secret)
        self._roots_pem = self._read()
        self._error: MeshbpfError | None = None

    @property
    def roots_pem(self) -> bytes:
        """As the file has them."""
        return self._roots_pem

    def warnings(self) -> tuple[str, ...]:
        """Why the roots in the file are not in force."""
        return (self._error.what,) if self._error is not None else ()

    async def run(self, renew_all: Callable[[], None]) -> None:
        """Follow the roots, until cancelled."""
        seen = signature_of(self._roots)
        while True:
            await trio.sleep(WATCH_S)
            found = signature_of(self._roots)
            if found is None or found == seen:
                continue  # None: a projected volume is being replaced
            try:
                roots_pem = await read_when_still(
                    lambda: signature_of(self._roots), found, self._read
                )
            except MeshbpfError as error:
                seen, self._error = found, error
                log.error("roots not read, those of before stay", cause=error)
                continue
            if roots_pem is not None:
                seen, self._error, self._roots_pem = found, None, roots_pem
                log.info("roots have changed", file=self._roots)
                renew_all()

    async def issue(self, identity: SpiffeId, not_before: datetime, not_after: datetime) -> Issued:
        """Ask the signer, which decides over the beginning and may grant less time."""
        del not_before
        key = new_key()
        seconds = max(round((not_after - self._now()).total_seconds()), LEAST_S)
        made = await self._api.create(
            PATH,
            {
                "apiVersion": "certificates.k8s.io/v1",
                "kind": "CertificateSigningRequest",
                "metadata": {
                    "generateName": "meshbpf-",
                    "annotations": {"meshbpf.io/identity": str(identity)},
                },
                "spec": {
                    "request": base64.b64encode(signing_request(identity, key)).decode(),
                    "signerName": self._signer,
                    "usages": list(USAGES),
                    "expirationSeconds": seconds,
                },
            },
        )
        name = self._decode(identity, made).metadata.name
        try:
            chain_pem = await self._signed(identity, name)
        finally:
            await self._forget(name)
        check_answer(identity, key, chain_pem, self._now())
        return Issued(chain_pem, key, self._roots_pem)

    async def _signed(self, identity: SpiffeId, name: str) -> bytes:
        pause_s = LOOK_FIRST_S
        with trio.move_on_after(SIGNED_S):
            while True:
                status = self._decode(identity, await self._api.get(f"{PATH}/{name}")).status
                for condition in status.conditions:
                    if condition.type in ("Denied", "Failed"):
                        why = condition.message or condition.reason
                        raise MeshbpfError(
                            "ca-refused",
                            f"{identity}: request {name} is {condition.type.lower()}: {why}",
                            f"the approver and the signer of {self._signer} say more",
                        )
                if status.certificate:
                    try:
                        return base64.b64decode(status.certificate, validate=True)
                    except binascii.Error as error:
                        raise AnswerError(identity, f"it is no base64: {error}") from error
                await trio.sleep(pause_s * self._rng.uniform(0.8, 1.2))
                pause_s = min(2 * pause_s, LOOK_LAST_S)
        raise MeshbpfError(
            "ca-silent",
            f"{identity}: request {name} was not approved and signed in {SIGNED_S:g} s",
            f"is there an approver, and a controller, for the signer {self._signer}?",
        )

    async def _forget(self, name: str) -> None:
        """The cluster would keep it for an hour or a day; a node makes many."""
        with trio.move_on_after(DELETE_S) as limit:
            limit.shield = True
            try:
                await self._api.delete(f"{PATH}/{name}")
            except MeshbpfError as error:
                log.debug("request not deleted: the cluster does it in time", cause=error)

    def _decode(self, identity: SpiffeId, body: bytes) -> _Request:
        try:
            return msgspec.json.decode(body, type=_Request)
        except msgspec.DecodeError as error:
            raise AnswerError(identity, f"the API server's answer is none: {error}") from error

    def _read(self) -> bytes:
        try:
            found = self._roots.read_bytes()
            x509.load_pem_x509_certificates(found)
        except OSError as error:
            raise self._bad(str(error.strerror)) from error
        except ValueError as error:
            raise self._bad("no certificates in PEM") from error
        return found

    def _bad(self, why: str) -> ConfigError:
        return ConfigError(
            "no-roots",
            f"roots of the signer {self._signer} in {self._roots}: {why}",
            "give --ca-root the file with the certificates by which peers are to be judged",
        )
