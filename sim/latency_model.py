"""How long a step takes: the sum of the terms of a profile.

Pure Python: a prediction costs microseconds of host time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.step import Step
from sim.coverage import Coverage, Note
from sim.profile.format import IN_SERVICE, Profile
from sim.terms import STEP_TERMS, CapturedGraphs, DecodeAttention, Decodes, Power, PrefillAttention, Swap

IMBALANCE = "imbalance"  # what context imbalance adds
PARTS = (*(term.part for term in STEP_TERMS), "prefill_attention", "decode_attention", IMBALANCE, "power")
"""The parts of a step's time: layers by tokens, the head by samples, padding to a captured size, attention of prefill
chunks, attention of decodes were their contexts all alike, context imbalance, and the power limit."""


class _ByCounts(NamedTuple):
    """The terms that depend on a step's counts alone, their sum, and what full load adds to the step."""

    parts_us: Sequence[float]
    sum_us: float
    full_load_us: float


@dataclass(slots=True)
class _DecodeSteps:
    """All that follows from the number of decodes in a step, before their contexts are known.

    Attributes:
        steps: how many steps did nothing else.
        coverage: what each of these looked up.
    """

    by_counts: _ByCounts
    coverage: Coverage
    attention: Decodes
    steps: int = field(default=0)


class LatencyModel:
    """Sums a step's terms. What follows from the number of decodes alone is looked up once for each number.

    Of a device at its power limit it follows the power state: ask for steps in their order, with when they start.
    """

    def __init__(self, profile: Profile, ignore: Collection[str] = ()) -> None:
        """`ignore` names `PARTS` that are to count for nothing, to see what they are worth."""
        self._ignored = [place for place, part in enumerate(PARTS) if part in ignore]
        self._captured = CapturedGraphs(profile)
        self._step_terms = [term(profile) for term in STEP_TERMS]
        self._prefill_attention = PrefillAttention(profile)
        self._decode_attention = DecodeAttention(profile)
        self._power = Power(profile, profile.meta.power) if profile.meta.power else None
        self._swap = Swap(profile)
        self._by_decodes: dict[int, _DecodeSteps] = {}
        self._tables = profile.tables
        self._coverage = Coverage()  # but for the look-ups of `_DecodeSteps`, and attention that is covered
        self._note = self._coverage.note
        self._device_us = 0.0  # of all steps and copies

    def device_ns(self, step: Step, start_ns: int | None = None) -> int:
        """Time that the data plane works on a step: its compute, or its copies if it has nothing else.

        Args:
            start_ns: when it begins; right after the step before if None.
        """
        return self.predict(step, start_ns)[0]

    def predict(self, step: Step, start_ns: int | None = None) -> tuple[int, Sequence[float]]:
        """As `device_ns`, and the microseconds by `PARTS` that it is made of: none, of copies."""
        tokens, chunks = step.decodes, step.chunks
        prefill_us = decode_us = imbalance_us = power_us = 0.0
        decode_steps = (self._by_decodes.get(tokens) or self._decode_steps(tokens)) if tokens else None
        if chunks:
            tokens += step.prefill_tokens
            samples = step.decodes + sum([chunk.samples for chunk in chunks.values()])
            by_counts = self._by_counts(tokens, len(chunks), samples, self._note)
            prefill_us = self._prefill_attention.us(chunks.values(), self._note)
        elif decode_steps:
            by_counts = decode_steps.by_counts
            decode_steps.steps += 1
        else:
            return self.copies_ns(step), ()
        if decode_steps:
            decode_us, imbalance_us = self._decode_attention.us(decode_steps.attention, step, self._note)
        time_us = by_counts.sum_us + prefill_us + decode_us + imbalance_us
        if self._power:
            power_us = self._power.us(by_counts.full_load_us, tokens, prefill_us, time_us, start_ns)
            time_us += power_us
        parts_us = (*by_counts.parts_us, prefill_us, decode_us, imbalance_us, power_us)
        for place in self._ignored:
            time_us -= parts_us[place]
        self._device_us += time_us
        return round(1000 * time_us), parts_us

    def parts_us(self, step: Step) -> dict[str, float]:
        """Microseconds by `PARTS`, all of which add up to the step's compute."""
        return dict(zip(PARTS, self.predict(step)[1], strict=True))

    def copies_ns(self, step: Step) -> int:
        """Time of a step's copies between the tiers. Raises TandemError if the profile has none."""
        out_us = self._swap.us("out", step.swapped_out, self._note)
        in_us = self._swap.us("in", step.swapped_in, self._note)
        self._device_us += out_us
        self._device_us += in_us
        return round(1000 * (out_us + in_us))

    def rest(self) -> None:
        """The device does nothing for so long that its power state is that of a device at rest."""
        if self._power:
            self._power.rest()

    def coverage(self) -> dict[str, Any]:
        """How far predictions rest on what was measured.

        Returns:
            - `lookups`: how often tables were asked
            - `beyond`: {table: {count, lookups, device_time, axes}} of those that were asked outside what was measured:
              how many look-ups lay there, which share of the table's, which share of all device time these gave
              (extrapolated), and {axis: {asked: [least, most] of these, measured: [least, most]}}
        """
        coverage = Coverage()
        coverage.add(self._coverage)
        for of_number in self._by_decodes.values():
            coverage.add(of_number.coverage, of_number.steps)
        for term in (self._prefill_attention, self._decode_attention):
            coverage.asked[term.table] += term.covered
        graph = self._tables.get(IN_SERVICE, self._tables.get("graph", []))
        return coverage.report(self._tables | {"graph": graph}, self._device_us)

    def _decode_steps(self, decodes: int) -> _DecodeSteps:
        coverage = Coverage()
        by_counts = self._by_counts(decodes, 0, decodes, coverage.note)
        found = self._by_decodes[decodes] = _DecodeSteps(by_counts, coverage, self._decode_attention.of(decodes))
        return found

    def _by_counts(self, tokens: int, prefills: int, samples: int, note: Note) -> _ByCounts:
        counts = self._captured.counts(tokens, prefills, samples)
        parts_us, sum_us = [], 0.0
        for term in self._step_terms:
            part_us = term.us(counts, note)
            parts_us.append(part_us)
            sum_us += part_us
        return _ByCounts(parts_us, sum_us, self._power.at_full_load_us(counts) if self._power else 0.0)
