"""Authorization policy, as Istio's control plane sends it to node proxies.

The fields are those of `istio.security.Authorization`. Rules, clauses and
matches nest as rules -> clauses -> matches; what that means is told where it
is evaluated (authz.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshbpf.agent.core.address import IPNetwork


class PolicyScope(StrEnum):
    """Which workloads a policy applies to."""

    GLOBAL = "GLOBAL"
    NAMESPACE = "NAMESPACE"
    WORKLOAD_SELECTOR = "WORKLOAD_SELECTOR"  # those that list it in authorization_policies


class PolicyAction(StrEnum):
    """What a match means."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class MatchKind(StrEnum):
    """How a StringMatch compares."""

    EXACT = "EXACT"
    PREFIX = "PREFIX"
    SUFFIX = "SUFFIX"
    PRESENCE = "PRESENCE"  # any non-empty text


@dataclass(frozen=True, slots=True)
class StringMatch:
    """A test of one text; `value` is empty for PRESENCE."""

    kind: MatchKind
    value: str = ""

    @classmethod
    def read(cls, text: str) -> StringMatch:
        """As Istio's objects write it: `*`, `*suffix`, `prefix*`, else exact.

        A leading `*` counts before a trailing one.
        """
        if text == "*":
            return cls(MatchKind.PRESENCE)
        if text.startswith("*"):
            return cls(MatchKind.SUFFIX, text[1:])
        if text.endswith("*"):
            return cls(MatchKind.PREFIX, text[:-1])
        return cls(MatchKind.EXACT, text)

    def matches(self, text: str) -> bool:
        """Whether `text` passes."""
        match self.kind:
            case MatchKind.EXACT:
                return text == self.value
            case MatchKind.PREFIX:
                return text.startswith(self.value)
            case MatchKind.SUFFIX:
                return text.endswith(self.value)
            case MatchKind.PRESENCE:
                return text != ""


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """A test of the caller's namespace and account; the trust domain does not matter."""

    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """All non-empty fields must hold; a field holds if any of its values does.

    A `not_` field holds if none of its values does. A match with no field at
    all holds for nothing.
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[IPNetwork, ...] = ()
    not_source_ips: tuple[IPNetwork, ...] = ()
    destination_ips: tuple[IPNetwork, ...] = ()
    not_destination_ips: tuple[IPNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


Clause = tuple[Match, ...]
Rule = tuple[Clause, ...]


@dataclass(frozen=True, slots=True)
class Authorization:
    """One policy; (namespace, name) is its key.

    `inexpressible` is set by whoever reads policies from outside when one
    holds something that this version cannot evaluate, and says what. Such a
    policy fails closed: DENY matches every connection, ALLOW none.
    """

    name: str
    namespace: str
    scope: PolicyScope
    action: PolicyAction
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False
    inexpressible: str = ""
    key: str = field(init=False, repr=False, compare=False)
    """NAMESPACE/NAME, the form in which workloads name their policies."""
    derived: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    """What the evaluator makes of the rules, for as long as the policy lives (authz_index.py)."""

    def __post_init__(self) -> None:
        """Build the key once."""
        object.__setattr__(self, "key", f"{self.namespace}/{self.name}")
