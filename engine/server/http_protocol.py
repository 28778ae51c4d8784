"""Which protocol uvicorn runs.

Without the names that ours needs of uvicorn, uvicorn's own over h11 serves: it limits heads too, tokens take the long
way, and the other limits are missing.
"""

from __future__ import annotations

import sys
from asyncio import Protocol
from typing import Literal

_NEEDED = ("data_received", "eof_received", "on_headers_complete", "on_message_complete", "send_400_response")


def http_protocol(most_connections: int = sys.maxsize) -> type[Protocol] | Literal["h11"]:
    """The protocol for uvicorn's `http`, for so many connections at once."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"
    if not all(hasattr(HttpToolsProtocol, name) for name in _NEEDED):
        return "h11"
    from engine.server.limited_protocol import LimitedProtocol

    return type("ServerProtocol", (LimitedProtocol,), {"most_connections": most_connections, "idle": {}})
