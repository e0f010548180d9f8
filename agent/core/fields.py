"""Reading a YAML tree field by field, where every complaint has its place.

A Field is a node with its path (`workloads[0].workloadIps[1]`). Its methods
return the value that the caller says must be there, or raise a ConfigError of
the form `mesh.yaml:12: workloads[0].workloadIps[1]: '10.0.0.x' is not an IP
address`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from collections.abc import Mapping as MappingOf
from dataclasses import replace
from ipaddress import IPv6Network, ip_network
from typing import TypeVar

from meshbpf.agent.core.address import AddressError, IPAddress, IPNetwork, parse_ip
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.identity import IdentityError, SpiffeId
from meshbpf.agent.core.yaml_tree import Mapping, Node, Scalar, Sequence

E = TypeVar("E")

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_SIMPLE_KEY = re.compile(r"[\w./:*-]{1,80}", re.ASCII)
_PREFIX_LENGTH = re.compile(r"[0-9]{1,3}")


class Field:
    """One node of the file, and where it stands."""

    __slots__ = ("code", "node", "origin", "path")

    def __init__(self, node: Node, origin: str, path: str = "", code: str = "bad-config") -> None:
        self.node = node
        self.origin = origin
        self.path = path
        self.code = code

    # -- complaints

    def error(self, message: str, hint: str = "") -> ConfigError:
        """The complaint about this field; the caller raises it."""
        place = f"{self.path}: " if self.path else ""
        return ConfigError(self.code, f"{self.origin}:{self.node.line}: {place}{message}", hint)

    def _expected(self, what: str) -> ConfigError:
        return self.error(f"expected {what}, found {_describe(self.node)}")

    # -- moving down

    def _child(self, node: Node, step: str) -> Field:
        return Field(node, self.origin, f"{self.path}{step}", self.code)

    def at(self, *path: str | int) -> Field:
        """The field below this one at `path`, as far down as there is one: for complaints."""
        found = self
        for step in path:
            node = found.node
            if isinstance(node, Sequence) and isinstance(step, int):
                found = found._child(node.items[step], f"[{step}]")
            elif isinstance(node, Mapping):
                below = next((value for key, value in node.entries if key.text == step), None)
                if below is None:
                    break
                text = str(step)
                plain = text.isidentifier()
                dotted = f".{text}" if found.path else text
                found = found._child(below, dotted if plain else f"[{_step(text)}]")
        return found

    def items(self) -> Iterator[Field]:
        """The items of a list."""
        if not isinstance(self.node, Sequence) or self.node.tag:
            raise self._expected("a list")
        for index, item in enumerate(self.node.items):
            yield self._child(item, f"[{index}]")

    def entries(self) -> Iterator[tuple[Field, Field]]:
        """(key, value) of a mapping with free keys; a key may not occur twice."""
        for key, value, step in self._entries():
            path = f"[{step}]"
            yield self._child(key, path), self._child(value, path)

    def members(self) -> Iterator[tuple[str, Field]]:
        """(key, value) of a mapping whose keys are names of fields, known or not."""
        for key, value, step in self._entries():
            yield key.text, self._child(value, f".{step}" if self.path else step)

    def record(self, known: Collection[str]) -> dict[str, Field]:
        """The fields of a mapping whose keys are all known."""
        fields: dict[str, Field] = {}
        for key, value, step in self._entries():
            path = f".{step}" if self.path else step
            if key.text not in known:
                close = difflib.get_close_matches(key.text, known, n=1)
                raise self._child(key, path).error(
                    "unknown key", f"did you mean {close[0]}?" if close else ""
                )
            fields[key.text] = self._child(value, path)
        return fields

    def _entries(self) -> Iterator[tuple[Scalar, Node, str]]:
        if not isinstance(self.node, Mapping) or self.node.tag:
            raise self._expected("a mapping")
        seen: dict[str, int] = {}
        for key, value in self.node.entries:
            step = _step(key.text)
            if key.text in seen:
                path = f".{step}" if self.path else step
                raise self._child(key, path).error(f"given at line {seen[key.text]} already")
            seen[key.text] = key.line
            yield key, value, step

    def need(self, fields: MappingOf[str, Field], key: str) -> Field:
        """A field of this record that must be there."""
        found = fields.get(key)
        if found is None:
            raise self.error(f"{key} is missing")
        return found

    def untagged(self) -> Field:
        """The same value without its tag, whose meaning the caller has taken."""
        return Field(replace(self.node, tag=""), self.origin, self.path, self.code)

    # -- values

    @property
    def is_null(self) -> bool:
        """Whether the value is written as nothing, `~` or `null`."""
        node = self.node
        return isinstance(node, Scalar) and node.plain and not node.tag and node.text in _NULLS

    def text(self, *, empty: bool = False) -> str:
        """A text, as it was written; empty only if the caller says so."""
        node = self.node
        if not isinstance(node, Scalar) or node.tag or self.is_null:
            raise self._expected("a text")
        if not node.text and not empty:
            raise self.error("must not be empty")
        return node.text

    def integer(self, low: int, high: int) -> int:
        """A whole number in decimal, within both bounds."""
        node = self.node
        if not isinstance(node, Scalar) or node.tag or self.is_null:
            raise self._expected("a number")
        if _NUMBER.fullmatch(node.text) is None:
            raise self.error(f"{_shown(node.text)} is not a whole number")
        value = int(node.text)
        if not low <= value <= high:
            raise self.error(f"{value} is not between {low} and {high}")
        return value

    def port(self, low: int = 1) -> int:
        """A TCP port."""
        return self.integer(low, 65535)

    def boolean(self) -> bool:
        """`true` or `false`."""
        node = self.node
        value = _TRUTHS.get(node.text) if isinstance(node, Scalar) and node.plain else None
        if value is None or node.tag:
            raise self._expected("true or false")
        return value

    def choice(self, table: MappingOf[str, E]) -> E:
        """One of the names in `table`, spelt exactly so."""
        text = self.text()
        if text not in table:
            raise self.error(f"{_shown(text)} is none of {', '.join(table)}")
        return table[text]

    # -- values of the mesh

    def ip(self) -> IPAddress:
        """An address that one host can have."""
        return self.checked_ip(self.text())

    def checked_ip(self, text: str) -> IPAddress:
        """`text`, a part of this field, as an address that one host can have."""
        try:
            if "%" in text:
                raise AddressError(f"{text!r} has a scope id, which means nothing to other hosts")
            ip = parse_ip(text)
        except AddressError as error:
            raise self.error(_cut(error.what)) from None
        if ip.is_unspecified or ip.is_multicast:
            raise self.error(f"{text!r} is no host's own address")
        return ip

    def checked_cidr(self, text: str) -> IPNetwork:
        """`text`, this field or a part of it, as a prefix; bits beyond the length are dropped."""
        _, slash, length = text.partition("/")
        try:
            if "%" in text or (slash and _PREFIX_LENGTH.fullmatch(length) is None):
                raise ValueError
            network = ip_network(text, strict=False)
        except ValueError:
            raise self.error(f"{_shown(text)} is not a CIDR (ADDRESS/LENGTH)") from None
        if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
            raise self.error(f"{_shown(text)} is IPv4 in IPv6's clothes: write it as IPv4")
        return network

    def spiffe(self) -> SpiffeId:
        """An identity."""
        try:
            return SpiffeId.parse(self.text())
        except IdentityError as error:
            raise self.error(_cut(error.what), error.hint) from None

    def identity_part(self) -> str:
        """A text that can stand in an identity."""
        text = self.text()
        try:
            SpiffeId(text, "x", "x")
        except IdentityError as error:
            raise self.error(_cut(error.what)) from None
        return text


def _describe(node: Node) -> str:
    if node.tag:
        return f"the tag {_shown(node.tag)}"
    match node:
        case Scalar() if node.plain and node.text in _NULLS:
            return "nothing"
        case Scalar():
            return _shown(node.text)
        case Sequence():
            return "a list"
        case Mapping():
            return "a mapping"


def _step(key: str) -> str:
    return key if _SIMPLE_KEY.fullmatch(key) else _shown(key)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _cut(message: str) -> str:
    return message if len(message) <= 200 else message[:197] + "..."
