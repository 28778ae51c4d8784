"""The limits of a run, each with its origin: the user, else the profile, the model or the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress
from engine.config import RULES, ServingConfig
from engine.model.config import ModelConfig
from engine.records import manifest
from engine.records.run_folder import RunRecords
from sim.memory_model import MEMORY_LIMITS, beyond_measured, gpu_blocks, measured_blocks
from sim.profile.format import Profile
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.executor.executor import Executor

GIVEN, RUN, PROFILE, MODEL, MEMORY, DEFAULT = "given", "that run", "profile", "model", "memory", "default"
OF_GPU = {"max_seqs": 256, "max_batched_tokens": 2048, "pipeline_depth": 2}  # as the profiles that ship were measured
OF_CPU = {"max_seqs": 32, "max_batched_tokens": 2048, "pipeline_depth": 1}
OF_PROFILE = (*MEMORY_LIMITS, "pipeline_depth", "block_size")
LEAST_LEN = 2048  # tokens: a longest request that nobody gave is not cut below this to fit into memory


@dataclass(frozen=True, slots=True)
class Settled:
    """The limits of a run.

    Attributes:
        config: all of them, and the policy.
        origins: where each is from.
        notes: for whoever reads the run's figures.
        allow_long: whether requests beyond the model's positions were allowed by name.
    """

    config: ServingConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    allow_long: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """For a manifest's provenance."""
        return {"limits": dict(self.origins)} | ({"allow_long_context": True} if self.allow_long else {})

    @property
    def line(self) -> str:
        """All limits, those of one origin together."""
        shown = dict(_shown(self.config))
        groups = groupby(shown, lambda name: self.origins.get(name, DEFAULT))
        told = (f"{', '.join(shown[name] for name in names)} ({origin})" for origin, names in groups)
        return "limits: " + "; ".join(told)

    def but(self, origin: str, **limits: Any) -> Settled:
        """The same, but for some limits."""
        config, origins = replace(self.config, **limits), {**self.origins, **dict.fromkeys(limits, origin)}
        return replace(self, config=config, origins=origins)

    def say(self, progress: Progress) -> None:
        """Print them, in a line, and the notes."""
        for line in (self.line, *(f"note: {note}" for note in self.notes)):
            progress.note(line)


def limits_of_run(run: manifest.Manifest) -> str:
    """The policy and the limits of a recorded run, in two lines; nothing of a client's run, which knows none."""
    if "scheduler" not in run["system"]:
        return ""
    config = manifest.config_of(run)
    rules = [f"{name} {getattr(config, name)}" for name, (usual, *_) in RULES.items() if getattr(config, name) != usual]
    policy = ", ".join([config.scheduler, *["prefix caching"] * config.prefix_caching, *rules])
    return f"policy: {policy}\n{Settled(config, run['provenance'].get('limits', {})).line}"


def _shown(config: ServingConfig) -> Iterator[tuple[str, str]]:
    yield "max_seqs", f"{config.max_seqs:,} sequence{'s' * (config.max_seqs > 1)}"
    yield "max_batched_tokens", f"{config.max_batched_tokens:,} tokens a step"
    yield "max_model_len", f"requests to {config.max_model_len:,} tokens"
    yield "pipeline_depth", f"depth {config.pipeline_depth}"
    yield "num_blocks", f"{config.num_blocks:,} KV blocks of {config.block_size}"
    if config.num_cpu_blocks:
        yield "num_cpu_blocks", f"{config.num_cpu_blocks:,} in host memory"


def simulated_limits(profile: Profile, said: Limits, like: RunRecords | None = None) -> Settled:
    """The limits of a simulated run.

    Each is the first that is known: the user's, that of the run `like`, the profile's, the model's, the one that fits
    into the GPU's memory, the default of a GPU.

    Raises:
        TandemError: a limit is out of range, or not even one request fits.
    """
    _check_positions(profile.model, said)
    if like:
        return _like(manifest.config_of(like.manifest), said)
    limits = profile.meta.limits
    measured: dict[str, int] = {name: getattr(limits, name) for name in OF_PROFILE} if limits else {}
    if profile.meta.block_size:
        measured["block_size"] = profile.meta.block_size
    settled = _settled(said, {PROFILE: measured, DEFAULT: OF_GPU}, profile.model.longest_request)
    if said.num_blocks is not None:
        return settled
    settled = _held(settled, partial(gpu_blocks, profile))
    if measured_blocks(profile, settled.config) is None:
        return settled
    notes = (_narrower(profile),) if beyond_measured(profile, settled.config) else ()
    return replace(settled, origins={**settled.origins, "num_blocks": PROFILE}, notes=notes)


def real_limits(executor: Executor, said: Limits) -> Settled:
    """The limits of a real run: the user's, else those of the model, the memory and the kind of machine.

    Raises:
        TandemError: as in `simulated_limits`.
    """
    _check_positions(executor.model, said)
    machine = {"block_size": executor.block_size} | (OF_GPU if executor.captures else OF_CPU)
    settled = _settled(said, {DEFAULT: machine}, executor.model.longest_request)
    return settled if said.num_blocks is not None else _held(settled, executor.measure_blocks)


def gpu_limits(model: ModelConfig, said: Limits) -> Settled:
    """The limits on a GPU of which nothing but its memory is known. One KV block stands for those that it holds.

    Raises:
        TandemError: a limit is out of range.
    """
    _check_positions(model, said)
    return _settled(said, {DEFAULT: OF_GPU}, model.longest_request)


def config_to_check(said: Limits) -> ServingConfig:
    """The user's limits, before model and memory are known. Raises TandemError if one is out of range."""
    return _settled(said, {DEFAULT: OF_CPU}, LEAST_LEN).config


def _check_positions(model: ModelConfig, said: Limits) -> None:
    """Raises TandemError if the user wants longer requests than the model has positions for, and did not say so.

    Beyond its sliding window, there are none at all.
    """
    longest, positions = said.max_model_len, model.max_position_embeddings
    model.check_window(longest or 0)
    if longest is not None and longest > positions and not said.allow_long_context:
        raise TandemError(
            f"requests to {longest:,} tokens are beyond the {positions:,} positions of {model.name}: "
            "lower --max-model-len, or add --allow-long-context"
        )


def _settled(said: Limits, sources: Mapping[str, Mapping[str, int]], positions: int) -> Settled:
    """Each limit by the first that has one; without KV blocks, unless the user gave them."""
    known: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, limits in ({GIVEN: said.said()} | dict(sources) | {MODEL: {"max_model_len": positions}}).items():
        new = {name: value for name, value in limits.items() if name not in known}
        known |= new
        origins |= dict.fromkeys(new, origin)
    _bound(known, origins, "max_model_len", positions, MODEL)
    _bound(known, origins, "max_seqs", known["max_batched_tokens"], origins["max_batched_tokens"])  # a token for each
    return Settled(ServingConfig(**{"num_blocks": 1} | known), origins, allow_long=said.allow_long_context)


def _bound(known: dict[str, Any], origins: dict[str, str], name: str, most: int, origin: str) -> None:
    """Lower a limit that the user did not give."""
    if origins[name] != GIVEN and known[name] > most:
        known[name], origins[name] = most, origin


def _held(settled: Settled, held: Callable[[ServingConfig], int]) -> Settled:
    """With as many KV blocks as are held; a longest request that was not given is halved until it fits."""
    try:
        return settled.but(MEMORY, num_blocks=held(settled.config))
    except TandemError:
        half = settled.config.max_model_len // 2
        if settled.origins["max_model_len"] == GIVEN or half < LEAST_LEN:
            raise
    return _held(settled.but(MEMORY, max_model_len=half), held)


def _like(run: ServingConfig, said: Limits) -> Settled:
    """Those of a run; where the user said another block size, as many bytes of blocks."""
    given = said.said()
    size = given.get("block_size", run.block_size)
    scaled = {name: getattr(run, name) * run.block_size // size for name in ("num_blocks", "num_cpu_blocks")}
    origins = dict.fromkeys(asdict(run), RUN) | dict.fromkeys(given, GIVEN)
    return Settled(replace(run, **scaled | given), origins, allow_long=said.allow_long_context)


def _narrower(profile: Profile) -> str:
    limits = profile.meta.measured_within
    return (
        f"the profile's KV blocks were measured within {limits.max_seqs:,} sequences, "
        f"{limits.max_batched_tokens:,} tokens a step and requests to {limits.max_model_len:,} tokens, and it "
        "does not say what memory there was: --kv-blocks says what to assume"
    )
