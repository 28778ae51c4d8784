"""A study, measured and judged as a user would, on a tiny model: it takes seconds, and is no test of fidelity."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model

from analysis.cli import main as cli
from analysis.comparison.targets import STUDY_TARGETS, judge_case
from analysis.jobs.study import Case, Study
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import write_trace

ROOT = Path(__file__).parents[1]
LIMITS = ["--max-seqs", "4", "--max-batched-tokens", "64", "--max-model-len", "64", "--kv-blocks", "40"]


def tandem(*args: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tandem", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    tiny_model().save_pretrained(folder / "model")
    write_trace(folder / "trace.parquet", synthetic(4000, 0, "fixed:10", "fixed:5"))
    measure(folder)
    return folder


def measure(folder: Path) -> None:
    tandem(
        *("fidelity", "measure", "--trace", folder / "trace.parquet", "--out", folder / "study"),
        *("--model", folder / "model", "--device", "cpu", "--threads", 1, *LIMITS),
        *("--loads", "10,20", "--shared", "10", "--against", "fcfs", "--repeats", 1, "--seconds", 1),
    )


def test_every_case_is_served_and_no_more(study):
    runs = sorted(str(path.parent.relative_to(study / "study")) for path in (study / "study").glob("*/*/manifest.json"))
    chunked = ["chunked_prefill-10/real", "chunked_prefill-10/repeat-1", "chunked_prefill-20/real"]
    assert [run for run in runs if not run.endswith("sim")] == [*chunked, "fcfs-10/real"]


def test_what_is_measured_is_not_measured_again_and_what_is_missing_is(study):
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (study / "study").glob("**/manifest.json")}

    gone = study / "study/fcfs-10/real/manifest.json"
    before = times()
    gone.unlink()
    for other in gone.parent.iterdir():
        other.unlink()
    measure(study)
    changed = {path for path, time in times().items() if before[path] != time}
    assert changed == {str(gone)}


def test_a_judged_study_has_a_comparison_for_each_case_and_ranks_the_policies(study, capsys):
    tandem("fidelity", "judge", study / "study", "--json")
    judged = json.loads(capsys.readouterr().out)
    assert set(judged["cases"]) == {"chunked_prefill-10", "chunked_prefill-20", "fcfs-10"}
    assert all(case["result"]["decisions"]["identical"] for case in judged["cases"].values())
    assert judged["cases"]["chunked_prefill-10"]["result"]["repeats"] == 1
    assert list(judged["rankings"]) == ["10%"]
    assert judged["rankings"]["10%"]["policies"] == {"chunked_prefill": 2, "fcfs": 1}
    assert judged == json.loads((study / "study/fidelity.json").read_text())
    tandem("fidelity", "judge", study / "study")
    shown = capsys.readouterr().out
    assert "identical" in shown and "Allowed: TTFT 5.0%, TPOT 2.0%, E2E 2.0%" in shown
    tandem("fidelity", "judge", study / "study", "--json", "--targets", "1000,2000,3000")
    verdicts = {each["what"]: each["allowed"] for each in json.loads(capsys.readouterr().out)["verdicts"]}
    assert (verdicts["p50 TTFT"], verdicts["p90 TPOT"], verdicts["mean E2E"]) == (10, 20, 30)


def test_the_commands_of_the_page_judge_a_study_print_its_residuals_and_draw_it(study, tmp_path):
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/fidelity.md").read_text(), re.DOTALL)
    folders = {"STUDY": study / "study", "FIGURES": tmp_path / "figures"}
    for command in block.splitlines():
        program, *args = (str(folders.get(word, word)) for word in shlex.split(command))
        binary = Path(sys.executable).with_name(program)
        done = subprocess.run([binary, *args], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "residuals.py" in command:
            assert "chunked_prefill-20" in done.stdout and "The device between steps" in done.stdout
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    shown = re.findall(r"\]\(figures/(.*?)\)", (ROOT / "docs/fidelity.md").read_text())
    assert drawn == set(shown) <= {path.name for path in (ROOT / "docs/figures").iterdir()}


def test_a_folder_without_a_study_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tandem", "fidelity", "judge", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "holds no measured study" in capsys.readouterr().err


def small_study(**changes) -> Study:
    fields = {"loads": (0.5, 1.0), "against": ("fcfs",), "shared": (0.5,), "repeats": 2, "seconds": 10, "seed": 0}
    return Study(synthetic(100, 0, "fixed:1", "fixed:1"), "chunked_prefill", **(fields | changes))


def test_each_case_is_served_once_and_repeated_where_policies_are_ranked():
    study = small_study()
    assert study.cases == [Case("chunked_prefill", 0.5), Case("fcfs", 0.5), Case("chunked_prefill", 1.0)]
    assert [f"{case.name}/{run}" for case, run in study.runs] == [
        "chunked_prefill-50/real",
        "fcfs-50/real",
        "chunked_prefill-100/real",
        "chunked_prefill-50/repeat-1",
        "chunked_prefill-50/repeat-2",
    ]
    assert [run for _, run in small_study(repeats=0).runs] == ["real"] * 3


def test_a_trace_that_is_too_short_for_a_load_is_refused():
    assert len(small_study().arrivals(0.5, 20).requests) == 100
    with pytest.raises(TandemError, match=r"20 s at 10\.0 requests a second are 200 requests, the trace has 100"):
        small_study(seconds=20).arrivals(0.5, 20)


@pytest.mark.parametrize(
    ("load", "error", "spread", "within"),
    [
        (0.5, 0.019, None, True),
        (0.5, -0.021, 0.01, False),
        (0.5, 0.03, 0.035, True),  # within the spread of real runs
        (0.5, 0.05, 0.09, False),  # a spread that large excuses nothing beyond 4 %
        (1.0, 0.045, None, True),
    ],
)
def test_an_error_is_judged_by_its_target_or_by_a_modest_spread(load, error, spread, within):
    statistics = ("mean", "p50", "p90", "p99")
    latencies = ("ttft", "tpot", "e2el")
    result = {
        "latency_model": {},
        "closed_loop": {each: {statistic: {"error": error} for statistic in statistics} for each in latencies},
        "repeat_spread": {each: dict.fromkeys(statistics, spread) for each in latencies},
    }
    verdicts = {each["what"]: each["within"] for each in judge_case("case", load, result, STUDY_TARGETS)}
    assert verdicts["mean TPOT"] is within
