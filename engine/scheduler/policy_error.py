"""Whose fault it is: the class, file and line of a policy that broke the rules or broke down."""

from __future__ import annotations

import inspect
import traceback

from engine.planner import Planner, PolicyError


def blame(policy: type[Planner], error: Exception) -> PolicyError | None:
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


def called(policy: type[Planner], line: str | None = None) -> str:
    """A policy's name, with file and line: of its class, if nothing nearer is known."""
    return f"{policy.__name__} ({line or _class_line(policy)})"


def _hint(error: Exception) -> str:
    if isinstance(error, RuntimeError) and "during iteration" in str(error):
        return "; the verbs change the queues: go through self.queue(), or through tuple(...) of one"
    return ""


def _class_line(policy: type[Planner]) -> str:
    try:
        return f"{inspect.getsourcefile(policy)}:{inspect.getsourcelines(policy)[1]}"
    except (OSError, TypeError):  # defined where there is no file, such as an interactive session
        return policy.__module__


def _policy_line(policy: type[Planner], error: Exception) -> tuple[str | None, bool]:
    """The innermost line of the policy's own module in the traceback, and whether any code of the policy is in it."""
    inherited = {each.__module__ for each in policy.__mro__} - {"abc", "builtins"}
    running = [(frame.f_globals.get("__name__"), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [f"{frame.f_code.co_filename}:{line}" for module, frame, line in running if module == policy.__module__]
    return own[-1] if own else None, any(module in inherited for module, _, _ in running)
