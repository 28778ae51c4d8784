"""The two ways to use the executor, as their examples show them: they run, and agree on what the model says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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
