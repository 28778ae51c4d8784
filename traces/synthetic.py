"""Synthetic workloads: seeded lengths from a named distribution, without text."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from traces.errors import TandemError
from traces.request import TraceRequest
from traces.trace import Trace


def synthetic(n: int, seed: int, prompt: str, output: str, shared_prefixes: int = 0, prefix_len: int = 512) -> Trace:
    """A trace of `n` requests, all at time 0, with lengths drawn from two distributions.

    A distribution is written `fixed:LENGTH`, `uniform:LOW:HIGH` (both included), or `lognormal:MU:SIGMA` (of the
    natural logarithm of the length in tokens, rounded, at least 1). Prompts and outputs have random streams of their
    own: changing one distribution leaves the other's lengths as they were.

    Args:
        n: how many requests.
        seed: of all that is drawn.
        prompt: the distribution of prompt lengths; with prefixes, of the lengths beyond the shared prefix.
        output: the distribution of output lengths.
        shared_prefixes: if not 0, every prompt begins with one of so many prefixes, drawn uniformly, as prompts of that
            many applications would with their system prompts.
        prefix_len: tokens of each prefix.

    Raises:
        TandemError: a distribution is misspelt or gives lengths below 1 or over 2**31 - 1; `n` is 0, or a prefix's
            length or their number is out of range.
    """
    if shared_prefixes < 0 or prefix_len < 1:
        raise TandemError(f"{shared_prefixes} prefixes of {prefix_len} tokens: give 0 or more, of 1 token or more")
    of_prompts, of_outputs, of_prefixes = np.random.SeedSequence(seed).spawn(3)
    lengths = zip(_draw_lengths(prompt, n, of_prompts), _draw_lengths(output, n, of_outputs), strict=True)
    requests = [TraceRequest(place, 0, asked, made, made) for place, (asked, made) in enumerate(lengths)]
    meta = {"source": "synthetic", "seed": seed, "prompt": prompt, "output": output}
    if not shared_prefixes:
        return Trace(requests, meta)
    drawn = np.random.Generator(np.random.PCG64(of_prefixes)).integers(shared_prefixes, size=n).tolist()
    prefixed = [_prefixed(*each, prefix_len) for each in zip(requests, drawn, strict=True)]
    return Trace(prefixed, meta | {"shared_prefixes": shared_prefixes, "prefix_len": prefix_len})


def _prefixed(request: TraceRequest, prefix: int, prefix_len: int) -> TraceRequest:
    prompt_len = prefix_len + request.prompt_len
    return replace(request, prompt_len=prompt_len, hash_ids=array("q", [prefix]), hash_block_size=prefix_len)


def draw_length(spec: str, seed: int, number: int) -> int:
    """The length of request `number` alone, from a distribution written as above: whoever else there is.

    Raises:
        TandemError: as `synthetic` does.
    """
    return _draw_lengths(spec, 1, np.random.SeedSequence([seed, number]))[0]


def _draw_lengths(spec: str, n: int, stream: np.random.SeedSequence) -> list[int]:
    try:
        lengths = _draw(spec, n, np.random.Generator(np.random.PCG64(stream)))
        if not ((lengths >= 1) & (lengths < 2**31)).all():
            raise ValueError("lengths must be from 1 to 2**31 - 1")
        return [int(length) for length in lengths.tolist()]
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
