"""VTC, fair sharing between clients by a virtual token counter (Sheng et al., OSDI '24, algorithm 2)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler.base import Scheduler
from engine.scheduler.lazy_heap import LazyHeap
from traces.errors import TandemError


@dataclass(slots=True, eq=False)
class _Client:
    """A client's account, in weighted tokens.

    Attributes:
        counter: service received, as of decode tick `settled`.
        decoding: its requests that make a token a tick.
        waiting: its requests that wait, first to be served first.
    """

    counter: float = 0.0
    settled: int = 0
    decoding: int = 0
    waiting: OrderedDict[int, Request] = field(default_factory=OrderedDict)


class VirtualTokenCounter(Scheduler):
    """Admits a request of the client that was served least, in tokens; nobody is preempted for fairness.

    A client that comes back after a while without requests is lifted to the least counter of those that wait: it cannot
    save up. Requests without a client are one client's.

    Args:
        config: the run's limits.
        input_weight: cost of a prompt token, charged when the request is admitted (w_p).
        output_weight: cost of an output token, charged as it is made (w_q).

    Raises:
        TandemError: a weight is negative.
    """

    chunked = True

    def __init__(self, config: ServingConfig, *, input_weight: float = 1.0, output_weight: float = 2.0) -> None:
        super().__init__(config)
        if min(input_weight, output_weight) < 0:
            raise TandemError(f"weights {input_weight} and {output_weight}: give numbers of 0 or more")
        self.input_weight = input_weight
        self.output_weight = output_weight
        self._clients: dict[str | None, _Client] = {}
        self._last_client = _Client()  # the last that ceased to wait
        self._charged: dict[int, int] = {}  # request admitted before -> output tokens charged when it last moved
        self._least = LazyHeap(self._counter, lambda client: bool(client.waiting))

    def plan(self, now: int) -> None:
        """Decodes first; then continue incomplete prefills, then admit by counter."""
        self.decode()
        for request in self.queue():
            if not self.prefill(request):
                break

    def head(self) -> Request | None:
        """The first request of the waiting client with the least counter."""
        client = self._least.first()
        return next(iter(client.waiting.values())) if client else None

    def counter(self, name: str | None) -> float:
        """A client's weighted tokens so far."""
        return self._counter(self._clients[name])

    def arrive(self, request: Request) -> None:
        """Queue a request, or reject it; lift its client's counter if it had none waiting."""
        super().arrive(request)
        client = self._clients.setdefault(request.client, _Client())
        if request.id in self.waiting:
            if not client.waiting:
                least = self._least.first() or self._last_client
                client.counter = max(self._counter(client), self._counter(least))
            self._enqueue(client, request)

    def preempt(self, request: Request) -> None:
        """It waits before its client's others."""
        super().preempt(request)
        client = self._clients[request.client]
        self._enqueue(client, request)
        client.waiting.move_to_end(request.id, last=False)

    def on_admit(self, request: Request) -> None:
        """Charge the prompt, once."""
        client = self._clients[request.client]
        self._dequeue(client, request)
        if request.id not in self._charged:
            self._charged[request.id] = 0
            client.counter += self.input_weight * request.prompt_len

    def on_decode(self, request: Request) -> None:
        """Charge what its prefill made, and a token a tick from now on."""
        client = self._clients[request.client]
        self._counter(client)
        self._charge(client, request)
        client.decoding += 1

    def on_leave(self, request: Request) -> None:
        """Charge what it has made until now, and nothing more."""
        client = self._clients[request.client]
        self._dequeue(client, request)
        if request.id in self.decoding:
            self._counter(client)
            client.decoding -= 1
            self._charged[request.id] = request.generated
        elif request.id in self._charged:
            self._charge(client, request)
        if request.outcome is not None:
            self._charged.pop(request.id, None)

    def _counter(self, client: _Client) -> float:
        """Brought up to date: the work of it does not depend on how many requests or ticks it stands for."""
        client.counter += self.output_weight * client.decoding * (self.decoding.ticks - client.settled)
        client.settled = self.decoding.ticks
        return client.counter

    def _charge(self, client: _Client, request: Request) -> None:
        client.counter += self.output_weight * (request.generated - self._charged[request.id])
        self._charged[request.id] = request.generated

    def _enqueue(self, client: _Client, request: Request) -> None:
        client.waiting[request.id] = request
        self._least.push(client)

    def _dequeue(self, client: _Client, request: Request) -> None:
        if client.waiting.pop(request.id, None) and not client.waiting:
            self._last_client = client
