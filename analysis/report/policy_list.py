"""The policies that ship, listed: what each does, where it is from, and its parameters, as its own code says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import getdoc
from typing import Any

from analysis.report.tables import TextTable
from engine.scheduler.registry import POLICIES, parameters

NOTE = (
    "Choose one with --scheduler, and parameters as in vtc:input_weight=1:output_weight=4. A policy of your own is "
    "module:Class or file.py:Class (docs/policies.md)."
)


def list_policies() -> list[dict[str, Any]]:
    """A row for each policy that ships.

    Returns:
        [{policy, class, rule, source, parameters}]: the first lines of the class's and of its module's docstring, and
        each parameter with its default.
    """
    return [
        {
            "policy": name,
            "class": f"{policy.__module__}:{policy.__name__}",
            "rule": _first_line(policy),
            "source": _first_line(sys.modules[policy.__module__]),
            "parameters": parameters(policy),
        }
        for name, policy in POLICIES.items()
    ]


def policy_list_tables(policies: Sequence[dict[str, Any]]) -> list[TextTable]:
    """The rows of `list_policies` for people."""
    rows = [row for policy in policies for row in _rows(policy)]
    return [TextTable("Policies that ship", NOTE, ("policy", "rule, source, and parameters"), rows, labels=2)]


def _rows(policy: dict[str, Any]) -> list[tuple[str, str]]:
    given = " ".join(f":{name}={default}" for name, default in policy["parameters"].items())
    facts = [policy["rule"], policy["source"], *([f"Parameters: {given}"] if given else [])]
    return [*zip((policy["policy"], "", ""), facts, strict=False)]


def _first_line(documented: object) -> str:
    return (getdoc(documented) or "").partition("\n")[0]
