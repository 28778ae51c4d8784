"""A served run tells what captured steps take while serving: where the truth is known, calibration gives it back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.comparison.compare import compare_decisions, latency_model_errors
from engine.config import ServingConfig
from engine.records.manifest import config_of
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, read_run
from engine.step import Chunk, Step
from sim.latency_model import LatencyModel
from sim.power_state import PowerState
from sim.profile.format import Profile, read_profile, shipped_profiles, write_profile
from sim.profile.meta import PowerCalibration
from sim.profiling.calibration import LOADS, calibrate, calibration_load, without_in_service
from sim.replay import replay
from sim.simulate import predict
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.synthetic import synthetic

GOLDEN = Path(__file__).parent / "golden"
TANDEM = Path(sys.executable).with_name("tandem")
MEMORY_US, ROW_US, LIMIT = 40e3, 21.0, 0.2
SLOWED = {"decode": 0.1, "mixed": 0.3}  # what a load of 1 beyond the limit adds, as a share of the time below it


@pytest.fixture(scope="module")
def measured() -> Profile:
    """As it comes from measuring step by step."""
    return without_in_service(read_profile(shipped_profiles()["h100-80gb/llama-3-8b"]))


@pytest.fixture(scope="module")
def truth(measured) -> Profile:
    """The GPU while it serves: decodes a little slower than measured, mixed steps faster, and slower under load."""
    factors = {"decode": 1.01, "mixed": 0.95}
    served = [
        row | {"time_us": row["time_us"] * factors[row["kind"]], "slowed_us": row["time_us"] * SLOWED[row["kind"]]}
        for row in measured.tables["graph"]
    ]
    return replace(
        measured,
        meta=replace(measured.meta, power=PowerCalibration(MEMORY_US, ROW_US, LIMIT)),
        tables=measured.tables | {"in_service": served},
    )


@pytest.fixture(scope="module")
def config(measured) -> ServingConfig:
    return measured.meta.limits


@pytest.fixture(scope="module")
def calibrated(measured, truth, config) -> Profile:
    recorder = Recorder()
    predict(calibration_load(measured, config).requests, config, truth, recorder)
    return calibrate(measured, [(RunRecords({}, recorder.tables()), config)])


def test_time_and_slowdown_of_every_captured_size_are_found(calibrated, truth):
    assert calibrated.meta.power == PowerCalibration(MEMORY_US, pytest.approx(ROW_US, rel=0.1), LIMIT)
    for found, true in zip(calibrated.tables["in_service"], truth.tables["in_service"], strict=True):
        assert (found["kind"], found["rows"]) == (true["kind"], true["rows"])
        assert found["time_us"] == pytest.approx(true["time_us"], rel=0.01)
        assert found["slowed_us"] == pytest.approx(true["slowed_us"], rel=0.2)


@pytest.mark.parametrize("rate", [10, 20, 30])
def test_a_calibrated_profile_predicts_another_policy(calibrated, truth, config, rate):
    requests = assign_arrivals(synthetic(1500, 1, "uniform:16:900", "uniform:16:400"), "poisson", rate=rate).requests
    runs = []
    for profile in (truth, calibrated):
        recorder = Recorder()
        predict(requests, replace(config, scheduler="prefill_first"), profile, recorder)
        runs.append(recorder.tables()["requests"]["last_token_ns"].to_numpy())
    arrivals = [each.arrival_ns for each in sorted(requests, key=lambda each: each.id)]
    true, found = (run - arrivals for run in runs)
    assert found.mean() == pytest.approx(true.mean(), rel=0.005)


def test_what_was_measured_stays_as_it_was(calibrated, measured):
    assert without_in_service(calibrated).tables == measured.tables
    assert calibrated.tables["graph"] == measured.tables["graph"]


def test_a_calibrated_profile_can_be_written_and_read(calibrated, tmp_path):
    write_profile(calibrated, tmp_path / "p")
    assert read_profile(tmp_path / "p").tables["in_service"] == calibrated.tables["in_service"]


def test_a_profile_with_the_names_of_schema_2_is_read(calibrated, tmp_path):
    write_profile(calibrated, tmp_path / "p")
    meta = (tmp_path / "p/meta.yaml").read_text()
    (tmp_path / "p/meta.yaml").write_text(meta.replace("schema: 3\n", "schema: 2\n").replace("\npower:", "\nload:"))
    (tmp_path / "p/in_service.parquet").rename(tmp_path / "p/served.parquet")
    table = pq.read_table(tmp_path / "p/decode_attention.parquet")
    names = [{"imbalance": "unevenness"}.get(name, name) for name in table.column_names]
    pq.write_table(table.rename_columns(names), tmp_path / "p/decode_attention.parquet")
    assert "unevenness" in names and "\npower:" in meta
    assert read_profile(tmp_path / "p") == calibrated


@pytest.mark.parametrize("broken", [{"slowed_us": float("nan")}, {"slowed_us": -1.0}, {"slowed_us": None}])
def test_a_slowdown_that_is_none_gets_one_clear_line(calibrated, broken):
    served = [calibrated.tables["in_service"][0], calibrated.tables["in_service"][1] | broken]
    with pytest.raises(TandemError, match=r"in_service, row 1: slowed_us is .*calibrate the profile again") as refused:
        replace(calibrated, tables=calibrated.tables | {"in_service": served})
    assert "\n" not in str(refused.value)


def test_half_a_calibration_is_refused(calibrated, measured):
    for meta, tables in ((measured.meta, calibrated.tables), (calibrated.meta, measured.tables)):
        with pytest.raises(TandemError, match="go together: calibrate the profile again"):
            Profile(meta, tables)


def test_requests_arrive_at_levels_of_what_the_machine_can_do(measured, config):
    requests = calibration_load(measured, config).requests
    turn_ns = requests[-1].arrival_ns / len(LOADS)
    counts = [sum(ceil(each.arrival_ns / turn_ns) == turn for each in requests) for turn in range(1, 1 + len(LOADS))]
    assert [max(LOADS) * count / max(counts) for count in counts] == pytest.approx(LOADS, abs=0.02)
    assert all(each.prompt_len + each.output_len <= config.max_model_len for each in requests)


def test_a_machine_that_can_do_much_is_asked_for_a_shorter_time(measured, config, monkeypatch):
    monkeypatch.setattr("sim.profiling.calibration.MOST", 500)
    requests = calibration_load(measured, config).requests
    assert len(requests) == pytest.approx(500, rel=0.01) and 5e9 < requests[-1].arrival_ns < 30e9


def test_calibrated_by_command_on_one_real_run_it_predicts_another_policy_better(measured, tmp_path):
    command = ["profile", "calibrate", "--from", "h100-80gb/llama-3-8b", GOLDEN / "h100-llama-3-8b-chunked_prefill-90"]
    done = subprocess.run([TANDEM, *command, "--out", tmp_path / "p"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calibrated, other = read_profile(tmp_path / "p"), read_run(GOLDEN / "h100-llama-3-8b-prefill_first-90")
    assert calibrated.meta.held_out["mape"] < 0.02
    before, after = (prediction_errors(profile, other) for profile in (measured, calibrated))
    assert after["decode"]["mape"] < 0.006 and after["prefill"]["mape"] < 0.0125
    for kind in ("decode", "prefill"):
        assert after[kind]["mape"] < before[kind]["mape"]
        assert abs(after[kind]["mean_error"]) < abs(before[kind]["mean_error"]) / 2


def test_by_command_the_requests_that_calibrate_a_card_are_made_served_and_learned_from(tmp_path):
    shipped = "h200/llama-3-8b"
    limits = "--kv-blocks 14015 --block-size 64 --max-seqs 256 --max-batched-tokens 2048 --max-model-len 8192 --depth 2"
    commands = [
        f"trace calibration --profile {shipped} --out load.parquet",
        f"simulate --trace load.parquet --profile {shipped} {limits} --out run",
        f"profile calibrate --from {shipped} run --out p",
    ]
    for command in commands:
        asked = [TANDEM, *command.split()]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    gpu, found = (read_profile(path).tables["in_service"] for path in (shipped_profiles()[shipped], tmp_path / "p"))
    for true, learned in zip(gpu, found, strict=True):
        assert learned["time_us"] == pytest.approx(true["time_us"], rel=0.025)


def test_requests_that_calibrate_are_made_for_captured_steps_alone(tmp_path):
    command = [TANDEM, "trace", "calibration", "--profile", "a100-80gb/llama-3-8b", "--out", tmp_path / "t"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "only a profile of captured steps" in done.stderr
    assert not (tmp_path / "t").exists()


def prediction_errors(profile: Profile, run: RunRecords) -> dict[str, dict[str, float]]:
    replayed = replay(run, config_of(run.manifest), profile)
    return latency_model_errors(run, replayed.predicted_ns, compare_decisions(run, replayed.records))


def test_a_profile_without_captured_steps_cannot_be_calibrated(measured, config):
    tables = {name: rows for name, rows in measured.tables.items() if name != "graph"}
    with pytest.raises(TandemError, match="only a profile of captured steps can be calibrated"):
        calibrate(replace(measured, tables=tables), [(RunRecords({}, Recorder().tables()), config)])


# -- the load --------------------------------------------------------------------------------------------------


def prefill(tokens: int) -> Step:
    return Step(0, chunks={0: Chunk(0, tokens, True)})


def test_a_step_takes_longer_the_more_was_computed_just_before(truth):
    model = LatencyModel(truth)
    rested = model.device_ns(prefill(512))
    times = [model.device_ns(prefill(512)) for _ in range(30)]
    assert rested < times[0] < times[1] < times[2] and times == sorted(times)
    parts = model.parts_us(prefill(512))
    at_most = SLOWED["mixed"] * (parts["dense"] + parts["head"] + parts["padding"])
    assert 0.5 * at_most < parts["power"] < at_most


def test_a_device_that_waits_recovers(truth):
    model = LatencyModel(truth)
    rested = model.device_ns(prefill(512), start_ns=0)
    busy = [model.device_ns(prefill(512)) for _ in range(9)][-1]
    again = model.device_ns(prefill(512), start_ns=10 * busy + round(250 * MEMORY_US))
    last = model.device_ns(prefill(512), start_ns=10**12)
    assert rested < again < busy and last == rested
    model.rest()
    assert model.device_ns(prefill(512)) == rested


def test_a_step_too_large_to_be_captured_slows_down_too(truth):
    model = LatencyModel(truth)
    rested = model.device_ns(prefill(4096))
    assert model.device_ns(prefill(4096)) > 1.05 * rested  # which computes for 90 ms


def test_the_power_limit_can_be_left_out(truth, measured):
    model, ignoring = LatencyModel(truth), LatencyModel(truth, ["power"])
    first, *_, last = (ignoring.device_ns(prefill(512)) for _ in range(9))
    assert first == last == model.device_ns(prefill(512))
    assert LatencyModel(measured).parts_us(prefill(512))["power"] == 0


def test_the_load_is_the_share_of_the_recent_past():
    load = PowerState(MEMORY_US)
    for _ in range(200):
        load.worked(10_000, 3_000)
    assert load.share == pytest.approx(0.3)
    load.rested(MEMORY_US)
    assert load.share == pytest.approx(0.3 / 2.718281828)
