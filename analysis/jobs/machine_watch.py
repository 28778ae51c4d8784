"""What a machine did besides a run: its load, what the hypervisor took from it, and other processes' share.

Read once before the run and once after it, so that watching costs the run nothing.
"""

from __future__ import annotations

import os
from typing import Any

import psutil

_TIMES = ("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait")  # `guest` is in `user` already
_OF_NOBODY = ("idle", "iowait", "steal")


class MachineWatch:
    """Watches from its making on."""

    def __init__(self) -> None:
        self._load = _load()
        self._before = _times()

    def seen(self) -> dict[str, Any]:
        """What was seen since.

        Returns:
            `cores`; `load_average` [before, after], of the last minute; `steal` and `others`, shares of all CPU time
            that the hypervisor and other processes took; None where the system does not say.
        """
        spent = {name: time - self._before[name] for name, time in _times().items()}
        total, own = sum(spent[name] for name in _TIMES), spent["own"]
        busy = total - sum(spent[name] for name in _OF_NOBODY)
        return {
            "cores": os.cpu_count(),
            "load_average": [self._load, _load()],
            "steal": spent["steal"] / total if total > 0 else None,
            "others": max(0.0, busy - own) / total if total > 0 else None,
        }


def _times() -> dict[str, float]:
    """Seconds of CPU time by what it was spent on, over all CPUs, and this process's `own`."""
    machine, process = psutil.cpu_times(), psutil.Process().cpu_times()
    return {name: getattr(machine, name, 0.0) for name in _TIMES} | {"own": process.user + process.system}


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
