"""Which names of this server a client may use.

A web page can have its own name lead to this machine (DNS rebinding), and then read what it likes of a server without a
key. Its requests have that name in `Host`. An address in `Host` cannot be such a page's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

ANY = "*"


class HostCheck:
    """Says whether a `Host` is one of this server's.

    Always: an address, `localhost`, the name it listens on, and the names that are allowed. Where it listens for other
    machines: this machine's name, and names without a dot, as containers have.
    """

    def __init__(self, listens_on: str, allowed: Sequence[str] = ()) -> None:
        self._local = _is_local(listens_on)
        names = (listens_on, *allowed, *(() if self._local else (socket.gethostname(),)))
        self._names = {name.lower().rstrip(".") for name in names}
        self.allows = lru_cache(maxsize=64)(self._allows)

    def _allows(self, host: bytes) -> bool:
        try:
            name = (urlsplit(f"//{host.decode('ascii')}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if _is_local(name) or name in self._names or ANY in self._names:
            return True
        return _is_address(name) or (not self._local and name != "" and "." not in name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost") or (_is_address(name) and ip_address(name).is_loopback)
