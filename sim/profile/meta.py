"""A profile's `meta.yaml` as a typed value: what was measured, where, how, and how well it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from engine.config import ServingConfig
from engine.model.config import ModelConfig
from engine.model.graph_sizes import GraphSizes
from engine.records.validation import check_types, checked
from traces.errors import TandemError


@dataclass(frozen=True, slots=True)
class DataSheet:
    """A GPU's published rates and memory; `device` is the name that its driver reports."""

    device: str
    tflops: float
    memory_gb_per_s: float
    memory_gib: float
    bus_gb_per_s: float


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes: what a process may use of the GPU, what the weights take, what a KV block takes."""

    usable: int
    weights: int
    block: int


@dataclass(frozen=True, slots=True)
class PowerCalibration:
    """How a device slows down at its power limit, as `sim.profiling.calibration` finds it.

    Attributes:
        memory_us: time constant of the power state.
        row_us: time of a row where the device computes at its best.
        limit: share of the recent past up to which nothing slows down.
    """

    memory_us: float
    row_us: float
    limit: float


@dataclass(frozen=True, slots=True)
class ProfileMeta:
    """What a profile says of itself; what it does not say is None.

    Attributes:
        source: who measured it and how, for people.
        kernels: whose kernels ran.
        kv_blocks: KV blocks that the device held within `limits`.
        limits: of the batches that were measured.
        graphs: the captured steps.
        power: how the device slows down at its power limit.
        held_out: the error on batches or points that are in no table.
        tables: by table, where it is from and by which rules; of profiles that were not measured whole.
        derived: the profile and model that it was derived from.
        notes: all else, such as software, clocks, repeats.
    """

    device: str
    model: ModelConfig
    dtype: str
    source: str
    kernels: str | None = None
    kv_blocks: int | None = None
    block_size: int | None = None
    limits: ServingConfig | None = None
    graphs: GraphSizes | None = None
    memory: MemoryFacts | None = None
    data_sheet: DataSheet | None = None
    power: PowerCalibration | None = None
    held_out: dict[str, Any] | None = None
    tables: dict[str, dict[str, Any]] | None = None
    derived: dict[str, str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def measured_within(self) -> ServingConfig:
        """`limits`. Raises TandemError if `tandem profile` did not measure the profile."""
        if self.limits is None:
            raise TandemError("the profile was not measured by tandem profile: there are no points to measure again")
        return self.limits

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> ProfileMeta:
        """Read the entries of a `meta.yaml`. Raises TandemError if one is missing or makes no sense."""
        names = {each.name for each in fields(cls)} - {"notes"}
        if missing := [name for name in ("device", "model", "dtype", "source") if name not in entries]:
            raise TandemError(f"no entry '{missing[0]}'")
        known = {name: _read(name, value) for name, value in entries.items() if name in names}
        notes = {name: value for name, value in entries.items() if name not in names}
        meta = cls(**known, notes=notes)
        check_types(meta)
        return meta

    def to_dict(self) -> dict[str, Any]:
        """The entries of a `meta.yaml`; `from_dict` reads them back."""
        entries: dict[str, Any] = asdict(self)
        notes: dict[str, Any] = entries.pop("notes")
        entries["model"] = self.model.to_dict()
        return {name: value for name, value in entries.items() if value is not None} | notes


READERS = {
    "limits": ServingConfig,
    "graphs": GraphSizes,
    "memory": MemoryFacts,
    "data_sheet": DataSheet,
    "power": PowerCalibration,
}


def _read(name: str, value: Any) -> Any:
    try:
        if name == "model":
            return checked(ModelConfig.from_dict(value))
        if name in READERS:
            entries = {key: tuple(of) if isinstance(of, list) else of for key, of in value.items()}
            return checked(READERS[name](**entries))
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError, OverflowError, TandemError) as error:
        again = "calibrate the profile again (tandem profile calibrate)" if name == "power" else "measure it again"
        raise TandemError(f"entry '{name}' is not as Tandem writes it ({error}): {again}") from error
    return value
