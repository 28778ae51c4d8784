"""The manifest of a run. `workload` and `system` must match for two runs to be compared; `provenance` is for people."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from engine.config import ServingConfig
from engine.model.config import ModelConfig
from engine.scheduler.registry import PARAMETER_TYPES, find_policy
from engine.scheduler.user_policy import source_digests
from traces.errors import TandemError
from traces.trace import Trace

Manifest = dict[str, Any]
STOP_RULES = ("trace", "model")


def compose(
    *,
    device: str,
    config: ServingConfig | None = None,
    trace: Trace | None = None,
    model: ModelConfig | str = "",
    dtype: str | None = None,
    stop_rule: str = "trace",
    **facts: Any,
) -> Manifest:
    """The manifest of a run: `workload`, `system`, `provenance`. A None is unknown, and left out.

    Args:
        device: the machine, or a server's address.
        config: limits and policy.
        trace: the workload. Without one, the manifest has no `workload`.
        model: its shape, or its name alone.
        dtype: of weights and cache.
        stop_rule: `trace`: a request stops at its trace's output_len; `model`: where the model says so.
        facts: of `provenance`, beside versions, machine and date.
    """
    workload = {"workload": _workload(trace, model, dtype, stop_rule)} if trace else {}
    return workload | {"system": system(device, config), "provenance": _provenance() | facts}


def _workload(trace: Trace, model: ModelConfig | str, dtype: str | None, stop_rule: str) -> dict[str, Any]:
    shape = None if isinstance(model, str) else {key: of for key, of in model.to_dict().items() if key != "name"}
    known = {
        "trace": trace.digest,
        "requests": len(trace.requests),
        "model": model if isinstance(model, str) else model.name,
        "model_shape": shape,
        "dtype": dtype,
        "stop_rule": stop_rule,
    }
    return {name: value for name, value in known.items() if value is not None}


def system(device: str, config: ServingConfig | None) -> dict[str, Any]:
    """The second part of a manifest. Of the policy it has all parameters and a digest of each source file."""
    if config is None:
        return {"device": device}
    policy, values = find_policy(config.scheduler)
    plain = {name: value for name, value in values.items() if isinstance(value, PARAMETER_TYPES)}
    of_policy = {"scheduler_parameters": plain, "scheduler_source": source_digests(policy)}
    return {"device": device} | asdict(config) | of_policy


def changed_sources(manifest: Manifest) -> list[str]:
    """The source files of a recorded run's policy that have changed since, as far as the manifest tells.

    Raises:
        TandemError: the policy cannot be found.
    """
    then = manifest["system"].get("scheduler_source")
    if then is None:
        return []
    now = source_digests(find_policy(manifest["system"]["scheduler"])[0])
    return sorted(file for file in then.keys() | now.keys() if then.get(file) != now.get(file))


def config_of(manifest: Manifest) -> ServingConfig:
    """The limits and policy of a recorded run. Raises TandemError if the manifest lacks one."""
    try:
        return ServingConfig(**{each.name: manifest["system"][each.name] for each in fields(ServingConfig)})
    except KeyError as error:  # of one that was not read from a file
        raise TandemError(f"manifest.json: no {error} in system; it was written by another version") from error


def _provenance() -> dict[str, Any]:
    """Versions, machine and date."""
    versions = {name: _version(name) for name in ("tandem-llm", "numpy", "simpy", "torch", "transformers")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = __file__.rpartition("/")[0]
    git = ("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
