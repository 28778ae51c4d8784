"""Workloads: requests and their arrivals. Imports nothing from the other packages."""

from traces.errors import TandemError
from traces.request import TraceRequest
from traces.trace import Trace, read_trace, write_trace

__all__ = ["TandemError", "Trace", "TraceRequest", "read_trace", "write_trace"]
