"""Workloads: what requests there are and when they arrive. Imports nothing from the other packages."""

from traces.errors import TandemError
from traces.format import Trace, read_trace, write_trace
from traces.request import TraceRequest

__all__ = ["TandemError", "Trace", "TraceRequest", "read_trace", "write_trace"]
