"""The admin port, 15000 on 127.0.0.1 and ::1 of the agent's own netns.

    GET  /                            the status page (static; it asks /overview)
    GET  /overview                    what the page shows, as JSON
    GET  /config_dump                 everything, as istioctl reads it
    POST /logging?level=&reset        show or change log levels
    POST /quitquitquit                end the agent in order
    GET  /debug/pprof/profile         CPU: ?seconds=10&frequency=100&format=pprof|collapsed
    GET  /debug/pprof/heap            memory, once switched on with
    POST /debug/pprof/heap/profiling  ?activate=true|false
    GET  /debug/tasks                 every task and where it waits

Paths, parameters, defaults and answers are ztunnel's where it has them. Its
admin port obeys whoever reaches it; here only the page itself does. All else
wants a peer whose socket belongs to root or to the agent's user (asked of the
kernel), unless the agent runs with --admin-open. And since a browser on this
machine is such a peer for any site that it shows, every request must name us
in Host (no DNS rebinding) and must not come from another origin.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources

import msgspec
import trio

from meshbpf.agent.datapath.sockowner import owner_of
from meshbpf.agent.runtime import pprof, profiler, task_dump
from meshbpf.agent.runtime.httpd import BadRequestError, Request, Response
from meshbpf.agent.runtime.log_levels import LevelError, LogLevels
from meshbpf.agent.runtime.logs import Log

MAX_PROFILE_S = 300
DEFAULT_PROFILE_S = 10
MAX_FREQUENCY_HZ = 1000
DEFAULT_FREQUENCY_HZ = 100
JSON = "application/json"

LOGGING_HELP = """
usage: POST /logging                                            (to list the current level)
usage: POST /logging?level=LEVEL                                (to change the level of all scopes)
usage: POST /logging?level=SCOPE=LEVEL,SCOPE=LEVEL              (to change those of some scopes)
usage: POST /logging?reset                                      (to return to the start's levels)

hint: LEVEL is one of error|warn|info|debug|trace|off
hint: SCOPE is the third column of a log line, for instance access
"""

_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_OUR_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

log = Log("admin")


@dataclass(frozen=True, slots=True)
class AdminSources:
    """What the port tells of and acts on."""

    levels: LogLevels
    overview: Callable[[], Awaitable[msgspec.Struct]]
    config_dump: Callable[[], Awaitable[bytes]]
    """A JSON document."""
    quit: Callable[[], None]
    """Asks the agent to end; returns at once."""


@dataclass(frozen=True, slots=True)
class _Route:
    methods: frozenset[str]
    answer: Callable[[Request], Awaitable[Response]]
    public: bool = False


_GET = frozenset({"GET", "HEAD"})
_POST = frozenset({"POST"})


class Admin:
    """Routes and guards requests; `handle` is what `httpd.serve` takes."""

    def __init__(self, sources: AdminSources, *, open_to_all: bool = False) -> None:
        self._sources = sources
        self._open = open_to_all
        self._routes: Mapping[str, _Route] = {
            **{path: _Route(_GET, self._page, public=True) for path in _PAGE_FILES},
            "/overview": _Route(_GET, self._overview),
            "/config_dump": _Route(_GET, self._config_dump),
            "/logging": _Route(_POST, self._logging),
            "/quitquitquit": _Route(_POST, self._quit),
            "/debug/pprof/profile": _Route(_GET, self._profile),
            "/debug/pprof/heap": _Route(_GET, self._heap),
            "/debug/pprof/heap/profiling": _Route(_GET | _POST, self._heap_switch),
            "/debug/tasks": _Route(_GET, self._tasks),
        }

    async def handle(self, request: Request) -> Response:
        """The answer to one request."""
        refusal = _foreign(request)
        if refusal:
            log.warning("request refused", reason=refusal, path=request.path)
            return Response(HTTPStatus.FORBIDDEN, f"{refusal}\n")
        route = self._routes.get(request.path)
        if route is None:
            return Response(HTTPStatus.NOT_FOUND, "no such page: see /\n")
        if request.method not in route.methods:
            told = f"Invalid HTTP method\n {LOGGING_HELP}" if request.path == "/logging" else ""
            allow = ", ".join(sorted(route.methods))
            return Response(HTTPStatus.METHOD_NOT_ALLOWED, told, headers={"allow": allow})
        if not route.public and not await self._permitted(request):
            return Response(
                HTTPStatus.FORBIDDEN,
                "only root and the agent's own user may ask this "
                "(the agent's --admin-open lifts it)\n",
            )
        return await route.answer(request)

    async def _permitted(self, request: Request) -> bool:
        if self._open:
            return True
        # A netlink request of 0.3 ms, which the kernel answers at once.
        uid = owner_of(request.peer, request.local)
        await trio.lowlevel.checkpoint()
        if uid in (0, os.geteuid()):
            return True
        log.warning(
            "request refused: not root and not the agent's user", uid=uid, path=request.path
        )
        return False

    # --- pages --------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        name, kind = _PAGE_FILES[request.path]
        folder = resources.files("meshbpf.agent.runtime").joinpath("page")
        body = folder.joinpath(name).read_bytes()
        return Response(HTTPStatus.OK, body, kind, _PAGE_HEADERS)

    async def _overview(self, _request: Request) -> Response:
        body = msgspec.json.encode(await self._sources.overview())
        return Response(HTTPStatus.OK, body, JSON, _PAGE_HEADERS)

    async def _config_dump(self, _request: Request) -> Response:
        return Response(HTTPStatus.OK, await self._sources.config_dump(), JSON)

    # --- changes ------------------------------------------------------------

    async def _logging(self, request: Request) -> Response:
        levels, wanted = self._sources.levels, request.query.get("level", "")
        reset = "reset" in request.query
        if wanted or reset:
            try:
                levels.change(wanted, reset=reset)
            except LevelError as error:
                told = f"Invalid level provided: {wanted}\n{error.what}\n{LOGGING_HELP}"
                return Response(HTTPStatus.BAD_REQUEST, told)
            log.info("log levels changed", levels=levels.current())
        return Response(HTTPStatus.OK, f"current log level is {levels.current()}\n")

    async def _quit(self, _request: Request) -> Response:
        log.info("asked to quit")
        self._sources.quit()
        return Response(HTTPStatus.OK, "shutdown now\n")

    # --- profiles -----------------------------------------------------------

    async def _profile(self, request: Request) -> Response:
        seconds = _bounded(request, "seconds", DEFAULT_PROFILE_S, MAX_PROFILE_S)
        frequency = _bounded(request, "frequency", DEFAULT_FREQUENCY_HZ, MAX_FREQUENCY_HZ)
        form = request.query.get("format", "pprof")
        if form not in ("pprof", "collapsed"):
            raise BadRequestError("bad-format", "invalid format value; expected pprof or collapsed")
        stop = threading.Event()

        def sample() -> profiler.CpuProfile:
            return profiler.sample(seconds, frequency, stop, waiting="waiting" in request.query)

        try:
            profile = await trio.to_thread.run_sync(sample, abandon_on_cancel=True)
        except profiler.ProfileError as error:
            return Response(HTTPStatus.CONFLICT, f"{error.what}\n")
        finally:
            stop.set()
        if form == "collapsed":
            return Response(HTTPStatus.OK, profile.collapsed())
        return Response(HTTPStatus.OK, profile.encoded(), pprof.CONTENT_TYPE)

    async def _heap(self, _request: Request) -> Response:
        try:
            body = await trio.to_thread.run_sync(profiler.heap)
        except profiler.ProfileError as error:
            return Response(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error.what}; {error.hint}\n")
        return Response(HTTPStatus.OK, body, pprof.CONTENT_TYPE)

    async def _heap_switch(self, request: Request) -> Response:
        wanted = request.query.get("activate")
        if wanted not in (None, "true", "false"):
            raise BadRequestError(
                "bad-activate", f"invalid activate value {wanted!r}; expected true or false"
            )
        if wanted is not None:
            profiler.set_heap(wanted == "true")
        active = str(profiler.heap_active()).lower()
        return Response(HTTPStatus.OK, f"heap profiling active: {active}\n")

    async def _tasks(self, _request: Request) -> Response:
        return Response(HTTPStatus.OK, task_dump.dump())


def _foreign(request: Request) -> str:
    """Why the request is not for us; empty when it is."""
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() not in _OUR_NAMES:
        return f"Host {host!r} is not this agent: use localhost, 127.0.0.1 or [::1]"
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return f"requests from the page of {origin!r} are not answered"
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "requests from pages of other sites are not answered"
    return ""


def _bounded(request: Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise BadRequestError("bad-number", f"invalid {name} value; expected 1-{most}")
    return int(text)
