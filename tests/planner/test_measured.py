"""The plan against whole steps measured on one H100 (benchmarks/measured_steps.jsonl)."""

import pytest

from benchmarks.plan_check import LINES, compare, read_lines

MEASURED = [compare(line) for line in read_lines(LINES)] if LINES.is_file() else []


@pytest.mark.skipif(not MEASURED, reason=f"{LINES.name} is not there")
def test_memory_and_time_are_near_what_was_measured() -> None:
    memory = {c.name: f"{c.memory_error:+.0%}" for c in MEASURED if abs(c.memory_error) > 0.10}
    time = {c.name: f"{c.time_error:+.0%}" for c in MEASURED if abs(c.time_error) > 0.15}
    assert not memory and not time
