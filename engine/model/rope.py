"""Rotary embeddings: the scaling of their frequencies, and how configs spell it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.model.fields import Fields

MOST_THETA, MOST_FACTOR = 1e15, 1e6
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_LLAMA3 = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The stretching of rotary frequencies, for a longer context.

    `linear` divides every frequency by `factor` (Chen et al. 2023, position interpolation). `llama3` divides only the
    low ones, with a smooth passage between `low_freq_factor` and `high_freq_factor` (The Llama 3 Herd of Models, 2024).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def divisor(self, inv_freq: float) -> float:
        """The divisor of one frequency (radians per token)."""
        if self.kind == "linear":
            return self.factor
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        return 1.0 / (smooth + (1.0 - smooth) / self.factor)


def read_rope(fields: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and their scaling.

    Where a config has both `rope_scaling` (transformers 4) and `rope_parameters` (5), transformers 5 takes the first
    alone. It takes `rope_theta` from beside them if the object has none.

    Args:
        positions: of the model; where `llama3` has no original length, transformers takes these.

    Raises:
        TandemError: a field makes no sense, or says something that is not supported.
    """
    scaling, parameters = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    rope = scaling if scaling.values else parameters
    source = rope if rope.get("rope_theta") is not None else fields
    theta = source.number("rope_theta", MOST_THETA, default=10000.0)
    for holder in (fields, rope):
        if holder.get("partial_rotary_factor") not in (None, 1):
            raise holder.refusal("partial_rotary_factor", "Tandem rotates whole heads")
    kind = _kind(rope)
    known = _KNOWN | _LLAMA3 if kind == "llama3" else _KNOWN
    for name in rope.values:
        if name not in known and rope.get(name) is not None:
            raise rope.refusal(name, f"RoPE scaling {kind!r} has no such parameter")
    return theta, _scaling(kind, fields, rope, positions)


def _kind(rope: Fields) -> str:
    named = [name for name in (rope.text("rope_type"), rope.text("type")) if name is not None]
    if len(set(named)) > 1:
        raise rope.refusal("type", f"rope_type beside it is {named[0]!r}; remove the wrong one")
    kind = named[0] if named else "default"
    if kind not in ("default", "none", "linear", "llama3"):
        raise rope.refusal(
            "type" if rope.get("rope_type") is None else "rope_type", "Tandem scales by none, linear and llama3"
        )
    if kind == "default" and rope.get("factor") not in (None, 1):
        raise rope.refusal("factor", "of which scaling? add a rope_type")
    return kind


def _scaling(kind: str, fields: Fields, rope: Fields, positions: int) -> RopeScaling | None:
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor", MOST_FACTOR))
    if kind != "llama3":
        return None
    low, high = (rope.number(f"{name}_freq_factor", MOST_FACTOR) for name in ("low", "high"))
    if low >= high:
        raise rope.fault("high_freq_factor", f"must be above low_freq_factor, {low:g}", high)
    # transformers prefers the length beside the object, as it stands there in Phi-3's config
    source = fields if fields.get("original_max_position_embeddings") is not None else rope
    original = source.count("original_max_position_embeddings", default=positions)
    return RopeScaling("llama3", rope.number("factor", MOST_FACTOR), low, high, original)
