"""What a policy is: a digest of each file that its decisions are written in, so that a run tells which it had."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from engine.scheduler.base import Scheduler
from engine.scheduler.user_policy import is_users

DIGITS = 16


@cache
def source_digests(policy: type[Scheduler]) -> dict[str, str]:
    """Of the file of a policy's class and, where that is the user's, of the user's files that it builds on.

    They are as they were when this was asked first, which is when the policy was imported: later edits are not in it.

    Returns:
        {file: digest}; empty for a class that is in no file.
    """
    modules = _modules(policy).items()
    return {_file_name(name): _digest(file) for name, module in modules if (file := _file(module))}


def _file(module: ModuleType) -> Path | None:
    """Of a module's source; what is typed into a notebook has none."""
    file = Path(getattr(module, "__file__", None) or "")
    return file if file.is_file() else None


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()[:DIGITS]


def _file_name(module: str) -> str:
    """`aging.py`, `package/aging.py`, wherever that is; a module that was loaded as a file is called by its path."""
    return Path(module).name if module.endswith(".py") else f"{module.replace('.', '/')}.py"


def _modules(policy: type[Scheduler]) -> dict[str, ModuleType]:
    bases = [each.__module__ for each in policy.__mro__ if issubclass(each, Scheduler)]
    own = [name for name in bases if not name.startswith("engine.scheduler.")]
    found: dict[str, ModuleType] = {}
    todo = [sys.modules[name] for name in own or bases[:1]]
    while todo:
        module = todo.pop()
        if module.__name__ not in found:
            found[module.__name__] = module
            todo += [each for each in _imported(module) if is_users(getattr(each, "__file__", None) or "")]
    return found


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that a module's source imports, of those that are loaded."""
    file = _file(module)
    for node in ast.walk(ast.parse(file.read_bytes())) if file else ():
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(origin, module.__package__) if node.level else origin
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (sys.modules[name] for name in names if name in sys.modules)
