"""A user's own policy: imported from a module or a file, and looked over before it runs, so that a mistake is one line.

Every complaint says where it is and what to do. What comes to light only while a policy runs is for `blame`. What a
policy is, Tandem's or the user's, a run tells by a digest of each file that its decisions are written in.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.planner import PolicyError
from engine.scheduler.base import Scheduler
from engine.scheduler.policies.fcfs import Fcfs
from engine.scheduler.policy_error import called
from traces.errors import TandemError

ROOT = Path(__file__).parents[2]
_NOT_USERS = (*(ROOT / each for each in ("engine", "sim", "traces", "analysis")), Path(sysconfig.get_path("stdlib")))
_INSTALLED = {"site-packages", "dist-packages"}
_DIGITS = 16  # of a file's digest
_LIBRARIES = len(sys.path)  # entries of the path, before any of the user's


def is_users(file: str) -> bool:
    """Whether a source file is the user's: not Tandem's, not Python's, not that of an installed package."""
    path = Path(file).resolve()
    installed = not _INSTALLED.isdisjoint(path.parts) or any(map(path.is_relative_to, _NOT_USERS))
    return path.suffix == ".py" and not installed


def import_policy(source: str, class_name: str) -> type[Scheduler]:
    """Find a policy's class.

    Args:
        source: a module, looked for where the user stands too, or the path of a `.py` file.
        class_name: of a class in it.

    Raises:
        TandemError: it cannot be imported, has no such class, or the class is no policy or not a whole one.
    """
    module = _import(source)
    found = getattr(module, class_name, None)
    if found is None:
        raise TandemError(f"{source} has no class '{class_name}'{_others(module, class_name)}")
    if not (isinstance(found, type) and issubclass(found, Scheduler)):
        raise TandemError(f"{source}: {class_name} is not a Scheduler; derive it from engine.scheduler.Scheduler")
    if lacking := sorted(found.__abstractmethods__):
        methods = " and ".join(f"{name}({', '.join(_arguments(getattr(found, name)))})" for name in lacking)
        raise PolicyError(f"{called(found)} has no {methods}: write that method")
    return found


# -- importing -------------------------------------------------------------------------------------------------


def _import(source: str) -> ModuleType:
    try:
        return _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    except TandemError:
        raise
    except (Exception, SystemExit) as error:
        raise TandemError(f"cannot import {source}: {_import_fault(source, error)}") from error


def _load_module(name: str) -> ModuleType:
    here, top = Path.cwd(), name.partition(".")[0]
    _look_in(here)
    mine = [each for each in (here / f"{top}.py", here / top / "__init__.py") if each.exists()]
    known = importlib.util.find_spec(top) if mine and top != "__main__" else None
    if known and known.origin not in {str(each) for each in mine}:
        owner = known.origin if known.has_location else "by Python"
        said = f"./{name.replace('.', '/')}.py:Class"
        raise TandemError(f"the name {top} is taken ({owner}): rename {mine[0].relative_to(here)}, or say {said}")
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    """Let modules of a folder be imported. It comes after all libraries: no file there is taken for one of theirs."""
    if str(folder) not in sys.path:
        sys.path.insert(_LIBRARIES, str(folder))


def _load_file(path: Path) -> ModuleType:
    """Import a file under its path as a name, which no module has."""
    if not path.is_file():
        raise TandemError(f"there is no file {path}: give its path from where you stand")
    name = str(path.resolve())
    if name not in sys.modules:
        _look_in(path.resolve().parent)  # for what it imports from beside it
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _import_fault(source: str, error: BaseException) -> str:
    """What kept a module from being imported, and the innermost line of the user's that was running."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
        return f"{error}; run from its folder, or give its file, as path/to/{source}.py:Class"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{each.filename}:{each.lineno} " for each in frames if is_users(each.filename)]
    return f"{lines[-1] if lines else ''}raised {type(error).__name__}: {error}"


def _others(module: ModuleType, class_name: str) -> str:
    """The policies that a module has, or the one whose name is much like the one that it has not."""
    names = [name for name, each in vars(module).items() if _is_policy_of(module, each)]
    if near := get_close_matches(class_name, names, 1):
        return f": did you mean {near[0]}?"
    return f": its policies are {', '.join(names)}" if names else ", and no other policy"


def _is_policy_of(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Scheduler) and value.__module__ == module.__name__


# -- what a policy is ------------------------------------------------------------------------------------------


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
    return sha256(file.read_bytes()).hexdigest()[:_DIGITS]


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


# -- looking over ----------------------------------------------------------------------------------------------


def check_policy(scheduler: Scheduler) -> None:
    """Look over a policy that was made. Raises PolicyError at what cannot work, as a predicate."""
    _check_state(scheduler)
    for name, original in _methods(type(scheduler)):
        mine = getattr(scheduler, name)
        if getattr(mine, "__func__", None) is not original:
            _check_method(name, mine, original)


def uses_unmade(error: Exception) -> bool:
    """Whether a policy's `__init__` failed since it uses what `super().__init__` would have made."""
    return isinstance(error, AttributeError) and isinstance(error.obj, Scheduler) and "_step" not in vars(error.obj)


def _check_state(scheduler: Scheduler) -> None:
    state = vars(scheduler)
    if "_step" not in state:
        raise PolicyError(NO_SUPER)
    for name, value in vars(Fcfs(replace(scheduler.config, num_blocks=1, num_cpu_blocks=0))).items():
        if value is not None and not isinstance(state[name], type(value)):
            kind = type(state[name]).__name__
            raise PolicyError(f"keeps a {kind} in `{name}`, where the base class has its own: choose another name")


NO_SUPER = "does not begin its __init__ with super().__init__(config), which makes what all policies need"


def _methods(policy: type[Scheduler]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods of Tandem's classes that a policy inherits, as they are there."""
    ours = [each for each in policy.__mro__ if each.__module__.startswith("engine.scheduler.")]
    for name in dict.fromkeys(name for each in ours for name in vars(each) if not name.startswith("_")):
        original = next(vars(each)[name] for each in ours if name in vars(each))
        if inspect.isfunction(original):
            yield name, original


def _check_method(name: str, mine: object, original: Callable[..., Any]) -> None:
    """Whether the loop and the base class can call a policy's method in place of theirs."""
    arguments = _arguments(original)
    if not callable(mine):
        raise PolicyError(f"has a `{name}` that is not a method: the base class calls {name}({', '.join(arguments)})")
    if inspect.iscoroutinefunction(mine):
        raise PolicyError(f"has an async {name}, which nobody awaits: leave out async")
    if inspect.isgeneratorfunction(mine) and original.__annotations__.get("return") == "None":
        raise PolicyError(f"has a {name} that yields, so that nothing of it runs: leave out yield")
    try:
        inspect.signature(mine).bind(*arguments)
    except TypeError as error:
        raise PolicyError(f"has a {name} that cannot be called as {name}({', '.join(arguments)}): {error}") from None


def _arguments(method: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]
