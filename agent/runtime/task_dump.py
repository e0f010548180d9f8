"""Every task of the agent and the line where it waits, as text.

The tree is trio's: a task's nurseries, their tasks, and so on. Under each
task stand its await points, outermost first, without the frames of trio.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import trio

MAX_TASKS = 20_000


def dump() -> str:
    """The tree from the root task down; call it from the event loop."""
    root = trio.lowlevel.current_root_task()
    if root is None:
        return "no task runs\n"
    lines: list[str] = []
    # A stack of our own: a deep tree must not end in a RecursionError.
    waiting: list[tuple[trio.lowlevel.Task, int]] = [(root, 0)]
    count = 0
    while waiting:
        task, depth = waiting.pop()
        count += 1
        if count > MAX_TASKS:
            lines.append(f"... and more than {len(waiting)} others")
            break
        indent = "  " * depth
        lines.append(f"{indent}{task.name}")
        lines += (f"{indent}  at {where}" for where in _awaits(task))
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        children.sort(key=lambda child: child.name, reverse=True)
        waiting.extend((child, depth + 1) for child in children)
    return f"{count} tasks\n" + "\n".join(lines) + "\n"


def _awaits(task: trio.lowlevel.Task) -> Iterator[str]:
    awaited: object = task.coro
    while awaited is not None:
        if isinstance(awaited, types.CoroutineType):
            frame, awaited = awaited.cr_frame, awaited.cr_await
        elif isinstance(awaited, types.GeneratorType):
            frame, awaited = awaited.gi_frame, awaited.gi_yieldfrom
        else:
            return
        if frame is not None and not str(frame.f_globals.get("__name__", "")).startswith("trio"):
            file = frame.f_code.co_filename.rpartition("/")[2]
            yield f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
