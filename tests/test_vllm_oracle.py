"""vLLM's own decisions, step by step, are what Tandem decides under the option that claims it."""

from __future__ import annotations

import pytest
from vllm_logs import FIELDS, LISTS, config_of, decisions, logged, merged, read_case

ADMIT = {"true": "whole", "false": "first_chunk"}


def under(stem: str, case: int, mode: str, scheduler: str | None = None) -> tuple[list[dict], list[dict]]:
    """vLLM's decisions and ours; free blocks are in the logs of one step in flight only."""
    log, depth = read_case(stem, case), 2 if mode.startswith("async") else 1
    if scheduler is None:
        scheduler = "vllm_priority" if log["config"]["policy"] == "priority" else "vllm"
    ours = decisions(log, config_of(log, scheduler, depth, ADMIT[mode.rpartition("=")[2]]))
    fields = FIELDS if depth == 1 else FIELDS[:-1]
    return tuple([{name: step[name] for name in fields} for step in merged(each)] for each in (logged(log, mode), ours))


@pytest.mark.parametrize(("stem", "case", "mode"), LISTS)
def test_vllm_is_decision_equal_to_vllm(stem, case, mode):
    theirs, ours = under(stem, case, mode)
    assert theirs == ours


def test_there_are_logs_of_every_kind():
    assert len(LISTS) >= 40
    assert {mode.partition(",")[0] for _, _, mode in LISTS} == {"sync", "async"}


def equal_to_vllm(stem: str, scheduler: str) -> list[bool]:
    lists = [(case, mode) for each, case, mode in LISTS if each == stem and mode.startswith("sync")]
    return [theirs == ours for theirs, ours in (under(stem, case, mode, scheduler) for case, mode in lists)]


@pytest.mark.parametrize("stem", sorted({stem for stem, _, _ in LISTS if stem[:2] <= "07" or stem[:2] == "12"}))
def test_chunked_prefill_is_vllm_with_one_step_in_flight_but_for_what_prefix_caching_shares(stem):
    assert all(equal_to_vllm(stem, "chunked_prefill"))


@pytest.mark.parametrize("stem", ["08-prefix-same-step", "09-prefix-outputs", "11-priority"])
def test_the_other_policies_differ_from_vllm_where_the_page_says_so(stem):
    assert not all(equal_to_vllm(stem, "priority" if stem == "11-priority" else "chunked_prefill"))


def test_the_old_rule_of_admission_is_what_vllm_decides_without_its_gate():
    theirs, ours = under("06-full-isl-thrash", 0, "sync, scheduler_reserve_full_isl=false", "chunked_prefill")
    assert theirs == ours and sum(len(step["preempted"]) for step in ours) == 31


def test_a_log_that_is_changed_is_not_equal():
    theirs, ours = under("04-full-isl-new", 1, "sync, scheduler_reserve_full_isl=true")
    theirs[-1]["decodes"] = theirs[-1]["decodes"][1:]
    assert theirs != ours
