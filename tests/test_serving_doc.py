"""What docs/serving.md shows is what happens: its commands and programs run in order, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from served import Server

from engine.records.run_folder import read_run

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs/serving.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", DOC, re.DOTALL)


class Reader:
    """Somebody who types it all in. A server that is started ends the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Server | None = None
        self.said: list[str] = []

    def follow(self, language: str, text: str) -> None:
        if language == "python":
            self.run([sys.executable, "-c", self.here(text)])
        for line in text.splitlines() if language == "bash" else ():
            program, *args = shlex.split(self.here(line))
            if (program, args[0]) == ("tandem", "serve"):
                self.stop()
                self.server = Server(*args[1:], cwd=self.folder)
            else:
                if "served/" in line:
                    self.stop()
                self.run([str(Path(sys.executable).with_name(program)) if program == "tandem" else program, *args])

    def here(self, text: str) -> str:
        return text.replace("http://127.0.0.1:8000", self.server.url) if self.server else text

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        self.said.append(done.stdout)

    def stop(self) -> None:
        if self.server and self.server.process.poll() is None:
            assert self.server.stop() == 0


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    try:
        for language, text in BLOCKS:
            reader.follow(language, text)
        yield reader
    finally:
        reader.stop()


def test_everything_runs_and_says_what_the_text_says(reader):
    said = "\n".join(reader.said)
    assert " The quick brown fox" in said and "Paris" in said
    assert "data: [DONE]" in said and '{"status":"ok"}' in said and "vllm:kv_cache_usage_perc" in said
    assert "Added by the server's path" in said


def test_it_leaves_the_runs_that_the_text_speaks_of(reader):
    for name in ("in-process", "served", "client", "again"):
        assert read_run(reader.folder / name).summary["completed"] == 30
    workloads = [read_run(reader.folder / name).manifest["workload"] for name in ("served", "again")]
    assert workloads[0] == workloads[1]


def test_every_file_and_option_it_names_exists():
    options = set(re.findall(r"`(--[\w-]+)", DOC))
    known = "".join(
        subprocess.run(
            [Path(sys.executable).with_name("tandem"), *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "TERM": "dumb"},
        ).stdout
        for command in (["serve"], ["load"])
    )
    assert options and all(option in known for option in options)
