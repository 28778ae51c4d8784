"""Errors as clients get them: OpenAI's error object, in the API's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError", 429: "RateLimitError"}

# Pydantic's type of a mistake -> our words.
_WORDS = {
    "missing": "is missing",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object"),
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    **dict.fromkeys(("string_too_short", "too_short"), "must not be empty"),
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}
_BRANCHES = ("str", "int", "float", "bool")  # of a union, where a place in the body could stand


class ErrorDetail(BaseModel):
    """OpenAI's."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class Refused(HTTPException):
    """A request that gets an error for an answer; `param` is the field that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        name = _TYPES.get(self.status_code, "InternalServerError" if self.status_code >= 500 else "BadRequestError")
        return {"error": {"message": self.detail, "type": name, "param": self.param, "code": self.status_code}}

    def response(self) -> Response:
        """The answer. In ASCII, since a message may quote half a surrogate pair."""
        return Response(json.dumps(self.body), self.status_code, self.headers, "application/json")


def invalid(mistakes: Sequence[Mapping[str, Any]]) -> Refused:
    """A refusal from pydantic's errors: of a union's branches, those that came furthest into the body."""
    field = mistakes[0]["loc"][:1]
    found = [(_place(each["loc"]), _words(each)) for each in mistakes if each["loc"][:1] == field]
    place = max((place for place, _ in found), key=len)
    words = dict.fromkeys(words for each, words in found if each == place)
    return Refused(400, f"{place or 'the body'} {' or '.join(words)}", place or None)


def _place(location: Sequence[str | int]) -> str:
    """Such as `messages[0].content`."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _BRANCHES:
            place += f".{part}" if place else part
    return place


def _words(mistake: Mapping[str, Any]) -> str:
    return _WORDS.get(mistake["type"], "is not valid").format_map(mistake.get("ctx", {}))
