"""The package as it is installed: a wheel without the extras simulates, and says which extra a command needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for each in ("engine", "sim", "traces", "analysis", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / each).is_dir() else shutil.copy)(ROOT / each, source / each)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, folder, source], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def python(installed: Path, work: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the wheel, with a folder of one's own as working directory."""
    command = [sys.executable, "-c", f"{WITHOUT.format(absent={*absent(), 'triton', 'starlette'})}\n{program}", *args]
    path = {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=work, env=path, capture_output=True, text=True, check=False, timeout=300)


def tandem(installed: Path, work: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return python(installed, work, "from analysis.cli.main import main; main()", *args)


def test_all_that_an_extra_brings_is_known():
    assert absent().items() <= EXTRAS.items()


def test_a_wheel_without_extras_simulates_and_compares_policies(installed, tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0.1, "prompt_len": 100, "output_len": 20}\n' * 40)
    asked = ("simulate", "--trace", "trace.jsonl", "--profile", "h100-80gb/llama-3-8b", "--out")
    alone, compared = (tandem(installed, tmp_path, *asked, *more) for more in (("one",), ("two", "--against", "fcfs")))
    assert (alone.returncode, compared.returncode) == (0, 0), alone.stderr + compared.stderr
    assert "mean_ttft_ms" in alone.stdout


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
    done, (module, extra) = tandem(installed, tmp_path, *asked.split()), said.split(", ")
    assert done.returncode == 2
    assert done.stderr == f"tandem: this needs {module}, which is not installed: pip install 'tandem-llm[{extra}]'\n"


def test_the_lines_for_a_notebook_do_what_their_page_shows(installed, tmp_path):
    page = (ROOT / "docs/notebook.md").read_text()
    program, printed = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text"))
    done = python(installed, tmp_path, program)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    assert (tmp_path / "cdf.html").stat().st_size > 1e6
