"""The boundary between one connection's task and the rest of the agent."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from meshbpf.agent.core.errors import MeshbpfError

log = logging.getLogger(__name__)


async def guarded(function: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run a task whose failure concerns nobody else.

    Without this, one connection's unforeseen error would cancel every other
    connection of its pod through the nursery that they share.
    """
    try:
        await function(*args)
    except MeshbpfError as error:
        log.info("connection ended: %s", error.what)
    except OSError as error:
        log.info("connection ended: %s", error)
    except Exception as error:  # task boundary: a bug costs one connection, and is seen
        log.exception("connection failed: %s", error)
