"""A reader who follows a page: runs its commands, in order, and sees what they print."""

from __future__ import annotations

import fcntl
import re
import shlex
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROFILE = re.compile(r"tandem profile --device cpu --out (\S+)")


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return [text for found, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL) if found == language]


def follow(page: Path, folder: Path, measured: Path) -> dict[str, str]:
    """Run a page's `tandem` commands in a folder.

    Args:
        page: Markdown.
        folder: where they run.
        measured: a folder for profiles: what one page has measured need not be measured for the next.

    Returns:
        What each command printed.
    """
    printed = {}
    for command in "".join(blocks(page, "bash")).splitlines():
        program, *args = shlex.split(command)
        if program != "tandem":
            continue
        if made := PROFILE.match(command):
            _measure_once(args, folder / made[1], measured / sha256(command.encode()).hexdigest())
            continue
        done = _tandem(args, folder)
        judges = args[0] == "compare" and "Outside the error allowed" in done.stdout  # which a machine's noise decides
        assert done.returncode == judges, f"{command}\n{done.stderr}"
        printed[command] = done.stdout
    return printed


def _tandem(args: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("tandem")
    return subprocess.run([program, *args], cwd=folder, capture_output=True, text=True, check=False)


def _measure_once(args: list[str], profile: Path, kept: Path) -> None:
    """Measure a profile, unless it is `kept`; another process that wants it meanwhile waits."""
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            done = _tandem(args, profile.parent)
            assert done.returncode == 0, done.stderr
            profile.rename(kept)
    shutil.copytree(kept, profile)
