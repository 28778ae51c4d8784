"""Whose fault it is: the class, file and line of a policy that broke the rules or broke down."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING

from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.scheduler.base import Scheduler

_BASE = "engine.scheduler.base"


class PolicyError(TandemError):
    """A policy did what it may not. Raised with a predicate, such as `preempts request 3, which is not running`; the
    serving loop puts the policy's name, file and line before it."""


def blame(scheduler: Scheduler, error: Exception) -> PolicyError | None:
    """Say of an exception that ended a serving loop which policy is at fault.

    Returns:
        What to raise: the policy's name, its file, the innermost line of its own that was running (if none was, that of
        its class), and what it did. None if the policy has no part in the exception.
    """
    line, in_base = _policy_line(type(scheduler), error)
    if isinstance(error, PolicyError):
        return type(error)(accuse(scheduler, str(error), line))
    if line or in_base:
        return PolicyError(accuse(scheduler, f"raised {type(error).__name__}: {error}", line))
    return None


def accuse(scheduler: Scheduler, predicate: str, line: str | None = None) -> str:
    """A sentence on a policy that begins with its name, file and line; by default the line of its class."""
    policy = type(scheduler)
    return f"{policy.__name__} ({line or _class_line(policy)}) {predicate}"


def _class_line(policy: type[Scheduler]) -> str:
    try:
        return f"{inspect.getsourcefile(policy)}:{inspect.getsourcelines(policy)[1]}"
    except (OSError, TypeError):  # defined where there is no file, such as an interactive session
        return policy.__module__


def _policy_line(policy: type[Scheduler], error: Exception) -> tuple[str | None, bool]:
    """The innermost line of the policy's own modules in the traceback, and whether the base class is in it."""
    modules = {each.__module__ for each in policy.__mro__} - {_BASE, "abc", "builtins"}
    line, in_base = None, False
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__")
        in_base |= module == _BASE
        if module in modules:
            line = f"{frame.f_code.co_filename}:{number}"
    return line, in_base
