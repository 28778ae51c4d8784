"""The executor as a driver: the model's own tokens, on the machine's own time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.backend import Observer, drive
from engine.config import ServingConfig
from engine.executor.backend import ExecutorBackend
from engine.executor.executor import Executor
from engine.instance import Instance
from engine.live_events import LiveEvents
from engine.request import unknown_token
from engine.scheduler import Scheduler
from engine.stop_condition import StopCondition
from traces.request import TraceRequest


class ExecutorDriver:
    """Implements `engine.server.driver.Driver`.

    Attributes:
        prompts: token ids by request, if they are kept.
    """

    def __init__(self, executor: Executor, config: ServingConfig, keep_prompts: bool) -> None:
        executor.prepare(config)
        self.config = config
        model, size = executor.model.name, executor.model.vocab_size
        self.facts: dict[str, Any] = {"backend": "real", "device": executor.device, "model": model, "vocab_size": size}
        self.facts["stop_tokens"] = executor.model.eos_token_ids
        self.prompts: dict[int, Sequence[int]] = {}
        self._keep_prompts = keep_prompts
        self._running, self._data_plane = executor.session((), config, "model")

    def token(self, request_id: int, position: int) -> int:
        """As in `Driver`."""
        return self._running.outputs[request_id][position]

    def forget(self, request_id: int) -> None:
        """As in `Driver`."""
        self._running.forget(request_id)

    def serve(self, scheduler: Scheduler, observer: Observer, begun: Callable[[LiveEvents, int], None]) -> None:
        """As in `Driver`."""
        events = LiveEvents(lambda: time.perf_counter_ns() - backend.start_ns, self._admit)
        with ExecutorBackend(self._data_plane, events) as backend:
            begun(events, backend.start_ns)
            drive(Instance(scheduler, backend, observer).serve())

    def _admit(self, source: TraceRequest, condition: StopCondition) -> str | None:
        if self._keep_prompts and source.prompt_token_ids is not None:
            self.prompts[source.id] = source.prompt_token_ids
        self._running.add(source, condition)
        return unknown_token(source, self.facts["vocab_size"])
