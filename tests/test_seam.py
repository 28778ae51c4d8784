"""The seam: what may import what, what a scheduler may know, and that simulated time is never host time."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from shadow import serve

import engine
from engine.backend import drive
from engine.config import ServingConfig
from engine.planner import PolicyError
from engine.request import Request
from engine.scheduler import POLICIES, load_scheduler
from engine.scheduler.policies.fcfs import Fcfs
from engine.step import Step
from traces.request import TraceRequest

ROOT = Path(engine.__file__).parents[1]
LAYERS = (
    ("traces",),
    ("engine",),  # its root: the seam and its nouns
    ("engine.scheduler", "engine.records", "engine.checks", "engine.model"),
    ("engine.instance",),
    ("engine.executor", "engine.server"),
    ("sim", "sim.profile"),  # the simulator
    ("sim.profiling", "sim.sources"),
    ("analysis.metrics",),
    ("analysis.comparison",),
    ("analysis.report",),
    ("analysis.jobs",),
    ("analysis.notebook",),
    ("analysis.client",),
    ("analysis.bench",),
    ("analysis.cli",),
)
"""Who may import whom: those of its own layer, and of the layers before it."""

SOURCES = sorted(path for package in ("engine", "sim", "traces", "analysis") for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Tandem's modules that a file imports, at load, in a function, or for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def layer(module: str) -> int:
    """The number of a module's layer: the one that says most of it."""
    prefixes = [(len(each), number) for number, names in enumerate(LAYERS) for each in names if inside(module, each)]
    return max(prefixes)[1] if prefixes else 0


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    wrong = [each for each in imports(MODULES[module]) if layer(each) > layer(module)]
    assert not wrong, f"{module} imports {wrong}"


def test_no_imports_go_in_a_circle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    order = TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


def test_comparisons_know_no_words_and_jobs_no_command_line():
    for module, path in MODULES.items():
        foreign = {name.split(".")[0] for name, _ in runtime_imports(path)}
        if inside(module, "analysis.comparison") or inside(module, "analysis.metrics"):
            assert not foreign & {"rich", "typer", "jinja2", "plotly"}, module
        if inside(module, "analysis.jobs"):
            assert "typer" not in foreign, module


def test_only_jobs_build_executors():
    for module, path in MODULES.items():
        if "engine.executor.executor" in {name for name, _ in runtime_imports(path)}:
            assert inside(module, "analysis.jobs") or inside(module, "engine"), module


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


def runtime_imports(path: Path) -> list[tuple[str, bool]]:
    visitor = RuntimeImports()
    visitor.visit(ast.parse(path.read_text()))
    return visitor.found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_in_the_executor(path):
    place = str(path.relative_to(ROOT))
    if place.startswith(("engine/executor/", "engine/server/", "analysis/bench/kernels.py")):
        return
    for module, at_load in runtime_imports(path):
        heavy = module.split(".")[0] in ("torch", "triton", "transformers") or module.startswith("engine.executor")
        lazy = not at_load and place.startswith(("sim/profiling/", "analysis/jobs/"))
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
from engine.backend import drive
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


def test_a_planned_step_cannot_be_changed():
    limits = ServingConfig(num_blocks=8, block_size=4, max_seqs=2, max_batched_tokens=16, max_model_len=24)
    scheduler = load_scheduler(limits)
    scheduler.arrive(Request.from_trace(TraceRequest(id=0, arrival_ns=0, prompt_len=5, output_len=9, max_tokens=9)))
    first, joining, steady = (scheduler.schedule(now) for now in range(3))
    assert (
        first and joining and steady and [each.is_steady for each in (first, joining, steady)] == [False, False, True]
    )
    for step in (first, joining, steady):
        assert type(step) is Step
        with pytest.raises(FrozenInstanceError):
            step.decodes = 7


def test_a_wait_that_fails_does_not_end_a_run_in_silence():
    class Broken:
        def wait(self):
            raise StopIteration

    with pytest.raises(StopIteration):
        drive(iter_of(Broken()))


def iter_of(waitable):
    yield waitable
