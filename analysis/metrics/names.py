"""What metrics are called: keys, labels, definitions and units. No other place names a metric."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How people know a metric.

    Attributes:
        label: its name in tables and figures.
        definition: how it is computed.
        unit: of its values; latencies are in milliseconds.
    """

    label: str
    definition: str
    unit: str = ""

    @property
    def heading(self) -> str:
        """Of a column without another unit: the unit if there is one, else the label."""
        return self.unit or self.label


REQUEST_LATENCIES = {
    "ttft": Metric("TTFT", "time to first token: from arrival to the first output token"),
    "tpot": Metric("TPOT", "time per output token: (E2E - TTFT) / (output tokens - 1), of requests with 2 or more"),
    "e2el": Metric("E2E", "end-to-end latency: from arrival to the last output token"),
    "per_token": Metric("E2E / token", "E2E / (prompt tokens + output tokens), as swiftLLM plots it"),
    "normalized_latency": Metric("normalized latency", "E2E / output tokens (Orca, OSDI '22; vLLM, SOSP '23)"),
    "queue": Metric("queue time", "from arrival to the first step that runs the request"),
}
"""Latencies with one value per completed request, in milliseconds."""

LATENCIES = REQUEST_LATENCIES | {
    "itl": Metric("ITL", "inter-token latency: every gap between two tokens, pooled over requests")
}
"""All latencies: `metrics` gives `mean_ttft_ms`, ..., one key for each latency and each of `STATISTICS`."""

JUDGED_LATENCIES = ("ttft", "tpot", "e2el")
"""Those whose errors have targets."""
COMPARED_LATENCIES = ("ttft", "tpot", "itl", "e2el")
"""Those that comparisons show."""

PERCENTILES = (50, 90, 99)
STATISTICS = ("mean", "std", "median", "p50", "p90", "p99")
"""Percentiles interpolate linearly; p99 is None below `P99_REQUESTS` requests."""
COMPARED_STATISTICS = ("mean", "p50", "p90", "p99")
"""Those that comparisons show."""
P99_REQUESTS = 200  # below this many requests, P99 is the luck of one or two of them

TOTALS = {
    "completed": Metric("completed", "requests that ended by length or stop token"),
    "rejected": Metric(
        "rejected", "requests that could never run under the limits, or have tokens that the model lacks"
    ),
    "cancelled": Metric("cancelled", "requests whose client gave up"),
    "unfinished": Metric("unfinished", "requests that were still in the system when the records end"),
    "total_input_tokens": Metric("input tokens", "prompt tokens of completed requests"),
    "total_output_tokens": Metric("output tokens", "output tokens of completed requests"),
    "wasted_tokens": Metric("wasted tokens", "tokens made after a stop token, before the scheduler knew of it"),
    "preemptions": Metric("preemptions", "times a request lost its KV blocks"),
    "own_slo_attainment": Metric(
        "SLOs met",
        "of the requests that bring SLOs along, the fraction that met them; a rejected one did not, a cancelled one is "
        "left out",
    ),
    "cached_tokens": Metric("cached tokens", "prompt tokens found in the prefix cache"),
    "prefix_cache_hit_rate": Metric(
        "prefix cache hit rate", "of the tokens that had to be prefilled, the share found in the prefix cache"
    ),
    "duration_s": Metric("duration", "from the first arrival to the last token of a completed request", "seconds"),
    "request_throughput": Metric("request throughput", "completed requests per second", "requests/s"),
    "output_throughput": Metric("output throughput", "output tokens per second", "tokens/s"),
    "total_token_throughput": Metric("total throughput", "prompt and output tokens per second", "tokens/s"),
    "steps_prefill": Metric("prefill steps", "steps that ran prefill only"),
    "steps_decode": Metric("decode steps", "steps that ran decodes only"),
    "steps_mixed": Metric("mixed steps", "steps that ran both"),
    "mean_batch": Metric("mean batch", "sequences in a step, mean"),
    "median_schedule_us": Metric(
        "scheduling", "the policy's own cost: from the clock read to the finished plan, median", "us"
    ),
    "median_launch_us": Metric("launch", "the host's work to launch a planned step, median", "us"),
}
"""The other keys of `metrics`; what cannot be computed (a mean of nothing) is None."""

GOODPUT = {
    "request_goodput": Metric("goodput", "requests per second that met every SLO", "requests/s"),
    "slo_attainment": Metric(
        "SLO attainment",
        "fraction of requests that met every SLO (DistServe); a rejected one did not, a cancelled one is left out",
    ),
}
"""The keys that `metrics` adds when it is given SLOs."""


def latency_key(statistic: str, latency: str) -> str:
    """Of a statistic of a latency among `metrics`: `mean_ttft_ms`."""
    return f"{statistic}_{latency}_ms"


def latency_label(statistic: str, latency: str) -> str:
    """For people: `mean TTFT`."""
    return f"{statistic} {LATENCIES[latency].label}"


RANKED_METRICS = {
    **{latency_key(stat, name): latency_label(stat, name) for name in JUDGED_LATENCIES for stat in COMPARED_STATISTICS},
    latency_key("mean", "normalized_latency"): LATENCIES["normalized_latency"].label,
    "output_throughput": TOTALS["output_throughput"].label,
}
"""Metrics that policies are ordered by -> their labels."""
