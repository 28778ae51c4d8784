"""From a policy's name to its scheduler: the policies that ship, and `module:Class` for one's own.

Parameters follow the name: `vtc:output_weight=4`, `my_module:MyPolicy:quantum=8:ratio=4`. They are keyword arguments
of the class, and what they mean and default to is written there. As a part of the name they are in the manifest.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from engine.config import ServingConfig
from engine.scheduler.base import Scheduler
from engine.scheduler.blame import blame
from engine.scheduler.chunked_prefill import ChunkedPrefill
from engine.scheduler.edf import EarliestDeadlineFirst
from engine.scheduler.fastserve import SkipJoinMlfq
from engine.scheduler.fcfs import Fcfs
from engine.scheduler.prefill_first import PrefillFirst
from engine.scheduler.priority import StrictPriority
from engine.scheduler.sarathi import Sarathi
from engine.scheduler.sjf import ShortestJobFirst
from engine.scheduler.srpt import ShortestRemainingFirst
from engine.scheduler.swiftllm import SwiftLlm
from engine.scheduler.vllm import Vllm, VllmPriority
from engine.scheduler.vtc import VirtualTokenCounter
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


def load_scheduler(config: ServingConfig) -> Scheduler:
    """Build the scheduler that `config.scheduler` names, with its parameters.

    Raises:
        TandemError: no such policy, module, class or parameter, a value that a parameter cannot take, or the class is
            not a Scheduler.
        PolicyError: the class cannot be made.
    """
    parts = config.scheduler.split(":")
    named = [part for part in parts if "=" not in part]
    given = dict(part.split("=", 1) for part in parts if "=" in part)
    name = ":".join(named)
    policy = _import_policy(name) if len(named) > 1 else POLICIES.get(name)
    if policy is None:
        known = ", ".join(sorted(POLICIES))
        raise TandemError(f"unknown scheduler '{name}': choose {known}, or give your own as module:Class")
    values = {key: _value(policy, name, key, text) for key, text in given.items()}
    try:
        return policy(config, **values)
    except TandemError as error:
        raise TandemError(f"scheduler '{config.scheduler}': {error}") from None
    except Exception as error:
        if fault := blame(policy, error):
            raise fault from error
        raise


def parameters(policy: type[Scheduler]) -> dict[str, Any]:
    """A policy's parameters, and their defaults."""
    known = inspect.signature(policy).parameters.values()
    return {each.name: each.default for each in known if each.kind is each.KEYWORD_ONLY}


def _value(policy: type[Scheduler], name: str, key: str, text: str) -> Any:
    """A parameter's value, of its default's type."""
    defaults = parameters(policy)
    if key not in defaults:
        known = ", ".join(f"{each}={default}" for each, default in defaults.items()) or "none"
        raise TandemError(f"scheduler '{name}' has no parameter '{key}': it has {known}")
    kind = type(defaults[key])
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise TandemError(f"scheduler '{name}': {key} is '{text}', not of type {kind.__name__}") from None


def _import_policy(name: str) -> type[Scheduler]:
    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed `tandem` does not look where the user stands
        sys.path.insert(0, here)
    try:
        policy = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise TandemError(f"scheduler '{name}': cannot import {module_name} ({error}); run from its folder") from error
    if not (isinstance(policy, type) and issubclass(policy, Scheduler)):
        raise TandemError(f"scheduler '{name}': {module_name} has no Scheduler subclass called '{class_name}'")
    return policy
