"""Logits that are NaN end the request that has them, with an error that says so, and nobody else's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_engine_drivers import Engine, collector
from test_executor import LIMITS, serve, workload
from tiny_models import tiny_model

from analysis.metrics.summary import not_completed
from analysis.report.caveats import missing_sentences
from engine.executor.batch_state import NOT_NUMBERS
from engine.executor.executor import Executor
from engine.records.run_folder import read_run
from engine.server.executor_driver import ExecutorDriver
from sim.replay import replay

__all__ = ["collector"]  # a fixture

POISON = 27  # a token whose embedding is NaN


def executor(folder: Path, poisoned: bool) -> Executor:
    model = tiny_model()
    if poisoned:
        with torch.no_grad():
            model.model.embed_tokens.weight[POISON] = torch.nan
    model.save_pretrained(folder)
    return Executor(str(folder), threads=1)


def as_far_as_numbers(prompt: list[int], output: list[int]) -> list[int]:
    """A healthy model's output up to the first token that follows on a poisoned one; -1 stands there."""
    if POISON in prompt:
        return [-1]
    fed_back = output[:-1]
    return [*output[: fed_back.index(POISON) + 1], -1] if POISON in fed_back else output


@pytest.fixture(scope="module")
def executors(tmp_path_factory) -> tuple[Executor, Executor]:
    return executor(tmp_path_factory.mktemp("well"), False), executor(tmp_path_factory.mktemp("ill"), True)


@pytest.mark.parametrize("limits", [{}, {"num_cpu_blocks": 40}, {"prefix_caching": True, "prefix_rules": "vllm"}])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_fails_at_the_token_that_is_none_and_the_others_do_not_notice(executors, depth, limits):
    healthy, poisoned = executors
    requests, config = workload(), dataclasses.replace(LIMITS, pipeline_depth=depth, **limits)
    _, outputs = serve(healthy, requests, config)
    expected = {each.id: as_far_as_numbers(each.prompt_token_ids, outputs[each.id]) for each in requests}
    failing = {number for number, output in expected.items() if output[-1] < 0}
    assert 2 < len(failing) < 18 and any(len(expected[number]) > 1 for number in failing)
    run, outputs = serve(poisoned, requests, config, check=True)
    assert {number: outputs[number][: len(output)] for number, output in expected.items()} == expected
    rows = run.tables["requests"].to_pylist()
    assert {row["request"] for row in rows if row["outcome"] == "failed"} == failing
    assert {row["outcome"] for row in rows} == {"failed", "length"}
    assert all("are not numbers (NaN)" in row["reason"] for row in rows if row["request"] in failing)
    assert all(row["output_len"] == len(expected[row["request"]]) for row in rows)
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_what_failed_is_said_of_the_run_and_stays_in_its_folder(executors, tmp_path):
    run, _ = serve(executors[1], workload(), LIMITS)
    run.write(tmp_path / "run")
    assert read_run(tmp_path / "run").tables["requests"].equals(run.tables["requests"])
    (sentence,) = missing_sentences(not_completed(run), 20)
    assert "of 20 requests failed: the model's logits are not numbers (NaN)" in sentence


def test_a_client_is_told_so_and_gets_no_token_of_it_while_another_is_served(executors):
    engine = Engine(ExecutorDriver(executors[1], LIMITS, keep_prompts=False))
    failing, other = engine.ask([5, 6, POISON]), engine.ask([5, 6, 7], 2)
    assert engine.answer(failing) == ([], "failed", NOT_NUMBERS)
    tokens, outcome, _ = engine.answer(other)
    assert (len(tokens), outcome) == (2, "length")
    assert [row["outcome"] for row in engine.close().tables["requests"].to_pylist()] == ["failed", "length"]
