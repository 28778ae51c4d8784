"""From a policy's name to its scheduler: the policies that ship, and `module:Class` for one's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from engine.config import ServingConfig
from engine.scheduler.base import Scheduler
from engine.scheduler.blame import blame
from engine.scheduler.chunked_prefill import ChunkedPrefill
from engine.scheduler.fcfs import Fcfs
from engine.scheduler.prefill_first import PrefillFirst
from traces.errors import TandemError

POLICIES: dict[str, type[Scheduler]] = {
    "chunked_prefill": ChunkedPrefill,
    "fcfs": Fcfs,
    "prefill_first": PrefillFirst,
}


def load_scheduler(config: ServingConfig) -> Scheduler:
    """Build the scheduler that `config.scheduler` names.

    Raises:
        TandemError: no such policy, module or class, or the class is not a Scheduler.
        PolicyError: the class cannot be made.
    """
    name = config.scheduler
    policy = _import_policy(name) if ":" in name else POLICIES.get(name)
    if policy is None:
        known = ", ".join(sorted(POLICIES))
        raise TandemError(f"unknown scheduler '{name}': choose {known}, or give your own as module:Class")
    try:
        return policy(config)
    except TandemError:
        raise
    except Exception as error:
        if fault := blame(policy, error):
            raise fault from error
        raise


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
