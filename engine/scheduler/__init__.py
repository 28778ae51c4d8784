"""Scheduling policies: `base.py` does the accounting, then one file a policy."""

from engine.scheduler.base import Scheduler
from engine.scheduler.registry import POLICIES, load_scheduler

__all__ = ["POLICIES", "Scheduler", "load_scheduler"]
