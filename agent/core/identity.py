"""Who a workload is: Istio's form of a SPIFFE identity.

Exactly `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`, as Istio's
CA issues it and as ztunnel reads it; every other URI is not an identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from meshbpf.agent.core.errors import MeshbpfError

SCHEME = "spiffe://"
DEFAULT_TRUST_DOMAIN = "cluster.local"

# Printable ASCII without the delimiters of a URI. Percent signs are out, so
# that no two spellings of one identity exist.
_PART = r"[!$&-.0-9:;=@A-Z_a-z~]+"
_PART_ONLY = re.compile(_PART)
_SPIFFE = re.compile(rf"spiffe://({_PART})/ns/({_PART})/sa/({_PART})")


class IdentityError(MeshbpfError):
    """A text that is not an identity of the form that Istio uses."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "bad-identity", what, "the form is spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT"
        )


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A workload's identity. Built from checked parts, or by `parse`."""

    trust_domain: str
    namespace: str
    service_account: str
    # What policy's `principals` compare with: the URI without its scheme.
    principal: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse parts that a URI could not carry: they would not survive a certificate."""
        for part in (self.trust_domain, self.namespace, self.service_account):
            if _PART_ONLY.fullmatch(part) is None:
                raise IdentityError(f"{part!r} cannot be a part of an identity")
        object.__setattr__(
            self, "principal", f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"
        )

    def __str__(self) -> str:
        return SCHEME + self.principal

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Read the URI; IdentityError when it has any other form."""
        return _parse(text)


@lru_cache(maxsize=4096)
def _parse(text: str) -> SpiffeId:
    found = _SPIFFE.fullmatch(text)
    if found is None:
        raise IdentityError(f"{text!r} is not a workload identity")
    return SpiffeId(found[1], found[2], found[3])
