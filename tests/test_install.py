"""The package as it is installed: a wheel without the extras simulates, and says which extra a command needs.

The wheel is unpacked, and this environment's extras are hidden from it. `.ci/run` installs it into a fresh environment
too, whose Python TANDEM_FRESH_PYTHON names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

from analysis.cli.main import EXTRAS

ROOT = Path(__file__).parents[1]
MODULES = {"nvidia-ml-py": "pynvml", "protobuf": "google"}  # where it is not the distribution's name
WITH_TYPER = {"pydantic"}  # needs it as well
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Absent())
"""


def absent() -> dict[str, str]:
    """Module -> extra, of all that `pip install tandem-llm` alone does not bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[]", each)[0]: extra for extra in ("engine", "serve") for each in extras[extra]}
    return {MODULES.get(name, name).replace("-", "_"): extra for name, extra in names.items() if name not in WITH_TYPER}


@dataclass(frozen=True)
class Installed:
    """An interpreter that has the wheel and not the extras.

    Attributes:
        interpreter: the program.
        prologue: runs first.
        path: the wheel's contents, where it is not installed.
    """

    interpreter: str
    prologue: str = ""
    path: str = ""

    def python(self, work: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a program in a folder of one's own."""
        command = [self.interpreter, "-c", f"{self.prologue}\n{program}", *args]
        at = {"cwd": work, "env": {"PYTHONPATH": self.path}}
        return subprocess.run(command, **at, capture_output=True, text=True, check=False, timeout=300)

    def tandem(self, work: Path, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.python(work, "import sys; del sys.path[0]\nfrom analysis.cli.main import main; main()", *args)


@pytest.fixture(scope="module", params=["unpacked", "fresh"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    if request.param == "fresh":
        if not (fresh := os.environ.get("TANDEM_FRESH_PYTHON")):
            pytest.skip("TANDEM_FRESH_PYTHON names no environment that has the wheel alone")
        return Installed(fresh)
    prologue = WITHOUT.format(absent={*absent(), "triton", "starlette"})
    return Installed(sys.executable, prologue, str(unpacked_wheel(tmp_path_factory)))


def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, built here without a package index."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for each in ("engine", "sim", "traces", "analysis", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / each).is_dir() else shutil.copy)(ROOT / each, source / each)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, folder, source], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_all_that_an_extra_brings_is_known():
    assert absent().items() <= EXTRAS.items()


def test_a_wheel_without_extras_simulates_and_compares_policies(installed, tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0.1, "prompt_len": 100, "output_len": 20}\n' * 40)
    asked = ("simulate", "--trace", "trace.jsonl", "--profile", "h100-80gb/llama-3-8b", "--out")
    alone, compared = (installed.tandem(tmp_path, *asked, *more) for more in (("one",), ("two", "--against", "fcfs")))
    assert (alone.returncode, compared.returncode) == (0, 0), alone.stderr + compared.stderr
    assert "TTFT" in alone.stdout


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("run --trace trace.jsonl --model llama-3.2-1b --load-format dummy --out run", "torch, engine"),
        ("serve --profile h100-80gb/llama-3-8b", "fastapi, serve"),
        ("load --url http://127.0.0.1:1 --trace trace.jsonl --out run", "httptools, serve"),
    ],
)
def test_a_command_that_needs_an_extra_says_which(installed, tmp_path, asked, said):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0.1, "prompt_len": 100, "output_len": 20}\n')
    done, (module, extra) = installed.tandem(tmp_path, *asked.split()), said.split(", ")
    assert done.returncode == 2
    assert done.stderr == f"tandem: this needs {module}, which is not installed: pip install 'tandem-llm[{extra}]'\n"


def test_the_lines_for_a_notebook_do_what_their_page_shows(installed, tmp_path):
    page = (ROOT / "docs/notebook.md").read_text()
    program, printed = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text"))
    done = installed.python(tmp_path, program)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    assert (tmp_path / "cdf.html").stat().st_size > 1e6


def test_files_of_ones_own_are_not_taken_for_the_packages(installed, tmp_path):
    own = ("traces", "analysis", "engine", "sim", "pandas", "plotly", "rich", "resource")
    for name in own:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user')")
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "docs/examples/aging.py", tmp_path / "aging.py")
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0.1, "prompt_len": 100, "output_len": 20}\n' * 40)
    asked = ("--trace", "trace.jsonl", "--profile", "h100-80gb/llama-3-8b", "--scheduler", "aging:ShortestWithAging")
    done = installed.tandem(tmp_path, "simulate", *asked, "--against", "sjf", "--check", "--out", "out")
    assert done.returncode == 0, done.stderr


def test_the_traces_that_ship_are_found_by_name_and_every_package_is_typed(installed, tmp_path):
    assert installed.tandem(tmp_path, "trace", "show", "sharegpt-lengths").returncode == 0
    typed = "import {0}, pathlib; assert pathlib.Path({0}.__file__).with_name('py.typed').exists()"
    for package in ("engine", "sim", "traces", "analysis"):
        assert installed.python(tmp_path, typed.format(package)).returncode == 0
