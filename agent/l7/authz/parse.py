"""From an AuthorizationPolicy object to an HttpPolicy.

What Istio's admission webhook would refuse (pkg/config/validation) raises
ObjectError here, with the field. `closed_policy` makes of such an object a
policy that fails closed, so that a typing error does not open a service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.policy import ServiceAccountMatch, StringMatch
from meshbpf.agent.l7.attachment import TARGET_FIELDS, Target, read_targets
from meshbpf.agent.l7.authz.patterns import Glob, path_pattern, request_principal
from meshbpf.agent.l7.authz.policy import (
    Action,
    Attribute,
    Condition,
    HttpPolicy,
    HttpRule,
    Pattern,
)
from meshbpf.agent.l7.problem import ObjectError
from meshbpf.agent.l7.spec import Value

GROUP = "security.istio.io"
KIND = "AuthorizationPolicy"
DRY_RUN = "istio.io/dry-run"

_MAX_ACCOUNTS = 16  # as Istio's validation has it
_MAX_ACCOUNT_CHARS = 320

# Field of `from.source` or `to.operation` -> what it looks at.
_SOURCE = {
    "principals": Attribute.PRINCIPAL,
    "requestPrincipals": Attribute.REQUEST_PRINCIPAL,
    "namespaces": Attribute.NAMESPACE,
    "serviceAccounts": Attribute.SERVICE_ACCOUNT,
    "trustDomains": Attribute.TRUST_DOMAIN,
    "ipBlocks": Attribute.SOURCE_IP,
    "remoteIpBlocks": Attribute.REMOTE_IP,
}
_OPERATION = {
    "hosts": Attribute.HOST,
    "ports": Attribute.DESTINATION_PORT,
    "methods": Attribute.METHOD,
    "paths": Attribute.PATH,
}
_BRACKETED = {Attribute.HEADERS, Attribute.CLAIMS, Attribute.ENVOY_FILTER}
_NOT_KEYS = _BRACKETED | {Attribute.HOST, Attribute.METHOD, Attribute.PATH}
_KEYS = {each.value: each for each in Attribute if each not in _NOT_KEYS}
_ACTIONS = {each.value: each for each in Action}
# strconv.ParseBool, by which Istio reads the annotation.
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})


def parse_policy(source: KubeObject) -> HttpPolicy:
    """The policy; ObjectError names the field that makes it unusable."""
    spec = Value.spec(source)
    fields = spec.record((*TARGET_FIELDS, "action", "rules", "provider"))
    targets = read_targets(fields)
    action = fields["action"].choice(_ACTIONS) if "action" in fields else Action.ALLOW
    provider = ""
    if "provider" in fields:
        if action is not Action.CUSTOM:
            raise fields["provider"].error(f"stands only beside action CUSTOM, not {action}")
        known = fields["provider"].record(("name",))
        provider = fields["provider"].need(known, "name").text()
    elif action is Action.CUSTOM:
        spec.need(fields, "provider")
    if action in (Action.DENY, Action.CUSTOM):
        # Without rules it would never match, which nobody can have meant.
        spec.need(fields, "rules")
    rules = tuple(map(_rule, fields["rules"].items())) if "rules" in fields else ()
    return HttpPolicy(source.key, action, rules, targets, provider, dry_run=_dry_run(source, spec))


def closed_policy(source: KubeObject, error: ObjectError) -> HttpPolicy:
    """As much of a bad policy as says what it would close, and where."""
    raw: Any = source.body.get("spec")
    spec: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    action = _ACTIONS.get(str(spec.get("action", "ALLOW")), Action.DENY)
    targets: tuple[Target, ...] = ()
    whole = Value.spec(source)
    places = {
        name: Value(source, spec[name], f"{whole.path}.{name}")
        for name in TARGET_FIELDS
        if spec.get(name) is not None
    }
    try:
        targets = read_targets(places)
    except ObjectError:
        # Whatever it was meant for cannot be known: it applies nowhere, and
        # the report of the first error stands.
        targets = ()
    dry_run = source.annotations.get(DRY_RUN) in _TRUE
    return HttpPolicy(source.key, action, (), targets, dry_run=dry_run, inexpressible=str(error))


def _dry_run(source: KubeObject, spec: Value) -> bool:
    written = source.annotations.get(DRY_RUN)
    if written is None or written in _FALSE:
        return False
    if written in _TRUE:
        return True
    raise Value(source, written, f"metadata.annotations[{DRY_RUN}]").error(
        "is neither true nor false"
    )


def _rule(value: Value) -> HttpRule:
    fields = value.record(("from", "to", "when"))
    return HttpRule(
        _alternatives(fields, "from", "source", _SOURCE),
        _alternatives(fields, "to", "operation", _OPERATION),
        tuple(map(_condition, fields["when"].items())) if "when" in fields else (),
    )


def _alternatives(
    fields: Mapping[str, Value], key: str, inner: str, known: Mapping[str, Attribute]
) -> tuple[tuple[Condition, ...], ...]:
    if key not in fields:
        return ()
    found = []
    for item in fields[key].items():
        body = item.need(item.record((inner,)), inner)
        found.append(_tests(body, known))
    if not found:
        raise fields[key].error("must not be empty: leave it out to mean any")
    return tuple(found)


def _tests(body: Value, known: Mapping[str, Attribute]) -> tuple[Condition, ...]:
    names = {name: _not(name) for name in known}
    fields = body.record((*names, *names.values()))
    tests = []
    for name, attribute in known.items():
        values = _patterns(fields.get(name), attribute)
        not_values = _patterns(fields.get(names[name]), attribute)
        if values or not_values:
            tests.append(Condition(attribute, values, not_values))
    if not tests:
        raise body.error("must not be empty")
    accounts = {"serviceAccounts", "notServiceAccounts"} & fields.keys()
    others = {"principals", "notPrincipals", "namespaces", "notNamespaces"} & fields.keys()
    if accounts and others:
        raise body.error("serviceAccounts cannot stand beside namespaces or principals")
    return tuple(tests)


def _not(name: str) -> str:
    return f"not{name[0].upper()}{name[1:]}"


def _condition(value: Value) -> Condition:
    fields = value.record(("key", "values", "notValues"))
    key = value.need(fields, "key")
    attribute, path = _key(key)
    values = _patterns(fields.get("values"), attribute)
    not_values = _patterns(fields.get("notValues"), attribute)
    if not values and not not_values:
        raise value.error("needs values or notValues")
    return Condition(attribute, values, not_values, path)


def _key(key: Value) -> tuple[Attribute, tuple[str, ...]]:
    text = key.text()
    if text in _KEYS:
        return _KEYS[text], ()
    head, bracket, rest = text.partition("[")
    if bracket and text.endswith("]") and len(rest) > 1:
        if head == Attribute.HEADERS:
            return Attribute.HEADERS, (rest[:-1].lower(),)
        if head == Attribute.CLAIMS:
            return Attribute.CLAIMS, _steps(rest[:-1])
        if head.startswith(f"{Attribute.ENVOY_FILTER}."):
            raise key.error("looks at Envoy's own metadata, which this proxy does not have")
    raise key.error(f"{text!r} is no attribute of a waypoint")


def _steps(text: str) -> tuple[str, ...]:
    """`a][b` of `[a][b]`; brackets that do not pair are part of one name, as in Istio."""
    steps = text.split("][")
    if any("[" in step or "]" in step for step in steps):
        return (text,)
    return tuple(steps)


def _patterns(values: Value | None, attribute: Attribute) -> tuple[Pattern, ...]:
    if values is None:
        return ()
    read = _READERS.get(attribute, _text)
    found = tuple(map(read, values.items()))
    if attribute is Attribute.SERVICE_ACCOUNT and len(found) > _MAX_ACCOUNTS:
        raise values.error(f"has more than {_MAX_ACCOUNTS} values")
    return found


def _text(value: Value) -> Pattern:
    return StringMatch.read(value.text())


def _host(value: Value) -> Pattern:
    return StringMatch.read(value.text().lower())


def _port(value: Value) -> Pattern:
    text = value.text()
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise value.error(f"{text!r} is not a port")
    return int(text)


def _path(value: Value) -> Pattern:
    try:
        return path_pattern(value.text())
    except ValueError as error:
        raise value.error(f"{value.raw!r} is not a path: {error}") from None


def _request_principal(value: Value) -> Pattern:
    return request_principal(value.text())


def _namespace(value: Value) -> Pattern:
    return Glob(value.text())


def _trust_domain(value: Value) -> Pattern:
    text = value.text()
    if "/" in text:
        raise value.error(f"{text!r}: a trust domain has no slash")
    if "*" in text.strip("*") or text.count("*") > 1:
        raise value.error(f"{text!r}: one wildcard, at the start or the end")
    return Glob(text)


def _account(value: Value) -> Pattern:
    text = value.text()
    namespace, slash, account = text.partition("/")
    if not slash:
        namespace, account = value.object.namespace, text
    if not namespace or not account or "/" in account or "*" in text:
        raise value.error(f"{text!r} is neither ACCOUNT nor NAMESPACE/ACCOUNT")
    if len(text) > _MAX_ACCOUNT_CHARS:
        raise value.error(f"is longer than {_MAX_ACCOUNT_CHARS} characters")
    return ServiceAccountMatch(namespace, account)


_READERS: Mapping[Attribute, Callable[[Value], Pattern]] = {
    Attribute.SOURCE_IP: Value.cidr,
    Attribute.REMOTE_IP: Value.cidr,
    Attribute.DESTINATION_IP: Value.cidr,
    Attribute.DESTINATION_PORT: _port,
    Attribute.NAMESPACE: _namespace,
    Attribute.TRUST_DOMAIN: _trust_domain,
    Attribute.SERVICE_ACCOUNT: _account,
    Attribute.REQUEST_PRINCIPAL: _request_principal,
    Attribute.HOST: _host,
    Attribute.PATH: _path,
}
