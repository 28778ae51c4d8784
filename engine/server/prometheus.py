"""Prometheus metrics under vLLM's names, so that dashboards made for it show Tandem too.

Times are taken in the API's process. The buckets of gaps between tokens begin at 1 ms: vLLM's begin at 10, where an 8B
model on an H100 has long made its token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.server.messages import Load

GAP_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.0125, 0.015, 0.0175, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
REQUEST_BUCKETS_S = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0),
)
LENGTH_BUCKETS = tuple(float(2**power) for power in range(18))


class Histogram:
    """Counts by bucket. Prometheus' own histogram is too slow for every token."""

    __slots__ = ("bounds", "counts", "per_unit", "total")

    def __init__(self, bounds: Sequence[float], per_unit: float = 1e9) -> None:
        """`per_unit`: units of the added values in a unit of the bounds; nanoseconds in a second, unless given."""
        self.bounds = [bound * per_unit for bound in bounds]
        self.counts = [0] * (len(bounds) + 1)
        self.per_unit = per_unit
        self.total = 0

    def add(self, value: int, times: int = 1) -> None:
        """Count a value that came so often."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += times * value

    def sums(self) -> tuple[list[tuple[str, int]], float]:
        """Cumulative counts by upper bound, as Prometheus wants them, and the sum of all values."""
        names = [str(bound / self.per_unit) for bound in self.bounds] + ["+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True)), self.total / self.per_unit

    def in_ms(self) -> dict[str, list[float]]:
        """The bounds of a histogram of nanoseconds in milliseconds, and the count of each bucket."""
        return {"bounds_ms": [1e-6 * bound for bound in self.bounds], "counts": [*self.counts]}


class ServerMetrics(Collector):
    """The counts of a server.

    Attributes:
        load: the engine's, in its last message.
        gaps: between two tokens of a request, in nanoseconds.
        first_tokens: from arrival to the first token, in nanoseconds.
        prompt_tokens, generation_tokens: of requests that have ended.
        outcomes: of those, by how they ended.
    """

    def __init__(self, model: str, kv_blocks: int) -> None:
        self.gaps = Histogram(GAP_BUCKETS_S)
        self.first_tokens = Histogram(FIRST_TOKEN_BUCKETS_S)
        self.requests = Histogram(REQUEST_BUCKETS_S)
        self.prompt_lengths = Histogram(LENGTH_BUCKETS, 1)
        self.output_lengths = Histogram(LENGTH_BUCKETS, 1)
        self.prompt_tokens = 0
        self.outcomes: Counter[str] = Counter()
        self.load = Load()
        self._model = model
        self._kv_blocks = kv_blocks

    @property
    def generated(self) -> int:
        """Tokens handed to clients so far: every one ended a gap or was a first."""
        return sum(self.gaps.counts) + sum(self.first_tokens.counts)

    def ended(self, outcome: str, prompt_len: int, tokens: int, took_ns: int) -> None:
        """A request ended, `took_ns` after its arrival."""
        self.outcomes[outcome if outcome in ("length", "stop") else "abort"] += 1
        self.prompt_tokens += prompt_len
        self.prompt_lengths.add(prompt_len)
        self.output_lengths.add(tokens)
        self.requests.add(took_ns)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        gauge, counter, histogram, load = GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily, self.load
        kv_usage = load.kv_blocks_used / self._kv_blocks
        rows: tuple[tuple[Any, ...], ...] = (
            (gauge, "num_requests_running", "Requests that hold KV blocks.", load.running),
            (gauge, "num_requests_waiting", "Requests that wait for them.", load.waiting),
            (gauge, "kv_cache_usage_perc", "KV blocks in use; 1 is all.", kv_usage),
            (gauge, "iteration_prefill_tokens", "Prefill tokens of the last step (Tandem's).", load.prefill_tokens),
            (gauge, "iteration_decode_tokens", "Decode tokens of the last step (Tandem's).", load.decode_tokens),
            (counter, "prompt_tokens", "Prompt tokens of requests that have ended.", self.prompt_tokens),
            (counter, "generation_tokens", "Tokens handed to clients.", self.generated),
            (counter, "num_preemptions", "Times a request lost its KV blocks.", load.preemptions),
            (histogram, "time_to_first_token_seconds", "From arrival to the first token.", *self.first_tokens.sums()),
            (histogram, "inter_token_latency_seconds", "Between two tokens of a request.", *self.gaps.sums()),
            (histogram, "e2e_request_latency_seconds", "From arrival to the end.", *self.requests.sums()),
            (histogram, "request_prompt_tokens", "Prompt lengths.", *self.prompt_lengths.sums()),
            (histogram, "request_generation_tokens", "Output lengths.", *self.output_lengths.sums()),
        )
        for kind, name, text, *values in rows:
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], *values)
            yield family
        labels = ["model_name", "finished_reason"]
        ended = CounterMetricFamily("vllm:request_success", "Requests that ended, by how.", labels=labels)
        for outcome in ("length", "stop", "abort"):
            ended.add_metric([self._model, outcome], self.outcomes[outcome])
        yield ended
