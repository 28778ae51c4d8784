"""What a user says of a run, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.records.manifest import STOP_RULES
from traces.errors import TandemError


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user said of a run's limits and policy; None is 'not said'. Fields are as in `ServingConfig`.

    Attributes:
        allow_long_context: whether requests beyond the model's positions are allowed.
    """

    scheduler: str | None = None
    pipeline_depth: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    num_cpu_blocks: int | None = None
    prefix_caching: bool | None = None
    admit: str | None = None
    release: str | None = None
    prefix_rules: str | None = None
    max_seqs: int | None = None
    max_batched_tokens: int | None = None
    max_model_len: int | None = None
    allow_long_context: bool = False

    def said(self) -> dict[str, Any]:
        """The limits that were given, as a `ServingConfig` has them."""
        names = [name for name in self.__slots__ if name != "allow_long_context"]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Loading:
    """Which model to load, how, and onto what; as the arguments of `engine.executor.executor.Executor`."""

    model: str = "smollm2"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    load_format: str = "auto"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a trace is served, beside limits and policy.

    Attributes:
        stop_rule: of a real run, as in `engine.records.manifest.compose`.
        check: whether `engine.checks.step_checker` looks at every step, and all of them are planned again elsewhere.
        strict: of a simulated run, whether nothing may be extrapolated beyond the profile.
        overwrite: whether a run in the same folder is replaced.
        facts: further provenance for the manifest.

    Raises:
        TandemError: there is no such stop rule.
    """

    stop_rule: str = "trace"
    check: bool = False
    strict: bool = False
    overwrite: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stop_rule not in STOP_RULES:
            raise TandemError(f"--stops is '{self.stop_rule}': choose {' or '.join(STOP_RULES)}")


AS_USUAL = RunOptions()
