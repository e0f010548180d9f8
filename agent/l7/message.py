"""Requests and responses as the waypoint's decisions see them, whatever HTTP carried them.

Header names are lower-case. Values stay the bytes that were received, since
most are passed on unread; text is made of those that are asked for, as
Latin-1, in which every byte is a letter.

A head is the one thing in `l7` that changes: filters edit it in their order,
and what leaves is what the last one left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

RawHeaders = list[tuple[bytes, bytes]]


class Headers:
    """Fields in the order received; names may repeat."""

    __slots__ = ("raw",)

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.raw: RawHeaders = list(raw)

    def get(self, name: str) -> str | None:
        """All values of a field, with commas between (RFC 9110, section 5.3); None without one."""
        wanted = name.encode("latin-1")
        found = [value for each, value in self.raw if each == wanted]
        if not found:
            return None
        return (found[0] if len(found) == 1 else b",".join(found)).decode("latin-1")

    def every(self, name: str) -> list[str]:
        """Each value of a field by itself."""
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for each, value in self.raw if each == wanted]

    def set(self, name: str, value: str) -> None:
        """One field of this name, whatever there was. `name` is lower-case."""
        self.remove(name)
        self.add(name, value)

    def add(self, name: str, value: str) -> None:
        """One more field. `name` is lower-case."""
        self.raw.append((name.encode("latin-1"), value.encode("latin-1", "replace")))

    def remove(self, name: str) -> None:
        """No field of this name."""
        wanted = name.encode("latin-1")
        if any(each == wanted for each, _ in self.raw):
            self.raw = [(each, value) for each, value in self.raw if each != wanted]

    def items(self) -> Iterator[tuple[str, str]]:
        """All fields as text."""
        for name, value in self.raw:
            yield name.decode("latin-1"), value.decode("latin-1")

    def copy(self) -> Headers:
        """Fields of one's own."""
        return Headers(self.raw)

    def __contains__(self, name: str) -> bool:
        wanted = name.encode("latin-1")
        return any(each == wanted for each, _ in self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        return f"Headers({self.raw!r})"


class RequestHead:
    """What a client asks for. `path` has the query; `authority` stands for `Host` too.

    The headers hold no pseudo-header and no `host`: whoever sends the request
    on makes those of these attributes.
    """

    __slots__ = ("authority", "headers", "method", "path", "scheme")

    def __init__(
        self,
        method: str,
        path: str,
        authority: str,
        headers: Headers | None = None,
        scheme: str = "http",
    ) -> None:
        self.method = method
        self.path = path
        self.authority = authority
        self.headers = Headers() if headers is None else headers
        self.scheme = scheme

    @property
    def path_only(self) -> str:
        """The path without the query."""
        return self.path.partition("?")[0]

    @property
    def query(self) -> str:
        """What follows the first `?`; empty without one."""
        return self.path.partition("?")[2]

    @property
    def host(self) -> str:
        """The authority without its port, lower-case."""
        host, colon, port = self.authority.rpartition(":")
        if colon and port.isdigit() and (":" not in host or host.endswith("]")):
            return host.lower()
        return self.authority.lower()

    def copy(self) -> RequestHead:
        """A head of one's own, for a mirror or a retry."""
        return RequestHead(self.method, self.path, self.authority, self.headers.copy(), self.scheme)

    def __repr__(self) -> str:
        return f"RequestHead({self.method} {self.scheme}://{self.authority}{self.path})"


class ResponseHead:
    """A final answer (never 1xx). `trailers` arrive after the body, for gRPC above all."""

    __slots__ = ("headers", "status", "trailers")

    def __init__(self, status: int, headers: Headers | None = None) -> None:
        self.status = status
        self.headers = Headers() if headers is None else headers
        self.trailers: Headers | None = None

    def __repr__(self) -> str:
        return f"ResponseHead({self.status})"
