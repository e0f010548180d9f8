"""The last step of a request: which rule, which backend, or which answer at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

from meshbpf.agent.l7.cors import is_preflight, mark, preflight
from meshbpf.agent.l7.edit import edit_headers, redirect, rewrite
from meshbpf.agent.l7.exchange import Exchange, Flag
from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.match import PathKind, RequestView
from meshbpf.agent.l7.plan import Routes
from meshbpf.agent.l7.rules import (
    NO_FILTERS,
    Backend,
    Entry,
    Filters,
    HttpRule,
    Mirror,
    Shares,
)

NOT_FOUND = Reply(404, detail="route_not_found")
NO_BACKEND = Reply(500, detail="no_backend")


@dataclass(frozen=True, slots=True)
class Forward:
    """Send the request to `backend`, as `rule` says; heads have been edited already."""

    rule: HttpRule
    backend: Backend
    mirrors: tuple[Mirror, ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rule for a request, before its backend is drawn."""

    rule: HttpRule
    prefix: str
    """What of the path its match has covered; without a slash at its end."""
    entry: Entry | None = None


def default_rule(exchange: Exchange) -> HttpRule | None:
    """For a service without routes: itself, at the port that was dialed."""
    service = exchange.destination.service
    if service is None:
        return None
    return HttpRule("default", Shares((Backend(service.key, exchange.destination.port),)))


def choose(routes: Routes, exchange: Exchange) -> Chosen | None:
    """Which rule a request falls under; None: none, although there are routes."""
    if routes.http is None:
        rule = default_rule(exchange)
        return None if rule is None else Chosen(rule, "")
    entry = routes.http.find(RequestView(exchange.request))
    if entry is None:
        return None
    path = entry.match.path
    return Chosen(entry.rule, path.value if path.kind is PathKind.PREFIX else "", entry)


def decide(chosen: Chosen | None, exchange: Exchange, rng: random.Random) -> Forward | Reply:
    """Draw the backend and edit the request's head, or answer.

    The extensions of the rule have let it pass by now.
    """
    if chosen is None:
        exchange.flags.append(Flag.NO_ROUTE)
        return NOT_FOUND
    rule, prefix = chosen.rule, chosen.prefix
    exchange.route = rule.name
    filters, head = rule.filters, exchange.request
    if filters.cors is not None and is_preflight(head):
        return preflight(filters.cors, head)
    if filters.redirect is not None:
        if filters.request is not None:
            edit_headers(head.headers, filters.request)
        return redirect(head, filters.redirect, prefix, exchange.destination.port)
    backend = rule.backends.draw(rng)
    if backend is None or backend.invalid:
        exchange.flags.append(Flag.NO_ROUTE)
        return NO_BACKEND
    mirrors: tuple[Mirror, ...] = ()
    if filters is not NO_FILTERS:
        mirrors = _edit(filters, exchange, prefix)
    if backend.filters is not NO_FILTERS:
        mirrors += _edit(backend.filters, exchange, prefix)
    if mirrors:
        mirrors = tuple(
            each
            for each in mirrors
            if not each.backend.invalid and rng.random() * each.denominator < each.numerator
        )
    return Forward(rule, backend, mirrors)


def _edit(filters: Filters, exchange: Exchange, prefix: str) -> tuple[Mirror, ...]:
    if filters.request is not None:
        edit_headers(exchange.request.headers, filters.request)
    if filters.rewrite is not None:
        rewrite(exchange.request, filters.rewrite, prefix)
    return filters.mirrors


def finish(rule: HttpRule, backend: Backend | None, exchange: Exchange, origin: str | None) -> None:
    """Edit the response's head as rule and backend say. `origin`: of the request as it came."""
    response = exchange.response
    if response is None:
        return
    filters = rule.filters
    if backend is not None and backend.filters.response is not None:
        edit_headers(response.headers, backend.filters.response)
    if filters.response is not None:
        edit_headers(response.headers, filters.response)
    if filters.cors is not None and origin is not None:
        mark(filters.cors, origin, response.headers)
