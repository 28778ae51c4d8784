"""The terms of a step's time.

A term reads its tables of a profile, predicts its time in microseconds, takes note of each look-up and whether it was
measured there, and lists the points that a profiler measures for it. `StepTerm`s depend on a step's counts alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import ClassVar, NamedTuple, Protocol

from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.step import Chunk, Copies, Step, StepLoad
from sim.coverage import Note
from sim.power_state import PowerState
from sim.profile.curves import Curve, Surface
from sim.profile.format import HOST_TERMS, HOST_TERMS_BY_KIND, IN_SERVICE, Profile, Row
from sim.profile.meta import PowerCalibration
from traces.errors import TandemError

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BEYOND_GRAPHS = (4096, 8192, 16384, 32768, 65536)  # tokens of steps too large to be captured
CONTEXTS_BY_4 = (0, 64, 256, 1024, 4096, 16384, 65536)
CONTEXTS_BY_2 = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
BESIDE_CHUNKS = "mixed_decode_attention"  # the table of decodes whose kernel attends to chunks too
IMBALANCES = (1.2, 1.8)  # serving ShareGPT brings the context imbalance to about 2
IMBALANCED_SEQUENCES = (4, 8, 12, *range(16, 64, 8), *range(64, 256, 16), 256, 384, 512, 768, 1024)
IMBALANCED_CONTEXTS = (32, 128, 256, 512, 1024, 2048, 4096)  # their means


class Counts(NamedTuple):
    """A step's counts, and the captured step that holds it.

    Attributes:
        rows: of the captured step; 0 if none holds the step, which is then launched kernel by kernel.
        padded_us: time of the captured step without attention, and
        unpadded_us: what it would be without padding.
        slowed_us: what full load adds.
        covered: whether the captured step was measured.
    """

    tokens: int
    samples: int
    rows: int = 0
    padded_us: float = 0.0
    unpadded_us: float = 0.0
    slowed_us: float = 0.0
    covered: bool = False


class StepTerm(Protocol):
    """A term that depends on a step's counts alone; the class is called with the profile."""

    part: ClassVar[str]

    def us(self, counts: Counts, note: Note) -> float:
        """Its time."""


class CapturedGraphs:
    """Whole captured steps without attention, as they were measured or, where known, as they are in service."""

    def __init__(self, profile: Profile) -> None:
        in_service = profile.tables.get(IN_SERVICE, ())
        self._times = curves(in_service or profile.tables.get("graph", ()), "kind", "rows")
        self._slowed = curves(in_service, "kind", "rows", "slowed_us")
        self._sizes = profile.meta.graphs if self._times else None

    def counts(self, tokens: int, prefills: int, samples: int) -> Counts:
        """Of a step with so many tokens, requests with a chunk, and samples. A captured step samples all it can."""
        rows = self._sizes.rows(tokens, prefills) if self._sizes else None
        if self._sizes is None or rows is None:
            return Counts(tokens, samples)
        kind = "mixed" if prefills else "decode"
        curve, slowed_us = self._times[kind], self._slowed[kind](rows) if self._slowed else 0.0
        samples = min(rows, self._sizes.max_seqs)
        return Counts(tokens, samples, rows, curve(rows), curve(tokens), slowed_us, curve.covers(rows))

    @staticmethod
    def points(sizes: GraphSizes) -> list[tuple[str, int]]:
        """Kind and rows."""
        return [("decode", rows) for rows in sizes.decode] + [("mixed", rows) for rows in sizes.mixed]


class Dense:
    """Everything whose cost depends on the number of tokens alone: of a captured step, all but head and padding."""

    part = "dense"

    def __init__(self, profile: Profile) -> None:
        operations = curves(profile.tables["dense"], "op", "tokens").values()
        tokens = {each for curve in operations for each in curve.xs}
        self.curve = Curve({each: sum(curve(each) for curve in operations) for each in tokens})
        self._head = Head(profile).curve

    def us(self, counts: Counts, note: Note) -> float:
        """As in `StepTerm`."""
        if not counts.rows:
            return look_up("dense", self.curve, counts.tokens, note)
        head_us = self._head(counts.samples)
        note("graph", counts.covered, counts.padded_us - head_us, counts.rows)
        return counts.unpadded_us - head_us

    @staticmethod
    def points(sizes: GraphSizes, limits: ServingConfig) -> list[int]:
        """Tokens."""
        beyond = [tokens for tokens in BEYOND_GRAPHS if tokens <= limits.max_batched_tokens]
        return sorted({*sizes.decode, *sizes.mixed, *beyond})


class Head:
    """Final norm, language-model head and sampling."""

    part = "head"

    def __init__(self, profile: Profile) -> None:
        self.curve = Curve({row["samples"]: row["time_us"] for row in profile.tables["head"]})

    def us(self, counts: Counts, note: Note) -> float:
        """As in `StepTerm`."""
        return look_up("head", self.curve, counts.samples, note) if counts.samples else 0.0

    @staticmethod
    def points(sizes: GraphSizes) -> Sequence[int]:
        """Samples."""
        return sizes.decode


class Padding:
    """The rows that a captured step has beyond those of the step that it holds."""

    part = "padding"

    def __init__(self, profile: Profile) -> None:
        """Reads nothing: captured steps are measured whole."""

    def us(self, counts: Counts, note: Note) -> float:
        """As in `StepTerm`."""
        return counts.padded_us - counts.unpadded_us


STEP_TERMS: tuple[type[Dense] | type[Head] | type[Padding], ...] = (Dense, Head, Padding)


class PrefillAttention:
    """Attention of prefill chunks. Those of a captured step attend at once: the longest leaves room for the others.

    Attributes:
        covered: look-ups where it was measured; others are noted.
    """

    table = "prefill_attention"

    def __init__(self, profile: Profile) -> None:
        rows = profile.tables["prefill_attention"]
        self._surface = Surface({(row["chunk"], row["context"]): row["time_us"] for row in rows})
        captured = "graph" in profile.tables or IN_SERVICE in profile.tables
        self._pair_us = _least_pair_us(rows) if captured else None
        self.covered = 0

    def us(self, chunks: Collection[Chunk], note: Note) -> float:
        """Time of all chunks together."""
        times = [self._surface(tokens, start) for start, tokens, _ in chunks]
        longest = max(range(len(times)), key=times.__getitem__)
        for place, (start, tokens, _) in enumerate(chunks):
            if self._surface.covers(tokens, start):
                self.covered += 1
            else:
                counts = self._pair_us is None or place == longest  # else its time is by pairs
                note(self.table, False, times[place] if counts else 0.0, tokens, start)
        if self._pair_us is None:
            return sum(times)
        pairs = [_pairs(tokens, start) for start, tokens, _ in chunks]
        return times[longest] + self._pair_us * (sum(pairs) - pairs[longest])

    @staticmethod
    def points(limits: ServingConfig) -> Iterator[tuple[int, int]]:
        """Tokens of a chunk, and its context."""
        most = min(limits.max_batched_tokens, limits.max_model_len)
        # Chunks below 16 tokens are rare, and their attention is close to linear.
        chunks = sorted({*(each for each in up_to(most) if each in (1, 4) or each >= 16), most})
        return ((chunk, x) for chunk, x in product(chunks, CONTEXTS_BY_4) if chunk + x <= limits.max_model_len)


class Decodes(NamedTuple):
    """Attention of so many decodes by mean context: a curve for each measured imbalance, and the ranges measured."""

    sequences: int
    by_imbalance: list[Curve]
    measured: list[tuple[float, float]]


class DecodeAttention:
    """Attention of decodes: were their contexts all alike, and what context imbalance adds.

    Attributes:
        covered: look-ups where it was measured; others are noted.
    """

    table = "decode_attention"

    def __init__(self, profile: Profile) -> None:
        rows = profile.tables[self.table]
        self._imbalances: list[float] = sorted({row["imbalance"] for row in rows})
        self._surfaces = [
            _decodes([row for row in rows if row["imbalance"] == imbalance]) for imbalance in self._imbalances
        ]
        beside_chunks = profile.tables.get(BESIDE_CHUNKS)
        self._beside_chunks = _decodes(beside_chunks) if beside_chunks else None
        self.covered = 0

    def of(self, sequences: int) -> Decodes:
        """All that follows from the number of sequences; costs more than `us`."""
        return Decodes(
            sequences, [surface.at(sequences) for surface in self._surfaces], self._surfaces[0].measured(sequences)
        )

    def us(self, decodes: Decodes, step: Step, note: Note) -> tuple[float, float]:
        """Time with contexts all alike, and what their imbalance adds."""
        (sequences, by_imbalance, measured), load = decodes, step.load
        context = load.kv_tokens / sequences + 1  # a decode attends to its own token too
        alike = noted_us = by_imbalance[0](context)
        added = 0.0
        if len(by_imbalance) > 1:
            added = self._added(sequences, load, context, by_imbalance, alike)
            noted_us += added
        if self._beside_chunks and step.chunks and alike:
            beside = self._beside_chunks(sequences, context)
            added = added * beside / alike  # imbalance is taken to cost its share there too
            alike, noted_us = beside, added
            note(BESIDE_CHUNKS, self._beside_chunks.covers(sequences, context), beside, sequences, context)
        for low, high in measured:
            if low <= context <= high:
                self.covered += 1
                break
        else:
            note(self.table, False, noted_us, sequences, context)
        return alike, added

    def _added(
        self, sequences: int, load: StepLoad, context: float, by_imbalance: Sequence[Curve], alike: float
    ) -> float:
        known, squares = self._imbalances, load.kv_squares + 2 * load.kv_tokens + sequences
        imbalance = min(squares / sequences / context**2, known[-1])
        right = bisect_right(known, imbalance, 1, len(known) - 1)
        low, high = known[right - 1], known[right]
        below = by_imbalance[right - 1](context) if right > 1 else alike
        above = by_imbalance[right](context)
        return max(0.0, below + (imbalance - low) * (above - below) / (high - low)) - alike

    @staticmethod
    def points(limits: ServingConfig) -> Iterator[tuple[int, int, float]]:
        """Sequences, mean context and context imbalance; not all of them fit every number of KV blocks."""
        longest = limits.max_model_len - 1
        contexts = sorted({*(each for each in CONTEXTS_BY_2 if each < longest), longest})
        yield from product(up_to(limits.max_seqs), contexts, (1.0,))
        counts = [count for count in IMBALANCED_SEQUENCES if count < limits.max_seqs]
        counts += [limits.max_seqs] if limits.max_seqs >= 4 else []
        yield from product(counts, IMBALANCED_CONTEXTS, IMBALANCES)


class Power:
    """What the power limit adds to a step, by what the device has computed of late.

    It follows the device: ask for steps in their order.
    """

    def __init__(self, profile: Profile, calibration: PowerCalibration) -> None:
        self._state = PowerState(calibration.memory_us)
        self._limit, self._row_us = calibration.limit, calibration.row_us
        self._profile = profile
        largest = max(profile.tables[IN_SERVICE], key=lambda row: row["rows"])
        # Steps larger than captured are taken to slow down as the largest of those.
        self._most_slowed: float = largest["slowed_us"] / largest["time_us"]
        self._end_ns = 0  # of the last step

    @cached_property
    def _operations(self) -> Curve:
        """Of steps that are launched kernel by kernel."""
        return Dense(self._profile).curve

    def at_full_load_us(self, counts: Counts) -> float:
        """What full load adds to a step."""
        return counts.slowed_us if counts.rows else self._most_slowed * self._operations(counts.tokens)

    def us(self, full_load_us: float, rows: int, attention_us: float, time_us: float, start_ns: int | None) -> float:
        """What the power state adds to a step that takes `time_us` after a rest; the step then belongs to the state.

        Args:
            full_load_us: what full load adds.
            rows: tokens of the step.
            attention_us: of its chunks.
            start_ns: when it begins; right after the step before if None.
        """
        begin_ns = max(self._end_ns, start_ns or 0)
        if begin_ns > self._end_ns:
            self._state.rested((begin_ns - self._end_ns) / 1000)
        extra_us = full_load_us * max(0.0, self._state.share - self._limit)
        self._state.worked(time_us + extra_us, self._row_us * rows + attention_us)
        self._end_ns = begin_ns + round(1000 * (time_us + extra_us))
        return extra_us

    def rest(self) -> None:
        """The device does nothing for so long that its state is that of a device at rest."""
        self._state.share = 0.0


class Swap:
    """Copies of KV blocks between the tiers, by direction."""

    def __init__(self, profile: Profile) -> None:
        self._curves = curves(profile.tables.get("swap", ()), "direction", "blocks")

    def us(self, direction: str, swaps: Mapping[int, Copies], note: Note) -> float:
        """Time of all copies in a direction, `out` or `in`. Raises TandemError if the profile has none."""
        if not swaps:
            return 0.0
        if direction not in self._curves:
            raise TandemError(
                "the profile has no table swap, and the run swaps: "
                "measure the profile with --cpu-blocks, or simulate with --cpu-blocks 0"
            )
        blocks = sum(len(copies.source) for copies in swaps.values())
        return look_up("swap", self._curves[direction], blocks, note)


class Host:
    """The host's times around a step, by kind of step and sequences; outside the measured, those of the nearest."""

    def __init__(self, profile: Profile) -> None:
        self._curves = {
            (term, kind): _host_curve(profile.tables["host"], term, kind)
            for term in HOST_TERMS
            for kind in ("decode", "prefill")
        }

    def us(self, term: str, chunks: int, running: int) -> float:
        """One of `HOST_TERMS`, of a step with so many chunks among so many requests that run."""
        curve = self._curves[term, "prefill" if chunks else "decode"]
        sequences = chunks if chunks and term in HOST_TERMS_BY_KIND else running
        return curve(min(max(sequences, curve.xs[0]), curve.xs[-1]))


def look_up(table: str, curve: Curve, x: float, note: Note) -> float:
    """Time at `x`, of which note is taken."""
    time_us = curve(x)
    note(table, curve.covers(x), time_us, x)
    return time_us


def up_to(most: int) -> list[int]:
    """Numbers to measure between 1 and `most`, both included."""
    return [count for count in TOKENS if count < most] + [most]


def curves(rows: Collection[Row], name: str, axis: str, values: str = "time_us") -> dict[str, Curve]:
    """A table with one named column and one axis: a curve for each name."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        points.setdefault(row[name], {})[row[axis]] = row[values]
    return {each: Curve(of_name) for each, of_name in points.items()}


def _host_curve(rows: Sequence[Row], term: str, kind: str) -> Curve:
    of_term = [row for row in rows if row["term"] == term]
    own = [row for row in of_term if row["kind"] == kind] or [row for row in of_term if row["kind"] == "any"]
    return Curve({row["sequences"]: row["time_us"] for row in own or of_term})


def _decodes(rows: Collection[Row]) -> Surface:
    """Over sequences and their mean context, so that between numbers of sequences their lengths are kept."""
    return Surface({(row["sequences"], row["kv_tokens"] / row["sequences"]): row["time_us"] for row in rows})


def _pairs(chunk: float, context: float) -> float:
    """Pairs of a query and a key that a chunk attends to."""
    return chunk * (context + (chunk + 1) / 2)


def _least_pair_us(rows: Collection[Row]) -> float:
    """Time of a pair where the device computes at its best."""
    least_us: float = min(row["time_us"] / _pairs(row["chunk"], row["context"]) for row in rows)
    return least_us
