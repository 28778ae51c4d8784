"""The programs in docs/examples: those on the executor agree on what the model says, the analysis finds what is there.

What reads a study is run on one in test_fidelity.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


def output(name: str) -> list[str]:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_data_plane_alone_and_with_the_control_plane_make_the_same_text():
    alone = output("forward.py")
    served = [ast.literal_eval(line.split("ms  ", 1)[1]) for line in output("serve.py")]
    assert len(served) == 3
    assert "The capital of France is Paris" in served[0]
    assert "1, 1, 2, 3, 5, 8, 13," in served[1]
    assert alone == "\n".join(served[:2]).splitlines()


@pytest.fixture
def residuals(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import residuals

    return residuals


def steps(residuals, starts: list[float], tokens: list[int]):
    """Steps of 1 ms each, that prefill, as predicted."""
    times, none = np.full(len(starts), 1000.0), np.zeros(len(starts))
    return residuals.Steps(np.array(starts), times, times, none, np.array(tokens), none, np.full(len(starts), True))


def test_what_was_computed_before_comes_to_the_rate_of_the_past_and_fades_while_the_device_idles(residuals):
    busy = [1000.0 * number for number in range(200)]
    rates = residuals.recent_rate(steps(residuals, [*busy, busy[-1] + 41_000.0], [500] * 201), memory_ms=40)
    assert rates[0] == 0 and rates[1] == pytest.approx(0.5 * (1 - np.exp(-1 / 40)))
    assert rates[199] == pytest.approx(0.5, rel=0.01)  # 500 tokens in 1,000 us
    assert rates[200] == pytest.approx(rates[199] * np.exp(-1), rel=0.01)  # after 40 ms without work


def test_the_memory_of_a_device_is_found_where_it_is(residuals):
    generator = np.random.default_rng(0)
    made = steps(residuals, [1000.0 * number for number in range(3000)], list(generator.integers(500, 1099, 3000)))
    slower = made._replace(predicted=made.measured / (1 + residuals.recent_rate(made, memory_ms=40)))
    found = {memory_ms: residuals.memory_correlation(slower, memory_ms) for memory_ms in residuals.MEMORIES_MS}
    assert max(found, key=found.get) == 40 and found[40] == pytest.approx(1)
    assert residuals.memory_correlation(steps(residuals, [0.0], [700]), 40) is None


def test_a_device_between_two_steps_idles_for_what_is_between_them(residuals):
    assert residuals.idle_us(steps(residuals, [0.0, 1000.0, 2500.0], [1, 1, 1])).tolist() == [0, 500]
