"""What docs/profiles.md shows is what happens: its commands run in order, and print what stands below them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?",
    (Path(__file__).parents[1] / "docs/profiles.md").read_text(),
    re.DOTALL,
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[tuple[str, str]]:
    """By block: what its last command printed, and what the page says it prints."""
    folder = tmp_path_factory.mktemp("reader")
    return [(_followed(commands, folder), expected) for commands, expected in BLOCKS]


def _followed(commands: str, folder: Path) -> str:
    for command in commands.splitlines():
        asked, *may_fail = command.split(" || ")
        program, *args = shlex.split(asked)
        assert program == "tandem"
        tandem = Path(sys.executable).with_name(program)
        done = subprocess.run([tandem, *args], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or (may_fail and done.returncode == 1), f"{command}\n{done.stderr}"
    return done.stdout + done.stderr


def words(text: str) -> list[str]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_the_commands_print_what_the_page_shows(printed):
    shown = [(ours, theirs) for ours, theirs in printed if theirs]
    assert shown
    for ours, theirs in shown:
        assert words(ours) == words(theirs)
