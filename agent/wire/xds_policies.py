"""Istio's authorization policies, read into the records of the mesh.

A policy that holds something which cannot be evaluated is kept, marked so
that it fails closed, and refused to the control plane all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from meshbpf.agent.core.address import IPNetwork
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    ServiceAccountMatch,
    StringMatch,
)
from meshbpf.agent.wire.pb import authorization_pb2 as pb
from meshbpf.agent.wire.xds_records import RecordError

_SCOPES: Final = {number: PolicyScope(name) for name, number in pb.Scope.items()}
_ACTIONS: Final = {number: PolicyAction(name) for name, number in pb.Action.items()}
_KINDS: Final = {"exact": MatchKind.EXACT, "prefix": MatchKind.PREFIX, "suffix": MatchKind.SUFFIX}


@dataclass(frozen=True, slots=True)
class ReadPolicy:
    """A policy, and why it was refused in spite of being kept."""

    policy: Authorization
    refusal: str = ""


def read_authorization(name: str, payload: bytes) -> ReadPolicy:
    """An `istio.security.Authorization`, published as `name`.

    Raises RecordError when not even its place and kind can be told.
    """
    try:
        message = pb.Authorization.FromString(payload)
    except DecodeError as error:
        raise RecordError(f"not an istio.security.Authorization: {error}") from None
    if f"{message.namespace}/{message.name}" != name:
        raise RecordError(f"it is {message.namespace}/{message.name} inside")
    scope, action = _SCOPES.get(message.scope), _ACTIONS.get(message.action)
    if scope is None:
        raise RecordError(f"scope {message.scope} is not known to this version")
    problem = "" if action is not None else f"action {message.action} is not known to this version"
    rules: tuple[tuple[tuple[Match, ...], ...], ...] = ()
    if not problem:
        try:
            rules = tuple(
                tuple(tuple(_match(each) for each in clause.matches) for clause in rule.clauses)
                for rule in message.rules
            )
        except RecordError as error:
            problem = error.what
    policy = Authorization(
        name=message.name,
        namespace=message.namespace,
        scope=scope,
        action=action or PolicyAction.DENY,
        rules=rules,
        dry_run=message.dry_run,
        inexpressible=problem,
    )
    return ReadPolicy(policy, problem)


def _match(one: pb.Match) -> Match:
    # A field of a later version narrows the match, so ignoring it would widen
    # an ALLOW; a DENY would be ignored by ignoring its only field.
    beyond = UnknownFieldSet(one)
    if unknown := [beyond[place].field_number for place in range(len(beyond))]:
        raise RecordError(f"a match has fields {unknown}, which this version does not know")
    return Match(
        namespaces=_texts(one.namespaces),
        not_namespaces=_texts(one.not_namespaces),
        service_accounts=_accounts(one.service_accounts),
        not_service_accounts=_accounts(one.not_service_accounts),
        principals=_texts(one.principals),
        not_principals=_texts(one.not_principals),
        source_ips=_networks(one.source_ips),
        not_source_ips=_networks(one.not_source_ips),
        destination_ips=_networks(one.destination_ips),
        not_destination_ips=_networks(one.not_destination_ips),
        destination_ports=tuple(one.destination_ports),
        not_destination_ports=tuple(one.not_destination_ports),
    )


def _texts(messages: Iterable[pb.StringMatch]) -> tuple[StringMatch, ...]:
    found = []
    for message in messages:
        kind = message.WhichOneof("match_type")
        if kind is None:
            raise RecordError("a text match of a kind that this version does not know")
        if kind == "presence":
            found.append(StringMatch(MatchKind.PRESENCE))
        else:
            found.append(StringMatch(_KINDS[kind], getattr(message, kind)))
    return tuple(found)


def _accounts(messages: Iterable[pb.ServiceAccountMatch]) -> tuple[ServiceAccountMatch, ...]:
    return tuple(ServiceAccountMatch(one.namespace, one.service_account) for one in messages)


def _networks(messages: Iterable[pb.Address]) -> tuple[IPNetwork, ...]:
    found: list[IPNetwork] = []
    for message in messages:
        try:
            found.append(ip_network((message.address, message.length), strict=False))
        except ValueError as error:
            raise RecordError(f"not a range of addresses: {error}") from None
    return tuple(found)
