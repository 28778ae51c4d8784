"""What a machine did besides a run: its load, what the hypervisor took from it, and other processes' share.

Read once before the run and once after it, so that watching costs the run nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

LOUD = 0.02  # shares of the CPUs from which something is worth naming
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


# -- words -------------------------------------------------------------------------------------------------


def seen_sentences(machines: Mapping[str, Mapping[str, Any] | None]) -> Iterator[str]:
    """What was seen during each of several runs.

    Args:
        machines: by the run's name, as `MachineWatch.seen` returns it; None where nothing is on record.
    """
    for name, seen in machines.items():
        yield f"During {name}: {_words(seen) if seen else 'not recorded what else the machine did'}."


def _words(seen: Mapping[str, Any]) -> str:
    shares = {"other processes took": seen["others"], "the hypervisor took (steal)": seen["steal"]}
    told = [f"{who} {share:.0%} of the CPU time" for who, share in shares.items() if share and share >= LOUD]
    load = [each for each in seen["load_average"] if each is not None]
    if load:
        told.append(f"load average up to {max(load):.1f} on {seen['cores']} cores")
    return ", ".join(told) or "nothing to see on the CPUs"
