"""swiftLLM's online experiment in simulation, drawn over the published curves (docs/swiftllm.md).

    python docs/examples/swiftllm.py FOLDER [--seconds S] [--seeds N]

FOLDER gets swiftllm.png. The program prints the error of each point, and the effect of other assumptions. It needs
matplotlib, which Tandem does not install.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice, product
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.progress import track

from analysis.metrics.columns import column, completed_requests
from analysis.metrics.summary import request_metrics
from analysis.report.figures import COLOURS
from analysis.report.tables import TextTable, print_tables, signed
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.memory_model import DTYPE_BYTES, Memory
from sim.profile.format import KEYS, Profile, find_profile, read_profile
from sim.simulate import predict
from traces.arrivals import assign_arrivals
from traces.trace import Trace, read_trace

DATA = Path(__file__).parents[1] / "data"
PROFILES = {"A100": "a100-80gb/llama-3-8b", "RTX 4090": "rtx4090/llama-3-8b"}
METRICS = {"per_token": "per token", "per_input_token": "per input token", "per_output_token": "per output token"}
MEMORY_FRACTION = 0.97  # swiftLLM's default, like all the limits here
LEGIBLE_MS = 2  # the plots are read to 0.4 or 0.8 ms, too coarse for smaller values
Points = Mapping[float, Mapping[str, float | None]]  # milliseconds, by requests a second and by metric
Runs = dict[float, list[dict[str, float]]]  # milliseconds, by requests a second, by seed and by metric


@dataclass(frozen=True, slots=True)
class Experiment:
    """The assumptions about the published experiment.

    Attributes:
        lengths: a trace that ships.
        seconds: of arrivals.
        step_tokens: token budget of a step.
        graphs: whether memory is used as by Tandem's executor. Otherwise it is used as by swiftLLM.
        host_us: time of the host after every step. The profile has none.
        times: a factor on the times of a table, by table of the profile. The default is 1.
    """

    lengths: str = "sharegpt-turns"
    seconds: float = 1000
    step_tokens: int = 32768
    graphs: bool = False
    host_us: float = 0
    times: Mapping[str, float] = field(default_factory=dict)

    def profile(self, gpu: str) -> Profile:
        """The GPU's profile that ships, with the changes of this experiment."""
        profile = read_profile(find_profile(Path(PROFILES[gpu])))
        tables = {
            table: [row | {"time_us": row["time_us"] * self.times.get(table, 1)} for row in rows]
            for table, rows in profile.tables.items()
        }
        tables["host"] = [row | {"time_us": self.host_us} if row["term"] == "turn" else row for row in tables["host"]]
        return replace(profile, tables=tables)

    def config(self, profile: Profile) -> ServingConfig:
        """The default limits of swiftLLM's server."""
        limits = ServingConfig(
            num_blocks=1,
            block_size=16,
            max_seqs=512,
            max_batched_tokens=self.step_tokens,
            max_model_len=8192,
            scheduler="swiftllm",
            num_cpu_blocks=2048,
        )
        memory = Memory.of(profile.meta.data_sheet.memory_gib, profile.model, profile.meta.dtype, limits)
        blocks = memory.blocks if self.graphs else swiftllm_blocks(profile, memory, self.step_tokens)
        return replace(limits, num_blocks=blocks)

    def trace(self, rate: float, seed: int) -> Trace:
        """The requests that arrive. If there are too few, they repeat from the first, as in LoongServe's client."""
        trace = read_trace(self.lengths)
        chosen = islice(cycle(trace.requests), round(rate * self.seconds))
        requests = [replace(request, id=number) for number, request in enumerate(chosen)]
        return assign_arrivals(replace(trace, requests=requests), "poisson", rate=rate, seed=seed)

    def serve(self, gpu: str, rate: float, seed: int = 0) -> dict[str, float]:
        """Mean latencies of the simulated run, in milliseconds, by metric."""
        profile, recorder = self.profile(gpu), Recorder()
        predict(self.trace(rate, seed).requests, self.config(profile), profile, recorder)
        run = RunRecords({}, recorder.tables())
        latencies, prompt_len = request_metrics(run), column(completed_requests(run), "prompt_len")
        return {
            "per_token": float(latencies["per_token"].mean()),
            "per_input_token": float((latencies["ttft"] / prompt_len).mean()),
            "per_output_token": float(np.nanmean(latencies["tpot"])),
        }


def swiftllm_blocks(profile: Profile, memory: Memory, step_tokens: int) -> int:
    """KV blocks as swiftLLM counts them, without graphs, beside context, weights and its largest forward.

    The largest forward needs five hidden states (input, residual, q, attended values, attention's output).
    It also needs k, v, up and gate.
    """
    model = profile.model
    widths = 5 * model.hidden_size + 2 * model.num_kv_heads * model.head_dim + 2 * model.intermediate_size
    touched = step_tokens * widths * DTYPE_BYTES[profile.meta.dtype]
    usable = int(MEMORY_FRACTION * profile.meta.data_sheet.memory_gib * 2**30)
    return (usable - memory.context - memory.weights - touched) // memory.block


SAME = Experiment()
OTHERWISE = {
    "as in the figure": SAME,
    "first turn as prompt": replace(SAME, lengths="sharegpt-lengths"),
    "300 s of arrivals": replace(SAME, seconds=300),
    "3,072 tokens a step": replace(SAME, step_tokens=3072),
    "Tandem's KV blocks": replace(SAME, graphs=True),
    "host 2.5 ms a step": replace(SAME, host_us=2500),
    "all kernels x 1.2": replace(SAME, times=dict.fromkeys(KEYS, 1.2)),
    "decode attention x 4": replace(SAME, times={"decode_attention": 4, "mixed_decode_attention": 4}),
}
OTHERWISE_AT = {"A100": (1, 4, 7.1), "RTX 4090": (1, 3, 4.5)}


def published(gpu: str, engine: str) -> Points:
    """The published curves of an engine on a GPU."""
    lines = (DATA / "swiftllm-published.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        float(row["req_per_s"]): {each: float(row[f"{each}_ms"]) if row[f"{each}_ms"] else None for each in METRICS}
        for row in rows
        if (row["gpu"], row["engine"]) == (gpu, engine)
    }


def ms(value: float | None) -> str:
    """A time like 1.2, or a dash for an unknown one."""
    return "–" if value is None else f"{value:,.1f}"


def closeness(gpu: str, runs: Runs) -> TextTable:
    """Published and simulated values of every point."""
    columns = ["req/s", *chain.from_iterable((f"{name}, ms", "sim", "error") for name in METRICS.values())]
    rows = []
    for rate, point in published(gpu, "swiftllm").items():
        cells = []
        for metric, real in point.items():
            sim = float(np.mean([run[metric] for run in runs[rate]]))
            cells += [ms(real), ms(sim), signed(sim / real - 1 if real and real >= LEGIBLE_MS else None)]
        rows.append([f"{rate:g}", *cells])
    return TextTable(gpu, "", columns, rows)


def sensitivity(runs: Mapping[tuple[str, str, float], float]) -> TextTable:
    """Latency per token under other assumptions."""
    places = [(gpu, rate) for gpu, rates in OTHERWISE_AT.items() for rate in rates]
    rows = [[what, *(ms(runs[what, gpu, rate]) for gpu, rate in places)] for what in OTHERWISE]
    real = [ms(published(gpu, "swiftllm")[rate]["per_token"]) for gpu, rate in places]
    columns = ["ms per token", *(f"{gpu}, {rate:g}/s" for gpu, rate in places)]
    return TextTable("If it had been otherwise", "", columns, [["published", *real], *rows])


def draw(axes: Axes, gpu: str, metric: str, runs: Runs, first: Points) -> None:
    """One metric on one GPU."""
    for engine, colour, marker in (("vLLM", "#999999", "s"), ("swiftLLM", COLOURS["measured"], "o")):
        points = published(gpu, engine.lower()).items()
        curve = [(rate, point[metric]) for rate, point in points if point[metric] is not None]
        axes.plot(*zip(*curve, strict=True), color=colour, marker=marker, ms=4, lw=1, label=f"{engine}, published")
    values = np.array([[point[metric] for point in of_seeds] for of_seeds in runs.values()])
    simulated = {"color": COLOURS["simulated"], "lw": 1.4}
    axes.fill_between(list(runs), values.min(1), values.max(1), color=COLOURS["simulated"], alpha=0.25)
    axes.plot(list(runs), values.mean(1), marker="x", ms=4, label="simulated", **simulated)
    otherwise = [point[metric] for point in first.values()]
    axes.plot(list(first), otherwise, ls=":", label="simulated, were a prompt the first turn alone", **simulated)
    axes.set(yscale="log", title=f"{gpu}: ms {METRICS[metric]}", xlabel="requests a second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))


def curves_figure(runs: Mapping[str, Runs], first: Mapping[str, Points]) -> Figure:
    """All metrics on both GPUs."""
    figure = Figure((11, 6.4), layout="constrained")
    axes = figure.subplots(len(PROFILES), len(METRICS))
    for (row, gpu), (place, metric) in product(enumerate(PROFILES), enumerate(METRICS)):
        draw(axes[row, place], gpu, metric, runs[gpu], first[gpu])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(folder: Path, seconds: float, seeds: int) -> None:
    """Run all simulations, draw the figure, and print the tables."""
    experiments = {
        what: replace(each, seconds=each.seconds * seconds / SAME.seconds) for what, each in OTHERWISE.items()
    }
    same, first_turn = experiments["as in the figure"], experiments["first turn as prompt"]
    progress = Console(stderr=True)
    runs: dict[str, Runs] = {gpu: {rate: [] for rate in published(gpu, "swiftllm")} for gpu in PROFILES}
    points = [(gpu, rate) for gpu in runs for rate in runs[gpu]]
    for (gpu, rate), seed in track(list(product(points, range(seeds))), "curves", console=progress):
        runs[gpu][rate].append(same.serve(gpu, rate, seed))
    first: dict[str, dict[float, Mapping[str, float]]] = {gpu: {} for gpu in PROFILES}
    for gpu, rate in track(points, "first turns", console=progress):
        first[gpu][rate] = first_turn.serve(gpu, rate)
    places = [(gpu, rate) for gpu, rates in OTHERWISE_AT.items() for rate in rates]
    otherwise = {
        (what, gpu, rate): experiments[what].serve(gpu, rate)["per_token"]
        for what, (gpu, rate) in track(list(product(experiments, places)), "otherwise", console=progress)
    }
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}):
        curves_figure(runs, first).savefig(folder / "swiftllm.png", dpi=110)
    print_tables([*(closeness(gpu, runs[gpu]) for gpu in runs), sensitivity(otherwise)], Console(width=120))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=SAME.seconds, help="of arrivals at every rate")
    parser.add_argument("--seeds", type=int, default=3, help="arrivals drawn for every point")
    main(**vars(parser.parse_args()))
