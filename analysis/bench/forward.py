"""Times single steps: batches that are handed in at once, prefilled, then decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from analysis.bench.common import BenchBatch, Benchmark, Row, decode_steps, serve_batch, warmed_up
from analysis.jobs.limits import Settled, real_limits
from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress
from analysis.metrics.columns import NS_PER_MS, column, completed_requests
from analysis.report.tables import TextTable, amount
from engine.config import ServingConfig
from engine.model.config import ModelConfig
from engine.records.run_folder import RunRecords
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.executor.executor import Executor

TIMES = ("prefill_ms", "prefill_tokens_per_s", "decode_ms", "decode_tokens_per_s")
STEP_TIMES = ("p50_host_us", "p50_device_us")
COLUMNS = ("batch x input", "prefill ms", "tok/s", "decode ms", "tok/s", "host µs", "device µs")


@dataclass(frozen=True, slots=True)
class Forward:
    """Times of a prefill and of a decode step, with the spans of vLLM's offline benchmark.

    Attributes:
        batches: one for each row.
        outputs: decode steps that are timed.
        repeats: of each measurement.
        said: limits, but for those that the batches imply.
    """

    batches: Sequence[BenchBatch]
    outputs: int
    repeats: int
    said: Limits

    @property
    def limits(self) -> Limits:
        """Limits under which every batch runs as one."""
        return replace(self.said, **self._implied(self.batches))

    def _implied(self, batches: Sequence[BenchBatch]) -> dict[str, Any]:
        longest = max(batch.input_len for batch in batches) + self.outputs + 1
        return {"max_seqs": max(batch.size for batch in batches), "max_model_len": longest}

    def check(self) -> None:
        """Raises TandemError if there is no row."""
        if not self.batches:
            raise TandemError("nothing to time: give --rows 1x128, for example")

    def on(self, executor: Executor, progress: Progress, **facts: Any) -> Benchmark:
        """The benchmark of a loaded model. Raises TandemError if memory holds no batch."""
        how = (
            "prefill: from handing in a batch to its last first token, host included; "
            f"decode: ({self.outputs + 1} output tokens' time - 1 output token's) / {self.outputs}, "
            f"medians of {self.repeats}; host: from the clock read to the launched step; device: work on the step; "
            "both of steps that decode the whole batch, medians"
        )
        settled = self._settled(executor)
        facts |= warmed_up(executor, settled, progress)
        return Benchmark("forward", how, facts, self._measure(executor, settled.config, progress), _tables)

    def _settled(self, executor: Executor) -> Settled:
        """As many KV blocks as memory holds, and limits for the batches that fit into them."""
        settled = self._room(executor)
        held = [batch for batch in self.batches if self._misfit(batch, executor.model, settled.config) is None]
        return replace(settled, config=replace(settled.config, **self._implied(held or self.batches)))

    def _room(self, executor: Executor) -> Settled:
        """The limits of the longest batch of whose requests memory holds one, at least."""
        for input_len in sorted({batch.input_len for batch in self.batches}, reverse=True):
            try:
                return real_limits(executor, replace(self.limits, max_model_len=input_len + self.outputs + 1))
            except TandemError as error:
                refusal = error
        raise refusal

    def _misfit(self, batch: BenchBatch, model: ModelConfig, config: ServingConfig) -> str | None:
        """Why a batch is not measured."""
        longest, positions = batch.input_len + self.outputs + 1, model.max_position_embeddings
        if longest > positions and not self.said.allow_long_context:
            return f"{longest:,} tokens are beyond the model's {positions:,} positions: add --allow-long-context"
        needed = batch.size * -(-(batch.input_len + self.outputs) // config.block_size)  # the last token is in no block
        if needed > config.num_blocks:
            held = "memory holds" if self.said.num_blocks is None else "--kv-blocks gives"
            return f"needs {needed:,} KV blocks, more than {held}"
        return None

    def _measure(self, executor: Executor, config: ServingConfig, progress: Progress) -> Iterator[Row]:
        """Yields a row after each of its repeats; one that memory does not hold says so in `not_measured`."""
        with progress.bar("bench forward", len(self.batches) * self.repeats) as show:
            for number, batch in enumerate(self.batches):
                for repeat, row in enumerate(self._row(batch, executor, config), start=1):
                    yield row
                    show(number * self.repeats + repeat)
                show((number + 1) * self.repeats)

    def _row(self, batch: BenchBatch, executor: Executor, config: ServingConfig) -> Iterator[Row]:
        row: Row = {"row": str(batch), "batch": batch.size, "input_len": batch.input_len} | dict.fromkeys(TIMES)
        row |= {"decode_steps": decode_steps([], 0), "prefill_walls_ms": [], "decode_walls_ms": []}
        try:
            for measured in self._repeats(batch, executor, config):
                yield row | measured | {"not_measured": None}
        except TandemError as error:
            yield row | {"not_measured": str(error).splitlines()[0]}

    def _repeats(self, batch: BenchBatch, executor: Executor, config: ServingConfig) -> Iterator[Row]:
        """Raises TandemError if memory does not hold the batch."""
        if misfit := self._misfit(batch, executor.model, config):
            raise TandemError(misfit)
        first_ms, last_ms, steps = [], [], []
        for _ in range(self.repeats):
            first_ms.append(_wall_ms(serve_batch(executor, batch, 1, config)))
            run = serve_batch(executor, batch, 1 + self.outputs, config)
            last_ms.append(_wall_ms(run))
            steps.append(run.tables["steps"])
            prefill_ms = median(first_ms)
            decode_ms = (median(last_ms) - prefill_ms) / self.outputs
            yield {
                "prefill_ms": prefill_ms,
                "decode_ms": decode_ms,
                "prefill_tokens_per_s": 1e3 * batch.size * batch.input_len / prefill_ms,
                "decode_tokens_per_s": 1e3 * batch.size / decode_ms if decode_ms > 0 else None,
                "decode_steps": decode_steps(steps, batch.size),
                "prefill_walls_ms": [*first_ms],
                "decode_walls_ms": [*last_ms],
            }


def _wall_ms(run: RunRecords) -> float:
    """From the run's start to its last token. Raises TandemError if a request was not served."""
    requests, done = run.tables["requests"], completed_requests(run)
    if len(done) < len(requests):
        reason = next(filter(None, requests["reason"].to_pylist()), "they did not end")
        raise TandemError(f"{len(requests) - len(done)} of {len(requests)} requests were not served: {reason}")
    return float(column(done, "last_token_ns").max()) / NS_PER_MS


def _tables(rows: Sequence[Row]) -> Iterator[TextTable]:
    """One table, and a line for each row that could not be measured."""
    cells = []
    for row in rows:
        values = [*(row[name] for name in TIMES), *(row["decode_steps"][name] for name in STEP_TIMES)]
        cells.append((row["row"], *map(amount, values)))
    note = [f"{row['row']}: not measured: {row['not_measured']}" for row in rows if row["not_measured"]]
    yield TextTable("One forward", "\n".join(note), COLUMNS, cells)
