"""From a policy's name to its scheduler: the policies that ship, and `module:Class` for one's own.

One's own is given as a file too, `path/to/file.py:Class`. Parameters follow the name: `vtc:output_weight=4`,
`my_module:MyPolicy:quantum=8:ratio=4`. They are keyword arguments of the class, and what they mean and default to is
written there. As a part of the name they are in the manifest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.config import ServingConfig
from engine.planner import PolicyError
from engine.scheduler.base import Scheduler
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from engine.scheduler.policies.edf import EarliestDeadlineFirst
from engine.scheduler.policies.fastserve import SkipJoinMlfq
from engine.scheduler.policies.fcfs import Fcfs
from engine.scheduler.policies.prefill_first import PrefillFirst
from engine.scheduler.policies.priority import StrictPriority
from engine.scheduler.policies.sarathi import Sarathi
from engine.scheduler.policies.sjf import ShortestJobFirst
from engine.scheduler.policies.srpt import ShortestRemainingFirst
from engine.scheduler.policies.swiftllm import SwiftLlm
from engine.scheduler.policies.vllm import Vllm, VllmPriority
from engine.scheduler.policies.vtc import VirtualTokenCounter
from engine.scheduler.policy_error import blame, called
from engine.scheduler.user_policy import NO_SUPER, check_policy, import_policy, source_digests, uses_unmade
from traces.errors import TandemError

POLICIES: dict[str, type[Scheduler]] = {
    "chunked_prefill": ChunkedPrefill,
    "edf": EarliestDeadlineFirst,
    "fastserve": SkipJoinMlfq,
    "fcfs": Fcfs,
    "prefill_first": PrefillFirst,
    "priority": StrictPriority,
    "sarathi": Sarathi,
    "sjf": ShortestJobFirst,
    "srpt": ShortestRemainingFirst,
    "swiftllm": SwiftLlm,
    "vllm": Vllm,
    "vllm_priority": VllmPriority,
    "vtc": VirtualTokenCounter,
}

PARAMETER_TYPES = (int, float, str, bool)


def load_scheduler(config: ServingConfig) -> Scheduler:
    """Build the scheduler that `config.scheduler` names, with its parameters.

    Raises:
        TandemError: as `find_policy`, or the policy refuses a value or the config.
        PolicyError: the class cannot be made, or what it makes could not serve.
    """
    policy, values = find_policy(config.scheduler)
    source_digests(policy)  # now: a run tells what was imported, not what the files are by its end
    try:
        inspect.signature(policy).bind(config, **values)
    except TypeError as error:
        raise PolicyError(f"{called(policy)} cannot be made from the config alone: {error}") from None
    try:
        scheduler = policy(config, **values)
        if policy not in POLICIES.values():
            check_policy(scheduler)
    except Exception as error:
        told = PolicyError(NO_SUPER).with_traceback(error.__traceback__) if uses_unmade(error) else error
        if type(told) is not TandemError and (fault := blame(policy, told)):
            raise fault from error
        if isinstance(error, TandemError):
            raise TandemError(f"scheduler '{config.scheduler}': {error}") from None
        raise
    return scheduler


def check_scheduler(config: ServingConfig) -> None:
    """Check a policy's name, parameters and `__init__` on the smallest pools of KV blocks.

    Raises:
        TandemError: as `load_scheduler`.
    """
    small = replace(config, num_blocks=1, num_cpu_blocks=min(config.num_cpu_blocks, 1))
    try:
        load_scheduler(small)
    except TandemError:
        load_scheduler(config)  # the policy may refuse nothing but the few blocks


def find_policy(scheduler: str) -> tuple[type[Scheduler], dict[str, Any]]:
    """The class of a policy by its name, and all its parameters, as given there or by default.

    Raises:
        TandemError: no such policy, module, file, class or parameter, a value that a parameter cannot take, or the
            class is not a Scheduler, or lacks a method.
    """
    name, *rest = scheduler.split(":")
    own = is_own(scheduler) and rest and "=" not in rest[0]
    if not own and name not in POLICIES:
        raise TandemError(_unknown(name))
    try:
        policy = import_policy(name, rest.pop(0)) if own else POLICIES[name]
        return policy, parameters(policy) | _given(policy, rest)
    except PolicyError:
        raise
    except TandemError as error:
        raise TandemError(f"scheduler '{scheduler}': {error}") from error.__cause__


def is_own(scheduler: str) -> bool:
    """Whether a policy, by its name, is none of those that ship."""
    return scheduler.partition(":")[0] not in POLICIES


def _unknown(name: str) -> str:
    file = name if name.endswith(".py") else f"{name}.py"
    near = get_close_matches(name.lower(), POLICIES, 1)
    hint = f"did you mean {near[0]}? Else " if near else ""
    hint = f"for {file}, say {name}:Class; else " if Path(file).is_file() else hint
    known = ", ".join(sorted(POLICIES))
    return f"unknown scheduler '{name}': {hint}choose {known}, or give your own as module:Class or file.py:Class"


# -- parameters ------------------------------------------------------------------------------------------------


def parameters(policy: type[Scheduler]) -> dict[str, Any]:
    """A policy's parameters, and their defaults: what its `__init__` takes beside the config."""
    known: dict[str, Any] = {}
    for each in policy.__mro__:
        if "__init__" in vars(each):
            own = list(inspect.signature(vars(each)["__init__"]).parameters.values())[2:]
            named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            known = {one.name: one.default for one in own if one.kind in named} | known
            if all(one.kind is not one.VAR_KEYWORD for one in own):  # else it hands on what it does not know
                break
    return known


def _given(policy: type[Scheduler], texts: Sequence[str]) -> dict[str, Any]:
    """The parameters that were given, each of its default's type."""
    defaults, given = parameters(policy), dict[str, Any]()
    for key, default in defaults.items():
        if default is inspect.Parameter.empty:
            raise PolicyError(f"{called(policy)} has a parameter {key} without a default: give it one, such as {key}=1")
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise TandemError(f"cannot read '{text}': give a parameter as {key}=VALUE")
        if key in given:
            raise TandemError(f"{key} is given twice")
        if key not in defaults:
            known = ", ".join(f"{each}={default}" for each, default in defaults.items()) or "none"
            raise TandemError(f"it has no parameter '{key}': it has {known}")
        given[key] = _value(key, value, type(defaults[key]))
    return given


def _value(key: str, text: str, kind: type) -> Any:
    """A parameter's value, of its default's type."""
    if kind not in PARAMETER_TYPES:
        raise TandemError(f"{key} cannot be given in words: its default is of type {kind.__name__}")
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise TandemError(f"{key} is '{text}', not of type {kind.__name__}") from None
