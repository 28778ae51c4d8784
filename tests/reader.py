"""A reader who follows a page: runs its commands, in order, and sees what they print."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROFILE = re.compile(r"tandem profile --out (\S+) ")


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return [text for found, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL) if found == language]


def follow(page: Path, folder: Path, measured: dict[str, Path]) -> dict[str, str]:
    """Run a page's `tandem` commands in a folder.

    Args:
        page: Markdown.
        folder: where they run.
        measured: profiles by the command that made them: what one page has measured need not be measured for the next.

    Returns:
        What each command printed.
    """
    printed = {}
    for command in "".join(blocks(page, "bash")).splitlines():
        program, *args = shlex.split(command)
        if program != "tandem":
            continue
        if command in measured:
            shutil.copytree(measured[command], folder / measured[command].name)
            continue
        done = subprocess.run(
            [Path(sys.executable).with_name("tandem"), *args], cwd=folder, capture_output=True, text=True, check=False
        )
        judges = args[0] == "compare" and "Outside the error allowed" in done.stdout  # which a machine's noise decides
        assert done.returncode == judges, f"{command}\n{done.stderr}"
        printed[command] = done.stdout
        if made := PROFILE.match(command):
            measured[command] = folder / made[1]
    return printed
