"""Whose fault it is: the class, file and line of a policy that broke the rules or broke down."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING

from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.scheduler.base import Scheduler


class PolicyError(TandemError):
    """A policy did what it may not. Raised with a predicate, such as `preempts request 3, which is not running`; the
    serving loop puts the policy's name, file and line before it."""


def blame(policy: type[Scheduler], error: Exception) -> PolicyError | None:
    """Say of an exception that ended a serving loop, or kept one from starting, that a policy is at fault.

    Returns:
        What to raise: the policy's name, its file, the innermost line of its own that was running (if none was, that of
        its class), and what it did. None if the policy has no part in the exception.
    """
    line, involved = _policy_line(policy, error)
    name = called(policy, line)
    if isinstance(error, PolicyError):
        return type(error)(f"{name} {error}")
    return PolicyError(f"{name} raised {type(error).__name__}: {error}{_hint(error)}") if involved else None


def called(policy: type[Scheduler], line: str | None = None) -> str:
    """A policy's name, with file and line: of its class, if nothing nearer is known."""
    return f"{policy.__name__} ({line or _class_line(policy)})"


def idle_plan(scheduler: Scheduler) -> str:
    """What a scheduler does wrong that plans nothing although nothing else can happen: what it could have run.

    The verbs are tried, so that it must not go on afterwards.
    """
    stuck, running = len(scheduler.waiting) + len(scheduler.running), len(scheduler.running)
    said = f"plans nothing, but {stuck} requests wait and nothing is in flight"
    if decodes := len(scheduler.decoding):
        return f"{said}: decode() was not called, and {decodes} requests could decode"
    candidates = (*scheduler.prefilling.values(), *scheduler.waiting.values())
    if fit := sum(scheduler.prefill(each) for each in candidates):
        return f"{said}: prefill(request) was not called for {fit} of them that fit"
    free, limits = scheduler.pool.free, scheduler.config
    room = f"{free} of {limits.num_blocks} KV blocks are free, {running} of max_seqs {limits.max_seqs} run"
    return f"{said}: after what it has preempted, none fits ({room})"


def _hint(error: Exception) -> str:
    if isinstance(error, RuntimeError) and "during iteration" in str(error):
        return "; the verbs change the queues: go through self.queue(), or through tuple(...) of one"
    return ""


def _class_line(policy: type[Scheduler]) -> str:
    try:
        return f"{inspect.getsourcefile(policy)}:{inspect.getsourcelines(policy)[1]}"
    except (OSError, TypeError):  # defined where there is no file, such as an interactive session
        return policy.__module__


def _policy_line(policy: type[Scheduler], error: Exception) -> tuple[str | None, bool]:
    """The innermost line of the policy's own module in the traceback, and whether any code of the policy is in it."""
    inherited = {each.__module__ for each in policy.__mro__} - {"abc", "builtins"}
    line, involved = None, False
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__")
        involved |= module in inherited
        if module == policy.__module__:
            line = f"{frame.f_code.co_filename}:{number}"
    return line, involved
