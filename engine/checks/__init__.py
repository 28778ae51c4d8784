"""Checks of every step, apart from the scheduler."""
