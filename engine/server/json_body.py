"""A request's body: JSON, of which so much is read that no body holds the server up, nor fills its memory.

The content type must say JSON: a web page cannot send that to another site unasked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import jiter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine.server.refused import Refused, invalid

SMALL = 2**16  # bytes of a body that may hold whatever fits
MOST_VALUES = 2**20  # in lists, and strings: a tenth of a second to read
MOST_FIELDS = 2**15  # of objects, and objects and lists

_BOM = b"\xef\xbb\xbf"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_ALL_BUT_STRUCTURE = bytes(set(range(256)) - set(b"[{:"))

# Words of the parser's messages -> ours.
_FAULTS = {
    "duplicate key": "gives a field twice",
    "recursion limit": "is nested too deeply",
    "number out of range": "has a number that is too long",
    "hex escape": "has half a surrogate pair, or another escape that is no character",
    "invalid unicode": "is not UTF-8",
}


def read_json(body: bytes) -> dict[str, Any]:
    """The fields of a body. Raises `Refused` if it is not one JSON object, or has too many values to read at once."""
    if len(body) > SMALL:
        _check_values(body)
    try:
        given = jiter.from_json(body.removeprefix(_BOM), allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise Refused(400, f"the body {_fault(str(error)) if body else 'is empty: send JSON'}") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body must be an object")
    return given


def _fault(message: str) -> str:
    """The parser's message in our words."""
    fault = next((ours for theirs, ours in _FAULTS.items() if theirs in message), "is not JSON")
    place = re.search(r"line (\d+) column (\d+)", message)
    return f"{fault} (line {place[1]}, column {place[2]})" if place else fault


def _check_values(body: bytes) -> None:
    """Count before anything is built. What stands in strings is counted too, unless that makes it too much."""
    if body.count(b'"') <= MOST_VALUES and not _is_within(body):
        body = _STRING.sub(b"", body)
    if body.count(b'"') > MOST_VALUES or not _is_within(body):
        message = f"the body has more than {MOST_VALUES} values, or {MOST_FIELDS} lists, objects and fields of objects"
        raise Refused(400, message)


def _is_within(body: bytes) -> bool:
    return body.count(b",") <= MOST_VALUES and len(body.translate(None, _ALL_BUT_STRUCTURE)) <= MOST_FIELDS


class JsonRoute(APIRoute):
    """A route whose one parameter, `body`, is a request's fields, read by `read_json` and checked by pydantic.

    FastAPI's own way would build a list of a million mistakes. It writes the OpenAPI description.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As in `APIRoute`."""
        kind: type[BaseModel] = get_type_hints(self.endpoint)["body"]

        async def read_and_answer(request: Request) -> Response:
            fields = await _read(request)
            try:
                body = kind.model_validate(fields)
            except ValidationError as error:
                raise invalid(error.errors(include_url=False, include_input=False)) from None
            answer: Response = await self.endpoint(body)
            return answer

        return read_and_answer


async def _read(request: Request) -> dict[str, Any]:
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Refused(400, "the client is gone") from None
    _check_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
    return read_json(body)


def _check_type(content_type: str | None, encoding: str | None) -> None:
    if content_type is None:
        raise Refused(415, "there is no Content-Type: send application/json")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refused(415, f"Content-Type is {kind[:64]!r}: send application/json")
    if encoding not in (None, "", "identity"):
        raise Refused(415, f"Content-Encoding is {encoding[:64]!r}: send the body as it is")
