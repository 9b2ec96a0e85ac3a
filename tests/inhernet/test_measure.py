"""Latency: the order of candidates, the percentiles, the refusals."""

from __future__ import annotations

import time

import pytest

from inhernet.measure import interleaved


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=1e-6)
    timed = calls[6:]  # three warm-up calls each
    assert timed == ["a", "b"] * (len(timed) // 2)
    assert len(timed) >= 10


def test_medians_are_milliseconds() -> None:
    found = interleaved({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.01)}, seconds=0.05)
    assert 2.0 <= found["short"].p50 < 10.0 <= found["long"].p50 < 50.0
    assert found["long"].p20 <= found["long"].p50 <= found["long"].p80
    assert found["long"].rounds == found["short"].rounds >= 5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        interleaved({})
    with pytest.raises(ValueError, match=r"seconds is 0"):
        interleaved({"a": int}, seconds=0)
