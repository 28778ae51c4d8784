"""The seam: what may import what, what a scheduler may know, and that simulated time is never host time."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shadow import serve

import engine
from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler import POLICIES, load_scheduler
from engine.scheduler.policies.fcfs import Fcfs
from engine.scheduler.policy_error import PolicyError
from traces.request import TraceRequest

ROOT = Path(engine.__file__).parents[1]
MAY_IMPORT = {
    "traces": {"traces"},
    "engine": {"traces", "engine"},
    "sim": {"traces", "engine", "sim"},
    "analysis": {"traces", "engine", "sim", "analysis"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[ast.AST, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node, node.module))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for _, module in imports(path):
        top = module.split(".")[0]
        assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{path} imports {module}"


class RuntimeImports(ast.NodeVisitor):
    """Modules imported when the file runs, and whether that is when it is loaded or when a function is called."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []
        self.in_function = False

    def visit_Import(self, node):
        self.found += [(alias.name, not self.in_function) for alias in node.names]

    def visit_ImportFrom(self, node):
        self.found.append((node.module or "", not self.in_function))

    def visit_FunctionDef(self, node):
        outer, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = outer

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_in_the_executor(path):
    place = str(path.relative_to(ROOT))
    if place.startswith(("engine/executor/", "engine/server/")):
        return
    visitor = RuntimeImports()
    visitor.visit(ast.parse(path.read_text()))
    for module, at_load in visitor.found:
        heavy = module.split(".")[0] in ("torch", "triton", "transformers") or module.startswith("engine.executor")
        lazy = not at_load and place in ("sim/profiling/profiler.py", "analysis/jobs/run.py")
        assert not heavy or lazy, f"{place} imports {module}"


def test_importing_the_simulator_loads_neither_torch_nor_triton():
    code = "import sys, sim, traces, sim.simulate; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_scheduler_cannot_see_where_a_request_will_stop():
    source = TraceRequest(0, 0, prompt_len=5, output_len=3, max_tokens=77, predicted_length=4)
    request = Request.from_trace(source)
    seen = {name: getattr(request, name) for name in dir(request) if not name.startswith("__")}
    assert (request.max_tokens, request.predicted_length) == (77, 4)
    assert not hasattr(request, "output_len") and source not in seen.values()


class SlowFcfs(Fcfs):
    def plan(self, now: int) -> None:
        time.sleep(0.002)
        super().plan(now)


def test_simulated_time_does_not_move_when_the_host_is_slow():
    requests = [TraceRequest(i, i * 1_000_000, 20, 10, 10) for i in range(5)]
    config = ServingConfig(num_blocks=50, scheduler="fcfs")
    fast, slow = (serve(requests, config, scheduler=policy(config))[0].tables() for policy in (Fcfs, SlowFcfs))
    assert all(fast[name].equals(slow[name]) for name in fast)


def test_records_do_not_depend_on_pythonhashseed():
    code = f"""
import hashlib, sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_replay import scarce_workload
from shadow import serve
from engine.config import ServingConfig
from engine.scheduler import POLICIES
from traces.request_classes import RequestClass, assign_classes, predict_lengths
from traces.trace import Trace
requests, limits = scarce_workload(60)
classes = [RequestClass(name, ttft_slo_ms=50, e2e_slo_ms=500) for name in "abc"]
requests = predict_lengths(assign_classes(Trace(requests), classes), 0.5).requests
for policy in sorted(POLICIES):
    tables = serve(requests, ServingConfig(**limits, scheduler=policy, pipeline_depth=2))[0].tables()
    print(hashlib.sha256(repr([table.to_pydict() for table in tables.values()]).encode()).hexdigest())
"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(runs) == 1
    digests = runs.pop().split()
    assert len(digests) == len(POLICIES) and len(set(digests)) > len(POLICIES) / 2


class Lazy(Fcfs):
    def plan(self, now: int) -> None:
        """Never runs anything."""


def test_a_policy_that_starves_everyone_is_named_with_its_file_and_line():
    config = ServingConfig(num_blocks=50)
    said = r"Lazy \(.*test_seam\.py:\d+\) plans nothing, but 1 requests wait .*: prefill\(request\) was not called"
    with pytest.raises(PolicyError, match=said):
        serve([TraceRequest(0, 0, 5, 5, 5)], config, scheduler=Lazy(config))


def test_a_policy_of_ones_own_is_found_by_module_and_class(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from engine.scheduler import Scheduler\nclass Mine(Scheduler):\n    def plan(self, now): self.decode()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", None)  # so that what is imported now is forgotten afterwards
    del sys.modules["mine"]
    scheduler = load_scheduler(ServingConfig(num_blocks=5, scheduler="mine:Mine"))
    assert type(scheduler).__name__ == "Mine"
