"""Damaged models end in one line, soon, and without taking the machine's memory. TANDEM_FUZZ asks for more of them."""

from __future__ import annotations

import os
from pathlib import Path

from model_fuzz import fuzz


def test_a_damaged_model_ends_in_one_line_or_is_read(tmp_path: Path) -> None:
    count = int(os.environ.get("TANDEM_FUZZ", "100"))
    cases = fuzz(tmp_path, count)
    assert [case.fault for case in cases if case.fault] == []
    assert len(cases) == count, "none ends the process"
    refused = sum(case.message is not None for case in cases)
    assert len(cases) // 4 < refused < len(cases), "most damage is found, and some does no harm"
