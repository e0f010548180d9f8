"""What a WorkloadEntry says of a machine, alone or as one of a ServiceEntry's endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshbpf.agent.core.address import AddressError, IPAddress, parse_ip
from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN, IdentityError, SpiffeId
from meshbpf.agent.core.object_fields import Value
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import DEFAULT_SERVICE_ACCOUNT, Locality

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
# The last label of a name is not a number, or it would be an address that somebody mistyped.
_FQDN = re.compile(rf"(?=.{{1,253}}$)(?!(?:.*\.)?[0-9]+$){_LABEL}(?:\.{_LABEL})*")
_ENTRY = ("address", "ports", "labels", "network", "locality", "weight", "serviceAccount")
_UNIX = "unix://"


@dataclass(frozen=True, slots=True)
class Entry:
    """A machine as a WorkloadEntry's spec describes it."""

    address: str
    """As written: an IP address, a host name, or nothing for one behind a network's gateway."""
    ip: IPAddress | None
    ports: Mapping[str, int]
    """Its own port for each port name of a service."""
    labels: Mapping[str, str]
    network: str
    locality: Locality
    weight: int
    account: str

    @classmethod
    def at_host(cls, hostname: str) -> Entry:
        """One that is known by its name alone."""
        return cls(hostname, None, {}, {}, "", Locality(), 0, DEFAULT_SERVICE_ACCOUNT)


def is_fqdn(text: str) -> bool:
    """Whether a host could have that name."""
    return _FQDN.fullmatch(text) is not None


def read_entry(value: Value) -> Entry:
    """A WorkloadEntry's spec, or one of a ServiceEntry's endpoints. Raises ObjectError."""
    fields = value.record(_ENTRY)
    network = _text(fields, "network")
    address, ip = _address(value, fields, network)
    return Entry(
        address=address,
        ip=ip,
        ports={name: port.integer(1, 65535) for name, port in fields["ports"].entries()}
        if "ports" in fields
        else {},
        labels=fields["labels"].labels() if "labels" in fields else {},
        network=network,
        locality=Locality(*_text(fields, "locality").split("/")[:3]),
        weight=fields["weight"].integer(0, 2**32 - 1) if "weight" in fields else 0,
        account=_account(fields),
    )


def _account(fields: Mapping[str, Value]) -> str:
    account = _text(fields, "serviceAccount") or DEFAULT_SERVICE_ACCOUNT
    try:
        SpiffeId(DEFAULT_TRUST_DOMAIN, "namespace", account)
    except IdentityError as error:
        raise fields["serviceAccount"].error(error.what) from None
    return account


def _address(
    value: Value, fields: Mapping[str, Value], network: str
) -> tuple[str, IPAddress | None]:
    text = _text(fields, "address")
    if not text:
        if not network:
            raise value.get("address").error(
                "is missing: only an entry with a network may have none"
            )
        return "", None
    place = fields["address"]
    if text.startswith(_UNIX):
        raise place.error("a node proxy cannot connect to a Unix socket")
    try:
        parse_ip(text)
    except AddressError:
        if not is_fqdn(text):
            raise place.error(f"{text!r} is neither an IP address nor a host's name") from None
        return text, None
    return text, place.ip()


def _text(fields: Mapping[str, Value], key: str) -> str:
    return fields[key].text(empty=True) if key in fields else ""


def entry_of(owner: KubeObject) -> tuple[Entry, KubeObject]:
    """A WorkloadEntry, and the object with all of its labels: `metadata`'s before `spec`'s."""
    entry = read_entry(Value.spec(owner))
    return entry, owner.with_labels({**entry.labels, **owner.labels})
