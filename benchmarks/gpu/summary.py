"""The table of figures: `python -m benchmarks.gpu.summary [folder]`, as text or with `--markdown`.

Regime, what was asked, what was reached (geometric mean and worst case, with cold and with warm L2), on how many cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import store
from benchmarks.gpu import rows
from benchmarks.gpu.figures import FIGURES, STATES, Reached, reached, times_of
from benchmarks.markdown import markdown_table
from inhernet.console import say, table

COLUMNS = (
    "regime",
    "against",
    "asked",
    "cold",
    "worst",
    "warm",
    "worst",
    "best backend, cold",
    "cases",
    "reached",
)
TEXT = (0, 1, 9)
NAMED = 12  # failures that are listed


def lines_of(found: Sequence[Reached]) -> list[list[str]]:
    """One line a figure."""
    return [
        [
            one.figure.where,
            one.figure.what,
            f"{one.figure.asked:g}{one.figure.unit}",
            *(cell for state in STATES for cell in _cells(one, state)),
            _number(one.mean("cold", best=True), one.figure.unit),
            str(one.cases),
            one.verdict,
        ]
        for one in found
    ]


def _cells(one: Reached, state: str) -> list[str]:
    worst = one.worst(state)
    return [_number(one.mean(state), one.figure.unit), _number(worst[1] if worst else None, one.figure.unit)]


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.0f}{unit}" if unit == " %" else f"{value:.2f}{unit}"


def notes(found: Sequence[dict[str, str]], results: Sequence[Reached]) -> list[str]:
    """The worst case of every figure that was missed, what failed, who served the automatic calls."""
    sentences = []
    for one in results:
        if one.verdict in ("missed", "on average"):
            worst = {state: one.worst(state) for state in STATES}
            named = [f"{state} {_number(w[1], one.figure.unit)} at {w[0]}" for state, w in worst.items() if w]
            sentences.append(f"{one.figure.where}, {one.figure.what}: worst {'; '.join(named)}")
    chosen: dict[str, int] = {}
    for row in found:
        if row["candidate"] == "automatic" and row["resolved"]:
            chosen[row["resolved"]] = chosen.get(row["resolved"], 0) + 1
    counts = ", ".join(f"{name} {count}" for name, count in sorted(chosen.items()))
    sentences.append(f"the automatic choice: {counts or 'nothing ran'}")
    sentences += [f"{name} of ours fastest on {count}" for name, count in _winners(found).items()]
    failures: dict[str, list[str]] = {}
    for row in found:
        if row["status"] in ("failed", "wrong") or "not captured" in row["note"]:
            failures.setdefault(f"{row['candidate']} {row['status']}: {row['note']}", []).append(_name(row))
    for reason, where in list(failures.items())[:NAMED]:
        sentences.append(f"{reason} ({len(where)} cases, the first {where[0]})")
    if len(failures) > NAMED:
        sentences.append(f"{len(failures) - NAMED} other kinds of failure are in the CSV")
    return sentences


def _winners(found: Sequence[dict[str, str]]) -> dict[str, int]:
    """backend -> measurements in which it is the fastest of ours with cold L2."""
    counts: dict[str, int] = {}
    for measured in rows.newest(found).values():
        times = times_of(measured, "cold")
        ours = {
            row["candidate"]: times[row["candidate"]]
            for row in measured
            if row["kind"] == "ours" and row["candidate"] in times and row["candidate"] != "automatic"
        }
        if ours:
            best = min(ours, key=ours.__getitem__)
            counts[best] = counts.get(best, 0) + 1
    return counts


def _name(row: dict[str, str]) -> str:
    return f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"


def machine(found: Sequence[dict[str, str]]) -> str:
    """Where and by what the newest rows were made."""
    last = max(found, key=lambda row: row["time"])
    rates = next((row for row in reversed(found) if row["copy_gbs"] and row["dtype"] == "bfloat16"), last)
    return (
        f"{last['gpu']}, driver {last['driver']}, CUDA {last['cuda']}, torch {last['torch']}, triton {last['triton']}, "
        f"commit {last['commit']}; copy {rates['copy_gbs']} GB/s, bfloat16 products {rates['product_tflops']} TFLOP/s"
    )


def show(folder: Path) -> None:
    """The figures on the terminal, the table last."""
    found = rows.read(folder)
    if not found:
        say(f"no rows in {folder}")
        return
    newest = rows.newest(found)
    results = reached(newest.values())
    for sentence in notes([row for measured in newest.values() for row in measured], results):
        say(f"  {sentence}")
    say(machine(found))
    table(f"{len(newest)} cases in {folder}", COLUMNS, lines_of(results), left=TEXT)


def markdown(folder: Path) -> str:
    """The same for a README: machine, table, every note."""
    found = rows.read(folder)
    if not found:
        return f"No rows in {folder}."
    newest = rows.newest(found)
    results = reached(newest.values())
    members = [row for measured in newest.values() for row in measured]
    parts = [machine(found) + ".", "", markdown_table(COLUMNS, lines_of(results), TEXT), ""]
    return "\n".join(parts + [f"* {sentence}" for sentence in notes(members, results)])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.summary", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of CSVs; every GPU's when none is named")
    parser.add_argument("--markdown", action="store_true", help=f"{len(FIGURES)} figures for a README")
    arguments = parser.parse_args(argv)
    folders = arguments.folders or sorted({path.parent for path in store.RESULTS.glob("*/gpu_*.csv")})
    if not folders:
        raise SystemExit("no GPU results: run benchmarks/gpu.sh on a machine with one")
    for folder in folders:
        if arguments.markdown:
            print(markdown(folder))
        else:
            show(folder)


if __name__ == "__main__":
    main()
