"""Short names of policies and runs: what tells them apart, without the folders and parameters that they share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names -> short ones, all different.

    `/path/to/mine.py:Aging:ms=1` is `Aging:ms=1` where no other name ends with `Aging`, else `mine.py:Aging:ms=1`. Of
    names that differ in parameters alone, `…` stands for the parameters that all of them have.
    """
    heads = {name: _head(name) for name in names}
    ends = {head: _end(head, {*heads.values()} - {head}) for head in heads.values()}
    short = {name: ":".join([ends[head], *_own(name, heads)]) for name, head in heads.items()}
    return short if len({*short.values()}) == len(short) else {name: name for name in names}


def renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """Nested dictionaries and lists with other names, as keys and in lists."""
    if isinstance(tree, Mapping):
        return {names.get(key, key): renamed(of, names) for key, of in tree.items()}
    if isinstance(tree, list):
        return [names.get(each, each) if isinstance(each, str) else renamed(each, names) for each in tree]
    return tree


def _head(name: str) -> str:
    """What stands before the parameters."""
    return ":".join(part for part in name.split(":") if "=" not in part)


def _end(head: str, others: Collection[str]) -> str:
    """The shortest end of a head, of whole pieces between `/` and `:`, with which no other ends."""
    starts = [found.end() for found in re.finditer(r"^|[/:](?=[^/:])", head)]
    ends = [head[start:] for start in reversed(starts)]
    return next((end for end in ends if not any(_ends_with(other, end) for other in others)), head)


def _ends_with(head: str, end: str) -> bool:
    return f"/{head}".endswith((f"/{end}", f":{end}"))


def _own(name: str, heads: Mapping[str, str]) -> list[str]:
    """The parameters of a name that not all names of its head have."""
    alike = [{*other.split(":")} for other, head in heads.items() if head == heads[name]]
    parameters = [part for part in name.split(":") if "=" in part]
    own = [part for part in parameters if len(alike) == 1 or not all(part in parts for parts in alike)]
    return own if len(own) == len(parameters) else ["…", *own]
