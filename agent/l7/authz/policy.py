"""AuthorizationPolicy (security.istio.io), parsed.

Istio has two spellings for most tests: a field of `from.source` or
`to.operation`, and a key of `when`. Both become the same Condition here, so a rule
is three levels: the sources of which one must hold, the operations of which
one must hold, and the conditions which must all hold. Within a source or an
operation all tests must hold; a test holds if any of its values matches and
none of its `not_values` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.core.policy import ServiceAccountMatch, StringMatch
from meshbpf.agent.l7.attachment import Target
from meshbpf.agent.l7.authz.patterns import Glob, PathTemplate, RequestPrincipal


class Action(StrEnum):
    """What a match means."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"


class Attribute(StrEnum):
    """What a test looks at, named by its key in `when` where it has one."""

    SOURCE_IP = "source.ip"
    REMOTE_IP = "remote.ip"
    NAMESPACE = "source.namespace"
    SERVICE_ACCOUNT = "source.serviceAccount"
    TRUST_DOMAIN = "source.trustDomain"
    PRINCIPAL = "source.principal"
    DESTINATION_IP = "destination.ip"
    DESTINATION_PORT = "destination.port"
    SNI = "connection.sni"
    # From here on only HTTP has them.
    REQUEST_PRINCIPAL = "request.auth.principal"
    AUDIENCES = "request.auth.audiences"
    PRESENTER = "request.auth.presenter"
    CLAIMS = "request.auth.claims"
    HEADERS = "request.headers"
    HOST = "host"
    METHOD = "method"
    PATH = "path"
    # Envoy's own metadata: nothing that this proxy has.
    ENVOY_FILTER = "experimental.envoy.filters"

    @property
    def http_only(self) -> bool:
        """Whether a TCP connection has no such attribute."""
        return self in _HTTP_ONLY


_HTTP_ONLY = frozenset(
    {
        Attribute.REQUEST_PRINCIPAL,
        Attribute.AUDIENCES,
        Attribute.PRESENTER,
        Attribute.CLAIMS,
        Attribute.HEADERS,
        Attribute.HOST,
        Attribute.METHOD,
        Attribute.PATH,
    }
)

Pattern = (
    StringMatch | Glob | ServiceAccountMatch | IPNetwork | int | PathTemplate | RequestPrincipal
)


@dataclass(frozen=True, slots=True)
class Condition:
    """One attribute compared with patterns of the type that belongs to it.

    `path` holds what stood in the key's brackets: a header's name in lower
    case, or the steps to a claim.
    """

    attribute: Attribute
    values: tuple[Pattern, ...] = ()
    not_values: tuple[Pattern, ...] = ()
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpRule:
    """`sources` and `operations` empty mean any."""

    sources: tuple[tuple[Condition, ...], ...] = ()
    operations: tuple[tuple[Condition, ...], ...] = ()
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpPolicy:
    """One policy.

    `inexpressible` says what could not be read of the object. Such a policy
    fails closed: DENY and CUSTOM refuse everything at their targets, ALLOW
    allows nothing, AUDIT does nothing.
    """

    key: ObjectKey
    action: Action
    rules: tuple[HttpRule, ...] = ()
    targets: tuple[Target, ...] = ()
    provider: str = ""
    dry_run: bool = False
    inexpressible: str = ""

    @property
    def name(self) -> str:
        """NAMESPACE/NAME."""
        return f"{self.key.namespace}/{self.key.name}"


Policies = Sequence[HttpPolicy]
