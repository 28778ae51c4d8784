"""A model's config, whose values are checked as they are read: each fault is one line that names the field."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.model.files import shown
from traces.errors import TandemError

MOST = 2**31 - 1  # token ids, positions and rows are 32-bit numbers on the GPU


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a config under Hugging Face's names. A null is a field that is not there.

    Attributes:
        values: as they were parsed, of any type.
        where: file or model, for errors.
        keys: what the file calls a field, where that is not Hugging Face's name.
    """

    values: Mapping[str, Any]
    where: str
    keys: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """A value that may be anything."""
        return self.values.get(name)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 to `MOST`."""
        value = self._given(name, default)
        if type(value) is not int or value < 1:
            raise self.fault(name, "must be a whole number of at least 1", value)
        if value > MOST:
            raise self.fault(name, f"must be {MOST:,} or less", value)
        return value

    def number(self, name: str, most: float, default: float | None = None) -> float:
        """A number above 0, at most `most`."""
        value = self._given(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.fault(name, "must be a number above 0", value)
        if value > most:
            raise self.fault(name, f"must be {most:g} or less", value)
        return float(value)

    def _given(self, name: str, default: Any) -> Any:
        value = self.get(name)
        return default if value is None else value

    def flag(self, name: str) -> bool:
        """True or false; false if it is not there."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.fault(name, "must be true or false", value)
        return bool(value)

    def text(self, name: str) -> str | None:
        """Text, or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fault(name, "must be text", value)
        return value

    def texts(self, name: str) -> list[str]:
        """A list of text, none if it is not there; text alone is a list of one."""
        value = self.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise self.fault(name, "must be a list of text", value)
        return found

    def inner(self, name: str) -> Fields:
        """The fields of an object in it; none if it is not there."""
        value = self._given(name, {})
        if not isinstance(value, dict):
            raise self.fault(name, "must be an object", value)
        return Fields(value, self.where, {key: f"{name}.{key}" for key in value} | dict(self.keys))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, or a list of them."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and 0 <= each <= MOST for each in ids):
            raise self.fault(name, "must be a token id or a list of token ids", value)
        return tuple(ids)

    def fault(self, name: str, expected: str, value: Any) -> TandemError:
        """The error of a field that has another value than `expected`."""
        return TandemError(f"{self.name_of(name)} {expected}, not {reprlib.repr(value)}; see the model's config")

    def refusal(self, name: str, why: str) -> TandemError:
        """The error of a field whose value makes it a model that does not run."""
        return TandemError(f"{self.name_of(name)} is {reprlib.repr(self.get(name))}; {why}")

    def name_of(self, name: str) -> str:
        """The field's place, for errors."""
        return f"{self.where}: {shown(self.keys.get(name, name))}"
