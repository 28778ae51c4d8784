"""Synthetic workloads: seeded lengths from a named distribution, without text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.errors import TandemError
from traces.format import Trace
from traces.request import TraceRequest


def synthetic(n: int, seed: int, prompt: str, output: str) -> Trace:
    """A trace of `n` requests, all at time 0, with lengths drawn from two distributions.

    A distribution is written `fixed:LENGTH`, `uniform:LOW:HIGH` (both included), or `lognormal:MU:SIGMA` (of the
    natural logarithm of the length in tokens, rounded, at least 1). Prompts and outputs have random streams of their
    own: changing one distribution leaves the other's lengths as they were.

    Raises:
        TandemError: a distribution is misspelt or gives lengths below 1 or over 2**31 - 1; or `n` is 0.
    """
    streams = np.random.SeedSequence(seed).spawn(2)
    prompt_lens, output_lens = (
        _draw_lengths(spec, n, np.random.Generator(np.random.PCG64(stream))).tolist()
        for spec, stream in zip((prompt, output), streams, strict=True)
    )
    requests = [
        TraceRequest(id=position, arrival_ns=0, prompt_len=prompt_len, output_len=output_len, max_tokens=output_len)
        for position, (prompt_len, output_len) in enumerate(zip(prompt_lens, output_lens, strict=True))
    ]
    return Trace(requests, {"source": "synthetic", "seed": seed, "prompt": prompt, "output": output})


def draw_length(spec: str, seed: int, number: int) -> int:
    """The length of request `number` alone, from a distribution written as above: whoever else there is.

    Raises:
        TandemError: as `synthetic` does.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    return int(_draw_lengths(spec, 1, generator)[0])


def _draw_lengths(spec: str, n: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    try:
        return _checked(_draw(spec, n, generator))
    except (ValueError, OverflowError) as error:
        raise TandemError(
            f"length distribution {spec!r} ({error}): write fixed:LENGTH, uniform:LOW:HIGH or lognormal:MU:SIGMA"
        ) from None


def _draw(spec: str, n: int, generator: np.random.Generator) -> npt.NDArray[np.float64 | np.int64]:
    match spec.split(":"):
        case ["fixed", length]:
            return np.full(n, int(length), dtype=np.int64)
        case ["uniform", low, high]:
            return generator.integers(int(low), int(high), n, endpoint=True)
        case ["lognormal", mu, sigma]:
            return np.maximum(np.rint(generator.lognormal(float(mu), float(sigma), n)), 1)
    raise ValueError("unknown")


def _checked(lengths: npt.NDArray[np.float64 | np.int64]) -> npt.NDArray[np.int64]:
    if not ((lengths >= 1) & (lengths < 2**31)).all():
        raise ValueError("lengths must be from 1 to 2**31 - 1")
    return lengths.astype(np.int64)
