"""YAML as a tree that remembers its lines.

Scalars stay text: what a field means is for whoever reads it to say, so a
name like `on`, `1e3` or `012` arrives as it was written, under any version of
YAML. No cycles, and bounds on depth and size: a file cannot make its reader
recurse or grow without end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from meshbpf.agent.core.errors import ConfigError

MAX_DEPTH = 64
# With aliases expanded. A mesh of 100,000 workloads has about four million.
MAX_NODES = 20_000_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, if PyYAML was built with it
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """One value. `plain`: written without quotes, so it may stand for null, a number, a truth."""

    line: int
    text: str
    plain: bool
    tag: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A list."""

    line: int
    items: tuple[Node, ...]
    tag: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """Keys and values in the order of the file; a key may still occur twice."""

    line: int
    entries: tuple[tuple[Scalar, Node], ...]
    tag: str = ""


Node = Scalar | Sequence | Mapping


class YamlError(ConfigError):
    """A text that is not well-formed YAML."""

    def __init__(self, origin: str, line: int, what: str) -> None:
        super().__init__("bad-yaml", f"{origin}:{line}: {what}")


class _Open:
    """A list or mapping whose end has not come yet."""

    __slots__ = ("anchor", "children", "is_mapping", "line", "size", "tag")

    def __init__(self, event: Any, tag: str) -> None:
        self.is_mapping = isinstance(event, yaml.MappingStartEvent)
        self.line: int = event.start_mark.line + 1
        self.anchor: str | None = event.anchor
        self.tag = tag
        self.children: list[Node] = []
        self.size = 1


class _Builder:
    def __init__(self, origin: str, *, several: bool) -> None:
        self.origin = origin
        self.several = several
        self.documents: list[Node] = []
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int] | None] = {}  # None: still open

    def take(self, event: Any) -> None:
        """Fold one event of the parser into the tree."""
        line: int = event.start_mark.line + 1
        # By exact type, commonest first: this runs once for every value of the file.
        kind = type(event)
        if kind is yaml.ScalarEvent:
            tag = event.tag
            # libyaml's binding says "" and PyYAML itself None for a plain style.
            plain = not event.style and (tag is None or not tag.startswith(_STANDARD))
            scalar = Scalar(line, event.value, plain, _application_tag(tag) if tag else "")
            self.remember(event.anchor, scalar, 1)
            self.add(scalar, 1)
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            ended = self.open.pop()
            node = self.finish(ended)
            self.remember(ended.anchor, node, ended.size)
            self.add(node, ended.size)
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            if len(self.open) >= MAX_DEPTH:
                raise YamlError(self.origin, line, f"nested deeper than {MAX_DEPTH} levels")
            if event.anchor is not None:
                self.anchors[event.anchor] = None
            self.open.append(_Open(event, _application_tag(event.tag) if event.tag else ""))
        elif kind is yaml.AliasEvent:
            known = self.anchors.get(event.anchor)
            if known is None:
                raise YamlError(
                    self.origin, line, f"*{event.anchor} names no value that ended before it"
                )
            self.add(*known)
        elif kind is yaml.DocumentStartEvent:
            if self.documents and not self.several:
                raise YamlError(self.origin, line, "a second document begins here")
            self.anchors.clear()  # they end with their document

    def remember(self, anchor: str | None, node: Node, size: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = (node, size)

    def add(self, node: Node, size: int) -> None:
        if not self.open:
            self.documents.append(node)
            return
        parent = self.open[-1]
        if parent.is_mapping and len(parent.children) % 2 == 0 and not isinstance(node, Scalar):
            raise YamlError(self.origin, node.line, "a list or mapping cannot be a key here")
        parent.children.append(node)
        parent.size += size
        if parent.size > MAX_NODES:
            raise YamlError(self.origin, node.line, f"more than {MAX_NODES} values")

    def finish(self, ended: _Open) -> Node:
        if not ended.is_mapping:
            return Sequence(ended.line, tuple(ended.children), ended.tag)
        entries: list[tuple[Scalar, Node]] = []
        pairs = iter(ended.children)
        for key, value in zip(pairs, pairs, strict=True):
            assert isinstance(key, Scalar)  # noqa: S101 - `add` saw to it
            entries.append((key, value))
        return Mapping(ended.line, tuple(entries), ended.tag)


def read_yaml(text: str, origin: str) -> Node:
    """Parse one document; YamlError, naming `origin` and the line, if it is not one."""
    found = _parse(text, _Builder(origin, several=False))
    if not found:
        raise YamlError(origin, 1, "the file is empty; an empty mesh is written {}")
    return found[0]


def read_documents(text: str, origin: str) -> list[Node]:
    """Parse all documents, of which there may be none; YamlError as `read_yaml`."""
    return _parse(text, _Builder(origin, several=True))


def _parse(text: str, builder: _Builder) -> list[Node]:
    origin = builder.origin
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(origin, line, f"not YAML: {what or error}") from None
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        raise YamlError(origin, line, f"not YAML: {error.reason}") from None
    except UnicodeError:
        raise YamlError(origin, 1, "not YAML: the text has code points that UTF-8 lacks") from None
    return builder.documents


def _application_tag(tag: str) -> str:
    """`tag` if it is the application's own (`!Exact`), "" for YAML's types and none."""
    return "" if tag == "!" or tag.startswith(_STANDARD) else tag
