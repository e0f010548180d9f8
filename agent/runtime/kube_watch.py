"""A kind's objects, kept as the API server has them: list, then watch, for ever.

The rules of the API's conventions, and what goes wrong in practice:

- A list comes in pages of PAGE; its resourceVersion is where the watch begins.
- Bookmarks move that version on where nothing happens, so that a watch that
  ends can go on where it was and need not list anew.
- 410 Gone, as a status or as an event, means that the version is too old:
  list again, after a pause that is spread, for every node gets it at once.
- A stream that ends, is cut, or says nothing for SILENCE_S is taken up again
  at the last version that came through whole.
- Events may come twice, and after a resync late: what is older than what is
  held is not taken. Versions are compared as numbers where they are some.
- 404 means that the cluster does not have the kind (its CRD is missing): it
  then has no objects, and is asked again now and then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from meshbpf.agent.core.backoff import Backoff
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.runtime.kube_api import KubeApi, KubeError
from meshbpf.agent.runtime.logs import Log

PAGE = 500
WATCH_S = (300, 600)
"""How long the server is asked to keep a watch: spread, or all nodes come back together."""
SILENCE_S = 90.0
"""Bookmarks come about once a minute: a watch that says less is a dead connection."""
ABSENT_S = 60.0
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 30.0
GONE_SPREAD_S = 2.0

log = Log("kube")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind that is watched."""

    group: str
    version: str
    kind: str
    plural: str
    selector: str = ""
    """A field selector, for part of the objects."""
    labels: str = ""
    """A label selector."""

    @property
    def path(self) -> str:
        """Of the list of all namespaces."""
        base = f"/apis/{self.group}" if self.group else "/api"
        return f"{base}/{self.version}/{self.plural}"

    @property
    def selectors(self) -> dict[str, str]:
        """As parameters of a list or watch."""
        both = {"fieldSelector": self.selector, "labelSelector": self.labels}
        return {name: text for name, text in both.items() if text}


class _Event(msgspec.Struct):
    type: str
    object: dict[str, Any]


class _Meta(msgspec.Struct):
    version: str = msgspec.field(name="resourceVersion", default="")
    more: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _Meta
    items: list[dict[str, Any]] | None = None


class _GoneError(Exception):
    """The version that we have is too old to go on from."""


class Watcher:
    """Follows one kind."""

    def __init__(
        self,
        api: KubeApi,
        kind: Kind,
        changed: Callable[[Iterable[ObjectKey]], None],
        *,
        rng: random.Random | None = None,
    ) -> None:
        """`changed` is told of objects that are new, other or gone, and once of a list without."""
        self._api = api
        self.kind = kind
        """What is followed."""
        self._changed = changed
        self._rng = rng or random.Random()  # noqa: S311 (spreads pauses)
        self._version = ""
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S, self._rng)
        self.objects: dict[ObjectKey, KubeObject] = {}
        self.synced = trio.Event()
        """There was a whole list."""
        self.error: MeshbpfError | None = None
        """Why the server cannot be followed now; None while it can."""
        self.relists = 0
        self.events = 0

    async def run(self) -> None:
        """Follow the kind until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except _GoneError:
                log.info("too old to go on from, listing anew", kind=self.kind.plural)
                self._version = ""
                await trio.sleep(self._rng.uniform(0, GONE_SPREAD_S))
            except MeshbpfError as error:
                if isinstance(error, KubeError) and error.status == 404:
                    self._absent()
                    await trio.sleep(ABSENT_S)
                    continue
                self._complain(error)
                await trio.sleep(self._backoff.next_s())

    async def _list(self) -> None:
        found: dict[ObjectKey, KubeObject] = {}
        query = {"limit": str(PAGE)} | self.kind.selectors
        more = version = ""
        while True:
            page = await self._page(query | ({"continue": more} if more else {}))
            for body in page.items or ():
                each = self._object(body)
                found[each.key] = each
            version, more = page.metadata.version, page.metadata.more
            if not more:
                break
        self.relists += 1
        changed = _differences(self.objects, found)
        self.objects = found
        self._version = version
        self._well()
        self.synced.set()
        self._changed(changed)

    async def _page(self, query: dict[str, str]) -> _List:
        try:
            body = await self._api.get(self.kind.path, **query)
        except KubeError as error:
            if error.status == 410:  # the list took longer than its version lasts
                raise _GoneError from error
            raise
        try:
            return msgspec.json.decode(body, type=_List)
        except msgspec.DecodeError as error:
            what = f"{self._api.origin}{self.kind.path}: {error}"
            raise KubeError("bad-answer", what) from error

    async def _watch(self) -> None:
        query = {
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._rng.randint(*WATCH_S)),
        } | self.kind.selectors
        before = self.events
        try:
            with trio.CancelScope() as alive:
                alive.deadline = trio.current_time() + SILENCE_S
                async with self._api.watch(self.kind.path, **query) as answer:
                    self._well()
                    async for line in answer:
                        alive.deadline = trio.current_time() + SILENCE_S
                        self._take(line)
        except KubeError as error:
            if error.status == 410:
                raise _GoneError from error
            raise
        if self.events == before:
            # A server, or what stands before it, that ends each watch at once.
            await trio.sleep(self._backoff.next_s())

    def _take(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except msgspec.DecodeError as error:
            raise KubeError("bad-answer", f"an event of {self.kind.plural}: {error}") from error
        if event.type == "ERROR":
            if event.object.get("code") == 410:
                raise _GoneError
            what = f"watch of {self.kind.plural}: {event.object.get('message')}"
            raise KubeError("refused", what, int(event.object.get("code") or 0))
        self.events += 1
        self._backoff.reset()
        metadata = event.object.get("metadata") or {}
        version = str(metadata.get("resourceVersion") or "")
        if event.type != "BOOKMARK":
            self._apply(event.type, self._object(event.object))
        if version and not _older(version, self._version):
            self._version = version

    def _apply(self, kind: str, each: KubeObject) -> None:
        held = self.objects.get(each.key)
        if held is not None and _older(_version(each), _version(held)):
            return  # late: something newer is known
        if kind == "DELETED":
            if held is None:
                return
            del self.objects[each.key]
        elif held is not None and _version(held) == _version(each):
            return  # again
        else:
            self.objects[each.key] = each
        self._changed((each.key,))

    def _object(self, body: dict[str, Any]) -> KubeObject:
        """Lists leave kind and version out; who manages which field nobody here asks."""
        metadata = body.get("metadata")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            raise KubeError("bad-answer", f"an object of {self.kind.plural} without a name")
        metadata.pop("managedFields", None)
        kind = self.kind
        namespace = str(metadata.get("namespace") or "")
        key = ObjectKey(kind.group, kind.kind, namespace, metadata["name"])
        return KubeObject(key, kind.version, body)

    def _absent(self) -> None:
        if not self.synced.is_set() or self.objects or self.error:
            log.info("the cluster does not have this kind", kind=self.kind.plural)
            gone, self.objects = self.objects, {}
            self._version, self.error = "", None
            self.synced.set()
            self._changed(gone)

    def _well(self) -> None:
        if self.error is not None:
            log.info("API server answers again", kind=self.kind.plural)
        self.error = None
        self._backoff.reset()

    def _complain(self, error: MeshbpfError) -> None:
        if self.error is None or self.error.what != error.what:
            log.warning("API server cannot be followed", kind=self.kind.plural, cause=error)
        self.error = error


def _differences(
    before: dict[ObjectKey, KubeObject], now: dict[ObjectKey, KubeObject]
) -> list[ObjectKey]:
    """What a new list says otherwise than the objects that were held."""
    found = [key for key in before if key not in now]
    for key, each in now.items():
        held = before.get(key)
        if held is None or not _version(each) or _version(held) != _version(each):
            found.append(key)
    return found


def _version(each: KubeObject) -> str:
    return str(each.metadata.get("resourceVersion") or "")


def _older(one: str, other: str) -> bool:
    """Whether `one` is surely older; texts that are no numbers say nothing of their order."""
    return one.isdecimal() and other.isdecimal() and int(one) < int(other)
