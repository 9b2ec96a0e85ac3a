"""Measures items one after the other until time is up; `run.py` starts it, and starts it again where a kernel ended it.

What it is about to do it writes into a journal first, so that whoever finds it dead knows what it died of.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, rows
from benchmarks.gpu.device import open_device
from benchmarks.gpu.measure import Rates, measure

SLOW_SECONDS = 100.0  # a case on which max-autotune runs, until one was measured
FIRST_SECONDS = 8.0


@dataclass
class State:
    """What survives a worker: a file that parent and worker share.

    Attributes:
        keys: what is to be measured, in order.
        skipped: key -> candidate -> why it is not tried again.
        banned: op -> candidate -> why it is not tried on this op at all.
    """

    path: Path
    keys: list[str]
    results: Path
    deadline: float
    rehearse: bool
    commit: str | None
    skipped: dict[str, dict[str, str]]
    banned: dict[str, dict[str, str]]

    def save(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "path"}
        self.path.write_text(json.dumps(content | {"results": str(self.results)}))

    @staticmethod
    def load(path: Path) -> State:
        content = json.loads(path.read_text())
        return State(path, **content | {"results": Path(content["results"])})

    @property
    def journal(self) -> Path:
        return self.path.with_suffix(".journal")


def items_of(state: State) -> list[cases.Item]:
    known = {item.key: item for item in (cases.rehearsal() if state.rehearse else cases.sweep())}
    return [known[key] for key in state.keys]


def work(state: State) -> None:
    """Measure what is left; stop before the deadline would be missed."""
    device = open_device(state.rehearse)
    stamp = rows.stamp(device, state.commit)
    _note(state, stamp=stamp)
    say(
        f"{stamp['gpu']}, driver {stamp['driver']}, torch {stamp['torch']}, triton {stamp['triton']}, {stamp['commit']}"
    )
    rates = Rates(device)
    say(f"copy {rates.copy / 1e9:,.0f} GB/s, bfloat16 products {rates.product('bfloat16') / 1e12:,.1f} TFLOP/s")
    spent: dict[bool, list[float]] = {False: [], True: []}
    left = items_of(state)
    for number, item in enumerate(left):
        slow = cases.SLOW in item.peers and not state.rehearse
        known = spent[slow]
        expected = sum(known) / len(known) * 1.5 if known else SLOW_SECONDS if slow else FIRST_SECONDS
        start = time.time()
        if start + expected > state.deadline:
            if slow:  # the next may be short
                continue
            break
        skipped = state.banned.get(item.point.op, {}) | state.skipped.get(item.key, {})
        found = measure(item, device, rates, stamp, skipped, partial(_begin, state, item.key))
        rows.append(state.results, found)
        spent[slow].append(time.time() - start)
        _note(state, done=item.key)
        say(f"{number + 1}/{len(left)} {item.key}  {headline(found)}")


def headline(found: Sequence[dict[str, Any]]) -> str:
    """One line: ours and the best peer with cold L2, what failed."""
    timed = [row for row in found if row.get("cold_us")]
    ours = [row for row in timed if row["kind"] == "ours"]
    peers = [row for row in timed if row["kind"] == "peer"]
    parts = [f"{row['candidate']} {row['cold_us']:.1f} µs ({row['percent']:.0f} %)" for row in ours]
    if peers:
        best = min(peers, key=lambda row: row["cold_us"])
        parts.append(f"best peer {best['candidate']} {best['cold_us']:.1f} µs")
    parts += [
        f"{row['candidate']} {row['status']}: {row['note']}" for row in found if row["status"] in ("failed", "wrong")
    ]
    return ", ".join(parts)


def _begin(state: State, key: str, candidate: str) -> None:
    _note(state, key=key, candidate=candidate)


def _note(state: State, **content: Any) -> None:
    with state.journal.open("a") as file:
        file.write(json.dumps(content) + "\n")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    work(State.load(Path(sys.argv[1])))
