"""Which copies between the tiers a step's compute must wait for: the one answer, for both backends.

Copies run on a stream of their own, in plan order (within a step, what is swapped out before what is swapped in). Those
of step n begin once the compute of step n - 1 has ended, so they never overtake what wrote, or last read, their blocks.
What is left to see to is compute that would overtake copies.
"""

from __future__ import annotations

from itertools import chain

from engine.step import Step


class CopyOrder:
    """Follows the steps of a run, each once, in plan order. A steady step costs nothing."""

    def __init__(self) -> None:
        self._busy: dict[int, int] = {}  # GPU block -> the last step whose copies read or write it
        self._arriving: dict[int, int] = {}  # request -> the step that swaps it in

    def needs(self, step: Step) -> int | None:
        """The latest step whose copies must have finished before this step's compute may begin, or None.

        Compute writes the blocks that it is handed, which may still be on their way out, or in, for a request that is
        gone; and it reads those of a request that joins. The blocks that a request is handed while it is swapped in are
        not written before it joins.
        """
        if not (step.swapped_out or step.swapped_in or self._busy or self._arriving):
            return None
        for copies in step.swapped_out.values():
            self._busy.update(dict.fromkeys(copies.source, step.index))
        for request_id, copies in step.swapped_in.items():
            self._busy.update(dict.fromkeys(copies.target, step.index))
            self._arriving[request_id] = step.index
        waits = [self._arriving[request_id] for request_id in step.joined if request_id in self._arriving]
        written = [blocks for request_id, blocks in step.blocks.items() if request_id not in step.swapped_in]
        waits += [self._busy[block] for block in chain.from_iterable(written) if block in self._busy]
        if not waits:
            return None
        latest = max(waits)
        self._busy = {block: index for block, index in self._busy.items() if index > latest}
        self._arriving = {request_id: index for request_id, index in self._arriving.items() if index > latest}
        return latest
