"""Makes latency profiles of measurements that others published.

Such a profile is of other kernels and another engine, and says so. What its sources lack is filled in from the GPU's
data sheet or by a rule; `meta.yaml` says so too, table by table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from sim.profile.curves import Curve, Surface
from sim.profile.format import KEYS, TABLES, Points, Profile, Row, rows_of
from sim.sources.importers import aiconfigurator, llmservingsim, vidur
from sim.sources.importers.points import RULES, between_chunks, cross_check, plane, with_contexts
from sim.sources.importers.source import Measured
from sim.sources.roofline import BYTES, data_sheet, data_sheets, roofline_profile, small_kernels
from traces.errors import TandemError

FORMATS = {"llmservingsim": llmservingsim, "aiconfigurator": aiconfigurator, "vidur": vidur}
BELIEVED = (0.3, 30.0)  # times the data sheet's floor: outside of this, a file's times are in another unit
LEAST_KERNEL_US = 2.0  # what the smallest kernels take on either GPU: 1.9 us and up (RTX 4090), 2 us and up (A100)
LOGIT_BYTES = 10  # greedy sampling reads a logit, writes it in float32, and reads that


def import_profile(
    sources: Sequence[Path],
    model: ModelConfig,
    hardware: str | None = None,
    source_format: str | None = None,
    block_size: int = 16,
) -> Profile:
    """Make a profile of what `sources` measured; where several have a table, the first one's is taken.

    Args:
        hardware: a GPU of `sim/sources/hardware`; can be left out if a source names its device.
        source_format: of `FORMATS`; None: found out from the files.

    Raises:
        TandemError: a source is damaged, of no known format, or of another model or GPU than is asked for.
    """
    found = [_reader(source, source_format).read(source, model) for source in sources]
    hardware = _hardware(found, hardware)
    floor = roofline_profile(hardware, model, block_size)
    tables: dict[str, list[Row]] = dict(floor.tables)
    origin: dict[str, Any] = {name: {"how": "roofline"} for name in tables}
    origin["host"] = {"how": "zero"}
    held_out: dict[str, Any] = {"rule": RULES["held_out"]}
    first = {table: each for each in reversed(found) for table in each.tables}
    for table in (each for each in KEYS if each in first):
        of = first[table]
        if table in TABLES:
            _check_unit(of, table, floor)
        points, rules = _completed(of, table, floor)
        provenance = {name: of.about[name] for name in ("source", "engine", "dtype")}
        origin[table] = {"how": "measured"} | provenance | ({"rules": rules} if rules else {})
        held_out[table] = cross_check(table, of.tables[table])
        # To four digits. Sources state no spread of their repeats.
        tables[table] = rows_of(table, {key: float(f"{time:.4g}") for key, time in sorted(points.items())})
    for each in found:
        held_out |= each.checks
    published = [f"{each.about['source']} {each.about['commit']} ({each.about['licence']})" for each in found]
    notes = {
        "sources": [{name: value for name, value in each.about.items() if value is not None} for each in found],
        "spread": "not published: 0 throughout",
    }
    meta = replace(
        floor.meta,
        dtype=found[0].about["dtype"],
        source=f"imported: {', '.join(published)}; kernels of another engine",
        kernels=", ".join(dict.fromkeys(each.about["engine"] for each in found)),
        held_out=held_out,
        tables=origin,
        notes=notes,
    )
    return Profile(meta, tables)


def _reader(source: Path, source_format: str | None) -> Any:
    if not source.exists():
        raise TandemError(f"{source}: no such file or folder")
    if source_format is not None and source_format not in FORMATS:
        raise TandemError(f"no format '{source_format}': choose {', '.join(FORMATS)}")
    recognized = [name for name, reader in FORMATS.items() if reader.recognizes(source)]
    fitting = recognized if source_format is None else [source_format]
    if len(fitting) != 1:
        raise TandemError(
            f"{source}: {'several formats' if fitting else 'no format that is known'}; give --format and "
            f"a folder with {', '.join(llmservingsim.FILES)} (llmservingsim) or {', '.join(aiconfigurator.FILES)} "
            "(aiconfigurator), or a .csv file (vidur)"
        )
    return FORMATS[fitting[0]]


def _hardware(found: Sequence[Measured], said: str | None) -> str:
    devices = {name: sheet.device for name, sheet in data_sheets().items()}
    if said is not None:
        data_sheet(said)
    stated = {each.about["device"]: each.path for each in found if each.about["device"]}
    for device, path in stated.items():
        if said is not None and device != devices[said]:
            raise TandemError(f"{path}: measured on {device}; --hardware {said} is {devices[said]}")
    fitting = [name for name, device in devices.items() if set(stated) == {device}]
    if said is None and not fitting:
        names = " and ".join(stated) or "no device"
        raise TandemError(f"the sources name {names}: give --hardware, one of {', '.join(devices)}")
    return said or fitting[0]


def _check_unit(of: Measured, table: str, floor: Profile) -> None:
    """Refuse times in another unit than the format's: at the largest measured point, far from the data sheet's."""
    measured = plane(table, of.tables[table])
    keys = TABLES[table]
    sheet = Surface(plane(table, {tuple(row[key] for key in keys): row["time_us"] for row in floor.tables[table]}))
    key = max(measured, key=lambda each: sheet(*each))
    ratio = measured[key] / sheet(*key)
    if not BELIEVED[0] < ratio < BELIEVED[1]:
        raise TandemError(
            f"{of.path}: {table} takes {ratio:.3g} times what the data sheet's rates allow, at its largest: "
            "times in another unit, or of another GPU"
        )


def _completed(of: Measured, table: str, floor: Profile) -> tuple[Points, list[str]]:
    """All points of a table of ours, from those that were measured, and by which rules the others were filled in."""
    points, model, sheet = of.tables[table], floor.model, floor.meta.data_sheet
    assert sheet, "of the roofline"
    bytes_per_us = sheet.memory_gb_per_s * 1e3
    rules = [of.rules[table]] if of.rules.get(table) else []
    if table == "decode_attention" and of.imbalance:
        gain = Curve({1.0: 0.0} | of.imbalance)
        points = points | {(n, kv, 2.0): time * (1 + gain(n)) for (n, kv, _), time in points.items()}
    elif table == "decode_attention":
        rules.append("contexts all alike: uneven ones were not measured")
    if table == "prefill_attention":
        rules += [RULES["chunks"]] if any(context for _, context in points) else [RULES["chunks"], RULES["contexts"]]
        points = dict(between_chunks(with_contexts(plane(table, points))))
    if table == "dense" and "small" in of.lacks:
        rules.append(f"op small by memory traffic, {LEAST_KERNEL_US:g} us a kernel at least")
        sizes = {tokens for _, tokens in points}
        points = points | {("small", tokens): _small_kernels_us(model, tokens, bytes_per_us) for tokens in sizes}
    if table == "head" and "sampling" in of.lacks:
        rules.append(f"sampling by memory traffic, {LOGIT_BYTES} bytes a logit")
        points = {(n,): time + n * model.vocab_size * LOGIT_BYTES / bytes_per_us for (n,), time in points.items()}
    return points, rules


def _small_kernels_us(model: ModelConfig, tokens: int, bytes_per_us: float) -> float:
    """Norms with residual, rotary embedding, KV write, activation, embedding: their memory traffic, or a least time."""
    numbers = chain(*small_kernels(model).values())
    in_layer = sum(max(LEAST_KERNEL_US, BYTES * tokens * each / bytes_per_us) for each in numbers)
    once = 2 * max(LEAST_KERNEL_US, BYTES * tokens * 2 * model.hidden_size / bytes_per_us)  # embedding, final norm
    return model.num_layers * in_layer + once
