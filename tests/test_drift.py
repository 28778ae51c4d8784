"""A profile is checked on the machine at hand: what has moved is found, and by how much; what has not is trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_device_profilers import CONFIG, KnownGpu, KnownMeter, known_profile, whole_us
from tiny_models import tiny_model

from engine.config import ServingConfig
from engine.model.config import load_model_config
from engine.step import Step
from sim.profile.format import Profile, read_profile, write_profile
from sim.profiling.drift import ALLOWED, DriftCheck, TableDrift, count_drift, judge, measure_drift
from traces.errors import TandemError

LLAMA3 = load_model_config("llama-3-8b")
TANDEM = Path(sys.executable).with_name("tandem")


# -- a GPU whose times are known -------------------------------------------------------------------------------


class SlowerMeter(KnownMeter):
    """The same GPU, some of whose times are longer by a factor."""

    def __init__(self, attention: float = 1.0, whole: float = 1.0) -> None:
        self.attention, self.whole = attention, whole

    def state(self, refuse_busy: bool = False) -> dict[str, float]:
        return {}

    def step_us(self, step: Step) -> float:
        return self.whole * (super().step_us(step) - super().attended_us(step)) + self.attended_us(step)

    def attended_us(self, step: Step) -> float:
        return self.attention * super().attended_us(step)


class KnownExecutor(KnownGpu):
    device, dtype, kernels, model = "known", "float16", "Triton", LLAMA3

    def __init__(self, **factors: float) -> None:
        self._factors = factors

    def meter(self, config: ServingConfig) -> KnownMeter:
        return SlowerMeter(**self._factors)

    def measure_blocks(self, config: ServingConfig) -> int:
        return config.num_blocks


@pytest.fixture(scope="module")
def known() -> Profile:
    profile, _ = known_profile()
    tables = {name: rows for name, rows in profile.tables.items() if name != "swap"}
    meta = replace(profile.meta, device="known", dtype="float16", kernels="Triton", model=LLAMA3, limits=CONFIG)
    return Profile(meta, tables)


def checked(profile: Profile, **factors: float) -> dict[str, TableDrift]:
    return {each.table: each for each in DriftCheck(KnownExecutor(**factors), profile).run()}


def test_a_card_that_has_not_moved_is_trusted_and_every_table_was_asked(known):
    found = checked(known)
    assert found.keys() == known.tables.keys() - {"host", "held_out"} | {"held-out batches"}
    assert all(abs(each.worst) < 1e-9 for each in found.values())
    verdict, why = judge(list(found.values()))
    assert verdict == "trusted" and why.startswith("To be trusted: every table is within what is allowed")


def test_slower_attention_shows_as_the_share_of_the_step_that_it_is(known):
    found = checked(known, attention=1.5)
    drift = found["decode_attention"]
    at = drift.at
    attention_us = at["kv_tokens"] / 20
    expected = 0.5 * attention_us / (attention_us + whole_us("decode", at["sequences"]))
    assert drift.worst == pytest.approx(expected) and drift.worst > drift.median > 0
    assert found["graph"].verdict == found["dense"].verdict == "trusted"


def test_slower_captured_steps_are_found_and_attention_is_not_blamed(known):
    found = checked(known, whole=1.1)
    assert found["graph"].median == pytest.approx(0.1)
    assert found["decode_attention"].median == pytest.approx(0)
    assert 0.05 < found["held-out batches"].median < 0.1
    verdict, why = judge(list(found.values()))
    assert verdict == "replace" and "graph takes 10.0% longer in the median of " in why


def test_the_sample_is_spread_over_every_table_and_the_same_again(known):
    first, again, other = (DriftCheck(KnownExecutor(), known, seed)._sample for seed in (0, 0, 1))
    assert first == again != other and len(first) == len(set(first))
    assert {table: [point.table for point in first].count(table) for table in {point.table for point in first}} == {
        "graph": 1,  # a stream of all
        "attended": 1,  # all that they attend to
        "dense": 16,
        "head": 11,
        "prefill_attention": 16,
        "decode_attention": 16,
    }
    rows = sorted(point.key[0] for point in first if point.table == "dense")
    assert rows[0] <= 32 and rows[-1] >= 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernels": "vLLM 0.19.0"}, r"of other kernels \(vLLM 0.19.0, not Triton\)"),
        ({"dtype": "bfloat16"}, r"another dtype \(bfloat16, not float16\)"),
        ({"model": load_model_config("llama-2-7b")}, "another model shape"),
    ],
)
def test_a_profile_of_something_else_is_refused_in_one_line(known, changes, words):
    with pytest.raises(TandemError, match=words) as refused:
        DriftCheck(KnownExecutor(), replace(known, meta=replace(known.meta, **changes)))
    assert "\n" not in str(refused.value)


def test_the_held_out_batches_are_measured_again_as_they_were_kept(known):
    assert measure_drift(KnownExecutor(), known) == {"mape": pytest.approx(0), "mean_error": pytest.approx(0)}
    assert measure_drift(KnownExecutor(whole=1.25), known)["mean_error"] < -0.1
    assert count_drift(known) == 48
    tables = {name: rows for name, rows in known.tables.items() if name != "held_out"}
    with pytest.raises(TandemError, match="keeps no held-out batches"):
        measure_drift(KnownExecutor(), replace(known, tables=tables))


# -- the verdict ---------------------------------------------------------------------------------------------


def drift(*drifts: float, table: str = "head") -> TableDrift:
    return TableDrift.of(table, ("samples",), {(number,): each for number, each in enumerate(drifts)})


def test_a_drift_is_judged_with_its_own_error():
    assert drift(0.01, 0.011, 0.009).verdict == "trusted"
    assert drift(0.1, 0.11, 0.09).verdict == "replace"
    assert drift(0.01, 0.2, -0.15, 0.1, -0.1).verdict == "unclear"
    assert drift(-0.2, -0.21, 0.3).at == {"samples": 2}


def test_what_goes_through_the_host_may_vary_more():
    assert drift(-0.07, -0.06, -0.08, table="swap").verdict == "trusted"
    assert drift(-0.071, -0.07, -0.072, table="host").verdict == "replace"
    verdict, why = judge([drift(0.02, 0.02), drift(0.06, 0.06, table="swap")])
    assert verdict == "trusted" and "nearest to it, head takes 2.0% longer" in why


def test_what_has_moved_is_named_before_what_is_not_clear():
    verdict, why = judge([drift(0.01, 0.2, -0.15), drift(-0.1, -0.1)])
    assert verdict == "replace" and "head takes 10.0% less in the median of 2 points" in why
    assert judge([drift(0.01, 0.2, -0.15)])[0] == "unclear"


# -- a CPU, for real -----------------------------------------------------------------------------------------


def tandem(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_cpu_profile_is_checked_by_command_and_a_table_that_is_wrong_is_found(tmp_path):
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    limits = ("--max-seqs", 4, "--max-batched-tokens", 64, "--max-model-len", 64)
    machine = ("--model", "model", "--threads", 1)
    made = tandem("profile", *machine, *limits, "--out", "p", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    profile = read_profile(tmp_path / "p")
    head = [row | {"time_us": 9 * row["time_us"]} for row in profile.tables["head"]]
    write_profile(Profile(profile.meta, profile.tables | {"head": head}), tmp_path / "p", overwrite=True)
    done = tandem("profile", "--check", "p", *machine, "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    tables = {each["table"]: each for each in report["tables"]}
    assert tables.keys() == {"dense", "head", "prefill_attention", "decode_attention", "held-out batches", "host"}
    assert tables["head"]["verdict"] == "replace" and tables["head"]["median"] < -10 * ALLOWED
    assert (done.returncode, report["verdict"]) == (1, "replace")

    done = tandem("profile", "--check", "p", *machine, "--max-seqs", 2, cwd=tmp_path)
    refusal = "tandem: --check takes the profile's own limits: leave out max_seqs\n"
    assert (done.returncode, done.stderr) == (2, refusal)
