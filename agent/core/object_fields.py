"""Reading a Kubernetes object field by field, where every complaint has its place.

The counterpart of fields.py for objects that are plain data already. A Value
is what stands at a path (`spec.rules[0].to[1].operation.paths[0]`); its
methods return what the caller says must be there or raise ObjectError, which
names the object, the field and the reason: what a status condition says.

A field that is null or absent is the same, as in the Kubernetes API. A field
that the reader does not know is an error: in a policy it could be the one
that narrows it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv6Network, ip_network
from typing import Any, Self, TypeVar

from meshbpf.agent.core.address import AddressError, IPAddress, IPNetwork, parse_ip
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.objects import KubeObject, ObjectKey

E = TypeVar("E")


class ObjectError(ConfigError):
    """One object cannot be used; the others can."""

    def __init__(self, key: ObjectKey, field: str, reason: str, origin: str = "") -> None:
        place = f"{origin}: " if origin and origin != "cluster" else ""
        super().__init__("bad-object", f"{place}{key}: {field}: {reason}")
        self.key = key
        self.field = field
        self.reason = reason


class Value:
    """One value of an object, and where it stands."""

    __slots__ = ("object", "path", "raw")

    def __init__(self, owner: KubeObject, raw: Any, path: str) -> None:
        self.object = owner
        self.raw = raw
        self.path = path

    @classmethod
    def spec(cls, owner: KubeObject) -> Self:
        """The object's `spec`."""
        return cls(owner, owner.spec, "spec")

    @classmethod
    def of(cls, owner: KubeObject, key: str) -> Self:
        """A field of the object's own, such as `status`."""
        return cls(owner, owner.body.get(key), key)

    def error(self, reason: str) -> Exception:
        """The complaint about this field, an ObjectError; the caller raises it.

        A reader whose complaints are of another kind overrides this.
        """
        return ObjectError(self.object.key, self.path, reason, self.object.origin)

    def record(self, known: Collection[str]) -> dict[str, Self]:
        """The fields of a mapping that are not null; all of them must be known."""
        if not isinstance(self.raw, Mapping):
            raise self._expected("a mapping")
        found = {}
        for key, raw in self.raw.items():
            child = type(self)(self.object, raw, f"{self.path}.{key}")
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                raise child.error("unknown field" + (f"; meant {close[0]}?" if close else ""))
            if raw is not None:
                found[key] = child
        return found

    def get(self, *path: str) -> Self:
        """The field below this mapping at `path`; its `raw` is None where there is none.

        For objects of which only some fields are read (a Pod has hundreds).
        """
        found = self
        for index, key in enumerate(path):
            if found.raw is None:
                return type(self)(self.object, None, ".".join((found.path, *path[index:])))
            if not isinstance(found.raw, Mapping):
                raise found._expected("a mapping")
            found = type(self)(self.object, found.raw.get(key), f"{found.path}.{key}")
        return found

    @property
    def present(self) -> bool:
        """Whether something stands here."""
        return self.raw is not None

    def entries(self) -> Iterator[tuple[str, Self]]:
        """The entries of a mapping whose keys are free."""
        if not isinstance(self.raw, Mapping):
            raise self._expected("a mapping")
        for key, raw in self.raw.items():
            if not isinstance(key, str):
                raise self.error(f"the key {key!r} is not a text")
            yield key, type(self)(self.object, raw, f"{self.path}[{key}]")

    def items(self) -> Iterator[Self]:
        """The items of a list."""
        if not isinstance(self.raw, list | tuple):
            raise self._expected("a list")
        for index, raw in enumerate(self.raw):
            yield type(self)(self.object, raw, f"{self.path}[{index}]")

    def need(self, fields: Mapping[str, Self], key: str) -> Self:
        """A field of this record that must be there."""
        found = fields.get(key)
        if found is None:
            raise type(self)(self.object, None, f"{self.path}.{key}").error("is missing")
        return found

    def text(self, *, empty: bool = False) -> str:
        """A text; empty only if the caller says so."""
        if not isinstance(self.raw, str):
            raise self._expected("a text")
        if not self.raw and not empty:
            raise self.error("must not be empty")
        return self.raw

    def texts(self) -> tuple[str, ...]:
        """A list of texts, none of them empty."""
        return tuple(item.text() for item in self.items())

    def integer(self, low: int, high: int) -> int:
        """A whole number within both bounds."""
        if not isinstance(self.raw, int) or isinstance(self.raw, bool):
            raise self._expected("a whole number")
        if not low <= self.raw <= high:
            raise self.error(f"{self.raw} is not between {low} and {high}")
        return self.raw

    def number(self, low: float, high: float) -> float:
        """A number within both bounds."""
        if not isinstance(self.raw, int | float) or isinstance(self.raw, bool):
            raise self._expected("a number")
        if not low <= self.raw <= high:
            raise self.error(f"{self.raw} is not between {low:g} and {high:g}")
        return float(self.raw)

    def boolean(self) -> bool:
        """`true` or `false`."""
        if not isinstance(self.raw, bool):
            raise self._expected("true or false")
        return self.raw

    def choice(self, table: Mapping[str, E]) -> E:
        """One of the names in `table`, spelt exactly so."""
        text = self.text()
        if text not in table:
            raise self.error(f"{_shown(text)} is none of {', '.join(table)}")
        return table[text]

    def ip(self) -> IPAddress:
        """An address that one host can have."""
        text = self.text()
        try:
            ip = parse_ip(text)
        except AddressError:
            raise self.error(f"{_shown(text)} is not an IP address") from None
        if "%" in text or ip.is_unspecified or ip.is_multicast:
            raise self.error(f"{_shown(text)} is no host's own address")
        return ip

    def labels(self) -> dict[str, str]:
        """A mapping of text to text, such as a selector; empty when there is none."""
        if self.raw is None:
            return {}
        return {key: value.text(empty=True) for key, value in self.entries()}

    def cidr(self) -> IPNetwork:
        """A prefix, or an address as the prefix of itself; bits beyond the length are dropped."""
        text = self.text()
        try:
            if "%" in text:
                raise ValueError
            network = ip_network(text, strict=False)
        except ValueError:
            raise self.error(f"{_shown(text)} is neither an IP address nor a CIDR") from None
        if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
            raise self.error(f"{_shown(text)} is IPv4 in IPv6's clothes: write it as IPv4")
        return network

    def _expected(self, what: str) -> Exception:
        found = "nothing" if self.raw is None else _shown(self.raw)
        return self.error(f"expected {what}, found {found}")


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 80 else text[:77] + "..."
