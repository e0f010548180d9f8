"""A YAML tree as the plain values that JSON has: what Kubernetes makes of a manifest.

Which plain scalars are not text follows YAML 1.1, as kubectl's reader does:
`on`, `no` and `0644` are a truth, a truth and a number. What is quoted, or
tagged `!!str`, is text.
"""

from __future__ import annotations

import re
from typing import Any

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.yaml_tree import Mapping, Scalar, Sequence

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {
    spelt: truth
    for truth, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for spelt in (word, word.capitalize(), word.upper())
}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_OCTAL = re.compile(r"0o?[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+)([eE][-+]?[0-9]+)?"
)


def plain_value(field: Field) -> Any:
    """The value of a node; ConfigError, with its line, for a tag or a key given twice."""
    node = field.node
    if node.tag:
        raise field.error(f"the tag {node.tag!r} means nothing in a manifest")
    match node:
        case Scalar():
            return _scalar(node.text) if node.plain else node.text
        case Sequence():
            return [plain_value(item) for item in field.items()]
        case Mapping():
            return {key: plain_value(value) for key, value in field.members()}


def _scalar(text: str) -> Any:
    if text in _NULLS:
        return None
    if text in _TRUTHS:
        return _TRUTHS[text]
    if _DECIMAL.fullmatch(text):
        # Beyond 64 bits no field of the API has a meaning; and int() of a
        # million digits would take its time.
        return int(text) if len(text) <= 20 else text
    if _OCTAL.fullmatch(text) and len(text) <= 20:
        return int(text.removeprefix("0o"), 8)
    if _HEX.fullmatch(text) and len(text) <= 20:
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
