"""AuthorizationPolicy evaluated straight from the object's spec, as its documentation reads.

Nothing of the product is used but the request itself: the compiled evaluator
must agree with this on whatever the property test makes up.
"""

from __future__ import annotations

import fnmatch
from ipaddress import ip_address, ip_network
from typing import Any

from meshbpf.agent.l7.exchange import Exchange

HTTP_FIELDS = {"hosts", "methods", "paths", "requestPrincipals"}
HTTP_KEYS = ("request.",)


def allowed(policies: list[dict[str, Any]], exchange: Exchange, *, tcp: bool) -> bool:
    def matches(action: str) -> bool:
        return any(
            rule_matches(rule, exchange, tcp=tcp, allow=action == "ALLOW")
            for policy in policies
            if policy.get("action", "ALLOW") == action
            for rule in policy.get("rules") or ()
        )

    if matches("DENY"):
        return False
    if not any(policy.get("action", "ALLOW") == "ALLOW" for policy in policies):
        return True
    return matches("ALLOW")


def rule_matches(rule: dict[str, Any], exchange: Exchange, *, tcp: bool, allow: bool) -> bool:
    if tcp and allow and reads_http(rule):
        return False
    sources = [one["source"] for one in rule.get("from", ())]
    operations = [one["operation"] for one in rule.get("to", ())]

    def held(fields: dict[str, Any]) -> bool:
        return all(
            field_holds(name, values, exchange)
            for name, values in fields.items()
            if not (tcp and positive(name) in HTTP_FIELDS)
        )

    return (
        (not sources or any(map(held, sources)))
        and (not operations or any(map(held, operations)))
        and all(
            condition_holds(one, exchange)
            for one in rule.get("when", ())
            if not (tcp and one["key"].startswith(HTTP_KEYS))
        )
    )


def reads_http(rule: dict[str, Any]) -> bool:
    fields = [one["source"] for one in rule.get("from", ())]
    fields += [one["operation"] for one in rule.get("to", ())]
    return any(positive(name) in HTTP_FIELDS for each in fields for name in each) or any(
        one["key"].startswith(HTTP_KEYS) for one in rule.get("when", ())
    )


def positive(name: str) -> str:
    return name[3].lower() + name[4:] if name.startswith("not") else name


def field_holds(name: str, values: list[str], exchange: Exchange) -> bool:
    found = any(value_matches(positive(name), value, exchange) for value in values)
    return found != name.startswith("not")


FIELD_OF_KEY = {
    "source.ip": "ipBlocks",
    "remote.ip": "remoteIpBlocks",
    "source.namespace": "namespaces",
    "source.serviceAccount": "serviceAccounts",
    "source.trustDomain": "trustDomains",
    "source.principal": "principals",
    "request.auth.principal": "requestPrincipals",
    "destination.port": "ports",
}


def condition_holds(one: dict[str, Any], exchange: Exchange) -> bool:
    key = FIELD_OF_KEY.get(one["key"], one["key"])
    values, not_values = one.get("values"), one.get("notValues")
    if values and not any(value_matches(key, value, exchange) for value in values):
        return False
    return not (not_values and any(value_matches(key, value, exchange) for value in not_values))


def value_matches(field: str, value: str, exchange: Exchange) -> bool:
    caller, request = exchange.caller, exchange.request
    who = caller.identity
    claims = exchange.attributes.get("jwt.claims", {})
    if field == "principals":
        return who is not None and text_matches(value, str(who).removeprefix("spiffe://"))
    if field == "namespaces":
        return who is not None and fnmatch.fnmatchcase(who.namespace, value)
    if field == "trustDomains":
        return who is not None and fnmatch.fnmatchcase(who.trust_domain, value)
    if field == "serviceAccounts":
        full = value if "/" in value else f"shop/{value}"
        return who is not None and f"{who.namespace}/{who.service_account}" == full
    if field == "ipBlocks":
        return caller.address.ip in ip_network(value, strict=False)
    if field == "remoteIpBlocks":
        forwarded = request.headers.get("x-forwarded-for")
        remote = ip_address(forwarded.split(",")[-1].strip()) if forwarded else caller.address.ip
        return remote in ip_network(value, strict=False)
    if field == "destination.ip":
        address = exchange.destination.address
        return address is not None and address.ip in ip_network(value, strict=False)
    if field == "ports":
        return exchange.destination.port == int(value)
    if field == "connection.sni":
        return False
    if field == "hosts":
        return text_matches(value.lower(), request.authority.lower())
    if field == "methods":
        return text_matches(value, request.method)
    if field == "paths":
        path = request.path.split("?")[0]
        return template_matches(value, path) if "{" in value else text_matches(value, path)
    if field == "requestPrincipals":
        # The property test uses only values without the corner cases of
        # Istio's split; those have a table of their own.
        issuer, subject = claims.get("iss"), claims.get("sub")
        if issuer is None or subject is None:
            return False
        return value == "*" or value == f"{issuer}/{subject}"
    if field == "request.auth.audiences":
        return claim_matches(value, claims.get("aud"))
    if field == "request.auth.presenter":
        return claim_matches(value, claims.get("azp"))
    if field.startswith("request.auth.claims["):
        found: Any = claims
        for step in field[len("request.auth.claims[") : -1].split("]["):
            found = found.get(step) if isinstance(found, dict) else None
        return claim_matches(value, found)
    if field.startswith("request.headers["):
        header = request.headers.get(field[len("request.headers[") : -1].lower())
        return header is not None and (value == "*" or text_matches(value, header))
    raise AssertionError(field)


def claim_matches(value: str, found: Any) -> bool:
    if isinstance(found, str):
        return text_matches(value, found)
    return isinstance(found, list) and any(
        isinstance(one, str) and text_matches(value, one) for one in found
    )


def text_matches(value: str, text: str) -> bool:
    if value == "*":
        return text != ""
    if value.startswith("*"):
        return text.endswith(value[1:])
    if value.endswith("*"):
        return text.startswith(value[:-1])
    return text == value


def template_matches(template: str, path: str) -> bool:
    """Segment by segment; `{**}` takes what is left."""
    want, have = template.split("/"), path.split("/")
    for index, step in enumerate(want):
        if step == "{**}":
            return len(have) > index
        if index >= len(have):
            return False
        if step == "{*}":
            if have[index] == "":
                return False
        elif step != have[index]:
            return False
    return len(want) == len(have)
