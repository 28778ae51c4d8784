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
    *streams, prefix_stream = np.random.SeedSequence(seed).spawn(3)
    prompt_lens, output_lens = (
        _draw_lengths(spec, n, np.random.Generator(np.random.PCG64(stream))).tolist()
        for spec, stream in zip((prompt, output), streams, strict=True)
    )
    requests = [
        TraceRequest(id=position, arrival_ns=0, prompt_len=prompt_len, output_len=output_len, max_tokens=output_len)
        for position, (prompt_len, output_len) in enumerate(zip(prompt_lens, output_lens, strict=True))
    ]
    meta = {"source": "synthetic", "seed": seed, "prompt": prompt, "output": output}
    if not shared_prefixes:
        return Trace(requests, meta)
    drawn = np.random.Generator(np.random.PCG64(prefix_stream)).integers(shared_prefixes, size=n).tolist()
    prefixed = [
        replace(
            each, prompt_len=prefix_len + each.prompt_len, hash_ids=array("q", [prefix]), hash_block_size=prefix_len
        )
        for each, prefix in zip(requests, drawn, strict=True)
    ]
    return Trace(prefixed, meta | {"shared_prefixes": shared_prefixes, "prefix_len": prefix_len})


def draw_length(spec: str, seed: int, number: int) -> int:
    """The length of request `number` alone, from a distribution written as above: whoever else there is.

    Raises:
        TandemError: as `synthetic` does.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
    return int(_draw_lengths(spec, 1, generator)[0])


def _draw_lengths(spec: str, n: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    try:
        lengths = _draw(spec, n, generator)
        if not ((lengths >= 1) & (lengths < 2**31)).all():
            raise ValueError("lengths must be from 1 to 2**31 - 1")
        return lengths.astype(np.int64)
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
