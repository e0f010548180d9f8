"""What every verb of the control schema is built from: `api.py` has the verbs."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

import msgspec

R = TypeVar("R")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what an agent answers."""


class Request(msgspec.Struct, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a client asks; `R` is the type of the answer."""

    VERB: ClassVar[str]
    RESULT: ClassVar[type[Result]]


# --- envelope ---------------------------------------------------------------


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """A MeshbpfError on the wire."""

    code: str
    what: str
    hint: str = ""
    exit_status: int = 1


class RequestEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request line."""

    verb: str
    args: msgspec.Raw = msgspec.Raw(b"{}")


class ReplyEnvelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One reply line: `result` when `ok`, else `error`."""

    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"")
    error: ErrorBody | None = None
