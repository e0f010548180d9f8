"""Brings the cluster's objects to what they should be, by server-side apply.

An object is applied when what we want has changed since, when it is not
there, and when somebody has changed it: by its generation where it has one,
else by its resourceVersion. Applying what is so already changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.runtime.kube_api import KubeApi, KubeError
from meshbpf.agent.runtime.kubernetes import plural
from meshbpf.agent.runtime.logs import Log

MANAGER = "meshbpf-waypoint-controller"

log = Log("deploy")


class Desired:
    """What one controller has applied so far."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._applied: dict[ObjectKey, tuple[bytes, str]] = {}
        """What was wanted, and the revision that the server had then."""

    async def apply(self, objects: ObjectSet, wanted: Iterable[dict[str, Any]]) -> None:
        """See that each of these is so. Raises MeshbpfError at the first that cannot be."""
        for body in wanted:
            await self._one(objects, body)

    def forget(self, keep: Iterable[dict[str, Any]]) -> None:
        """What is not wanted any more; the garbage collector removes it with its Gateway."""
        kept = {key_of(body) for body in keep}
        self._applied = {key: one for key, one in self._applied.items() if key in kept}

    async def _one(self, objects: ObjectSet, body: dict[str, Any]) -> None:
        key, text = key_of(body), msgspec.json.encode(body)
        held = objects.by_key.get(key)
        before = self._applied.get(key)
        if held is not None and before == (text, _revision(held.body)):
            return
        answer = await self._api.apply(_path(key, body["apiVersion"]), body, MANAGER)
        try:
            now = msgspec.json.decode(answer, type=dict)
        except msgspec.DecodeError as error:
            raise KubeError("bad-answer", f"{key}: {error}") from error
        revision = _revision(now)
        self._applied[key] = text, revision
        if held is None or _revision(held.body) != revision:
            log.info("applied", object=key, revision=revision)

    async def write_status(self, about: KubeObject, status: dict[str, Any]) -> None:
        """Replace these fields of a status, if the object is still the one that was judged.

        What cannot be written is told and left: the next change brings it up again.
        """
        change = {
            "metadata": {"resourceVersion": about.metadata.get("resourceVersion")},
            "status": status,
        }
        group = about.key.group
        version = f"{group}/{about.version}" if group else about.version
        try:
            await self._api.patch_status(_path(about.key, version), change)
        except MeshbpfError as error:
            if isinstance(error, KubeError) and error.status in (404, 409):
                return  # it is gone, or has changed: we shall see
            log.warning("status not written", object=about.key, cause=error)


def key_of(body: dict[str, Any]) -> ObjectKey:
    """The key of an object that is to be."""
    group, _, _version = str(body["apiVersion"]).rpartition("/")
    metadata = body["metadata"]
    return ObjectKey(group, body["kind"], metadata.get("namespace", ""), metadata["name"])


def _path(key: ObjectKey, version: str) -> str:
    base = f"/apis/{version}" if key.group else f"/api/{version}"
    place = f"/namespaces/{key.namespace}" if key.namespace else ""
    return f"{base}{place}/{plural(key.kind)}/{key.name}"


def _revision(body: Any) -> str:
    metadata = body.get("metadata") or {}
    return str(metadata.get("generation") or metadata.get("resourceVersion") or "")
