"""The tables: how much faster than each peer, geometric means, worst cases and losses: `python -m benchmarks.summary`.

Prints Markdown from the CSVs of this machine (or `--device`); `run.py` shows the same figures on the terminal. Of every case the
newest run counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import store
from benchmarks.baselines import PEERS
from benchmarks.markdown import markdown_table

OURS = ("packed", "automatic")
GROUP = ("op", "dtype", "mode", "threads")


@dataclass(frozen=True)
class Ratio:
    """One of ours against one peer over the cases that both ran: above 1 we are faster."""

    peer: str
    ours: str
    ratios: dict[str, float]  # case -> peer's time over ours

    @property
    def mean(self) -> float:
        return geometric_mean(self.ratios.values())

    @property
    def worst(self) -> str:
        return min(self.ratios, key=self.ratios.__getitem__)

    @property
    def losses(self) -> dict[str, float]:
        return dict(sorted(((c, r) for c, r in self.ratios.items() if r < 1), key=lambda item: item[1]))


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean of the logarithms."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def newest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the newest run of every case."""

    def case(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in (*GROUP, "case"))

    latest: dict[tuple[str, ...], str] = {}
    for row in rows:
        latest[case(row)] = max(latest.get(case(row), ""), row["time"])
    return [row for row in rows if row["time"] == latest[case(row)]]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """(op, dtype, mode, threads) -> rows, in order of appearance."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[key]) for key in GROUP), []).append(row)
    return found


def times(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """candidate -> case -> median µs, of those that ran."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(row["candidate"], {})[row["case"]] = float(row["us_p50"])
    return found


def ratios(rows: Sequence[dict[str, Any]]) -> list[Ratio]:
    """Every peer, and the best of those that compute the factored layer, against ours."""
    by_candidate = times(rows)
    same = [by_candidate[name] for name in PEERS if name in by_candidate and not PEERS[name].dense]
    best = {case: min(peer[case] for peer in same if case in peer) for case in {c for peer in same for c in peer}}
    peers = {name: by_candidate[name] for name in PEERS if name in by_candidate}
    if len(same) > 1:
        peers["best of the factored"] = best
    found = []
    for peer, theirs in peers.items():
        for ours in OURS:
            shared = {c: theirs[c] / t for c, t in by_candidate.get(ours, {}).items() if c in theirs}
            if shared:
                found.append(Ratio(peer, ours, shared))
    return found


def absent(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """ "<candidate>: <why>" -> the cases in which it could not run or was wrong."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault(f"{row['candidate']} {row['status']}: {row['note']}", []).append(row["case"])
    return found


def percents(rows: Sequence[dict[str, Any]], column: str = "percent") -> dict[str, dict[str, float]]:
    """ours -> case -> percent of the measured limit; in `percent_of_best` by the best figures of the run."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "ours" and row["status"] == "ok" and row.get(column) not in (None, ""):
            found.setdefault(row["candidate"], {})[row["case"]] = float(row[column])
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The summary on the terminal, a table a group."""
    from inhernet.console import say, table

    for (op, dtype, mode, threads), members in groups(rows).items():
        lines = table_lines(members)
        title = f"{op}, {dtype}, {mode}, {threads} thread{'s' * (threads != '1')}: times faster than"
        if lines:
            table(title, COLUMNS, lines, left=(0, 4))
        for sentence in notes(members):
            say(f"  {sentence}")


COLUMNS = ("peer", "packed", "plain call", "worst", "where (of the faster form)", "losses")


def table_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line a peer: geometric means of packed and automatic, the worst case of the better one, and its losses."""
    by_peer: dict[str, dict[str, Ratio]] = {}
    for ratio in ratios(rows):
        by_peer.setdefault(ratio.peer, {})[ratio.ours] = ratio
    lines = []
    for peer, found in by_peer.items():
        chosen = found.get("packed") or found["automatic"]
        means = [f"{found[ours].mean:.2f}" if ours in found else "–" for ours in OURS]
        worst = chosen.worst
        losses = f"{len(chosen.losses)} of {len(chosen.ratios)}"
        lines.append([peer, *means, f"{chosen.ratios[worst]:.2f}", worst, losses])
    return lines


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table does not show: distance to the limit, who could not run."""
    sentences = []
    best = percents(rows, "percent_of_best")
    for name, found in percents(rows).items():
        if name in OURS:
            worst = min(found, key=found.__getitem__)
            sentences.append(
                f"{name}: {geometric_mean(found.values()):.0f} % of the limit (geometric mean), "
                f"{found[worst]:.0f} % at worst ({worst}), {max(found.values()):.0f} % at best"
            )
            beaten = [case for case, percent in best.get(name, {}).items() if percent > 100]
            if beaten:
                sentences.append(f"{name} beats the limit in {', '.join(beaten)}: the limit is modelled wrongly there")
    total = len({row["case"] for row in rows})
    for reason, cases in absent(rows).items():
        sentences.append(f"{reason} ({len(cases)} of {total} cases)")
    return sentences


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown, losses in full."""
    parts = []
    for (op, dtype, mode, threads), members in groups(rows).items():
        first = members[-1]
        machine = f"{first['cpu']}, {threads} thread{'s' * (threads != '1')}, torch {first['torch']}, commit {first['commit']}"
        parts.append(f"### `{op}`, {dtype}, {mode}\n\n{machine}; {len({r['case'] for r in members})} cases.\n")
        parts.append(markdown_table(COLUMNS, table_lines(members), text=(0, 4)))
        parts += [f"* {sentence}" for sentence in [*notes(members), *_losses(members)]]
        parts.append("")
    return "\n".join(parts)


def _losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    sentences = []
    for ratio in ratios(rows):
        if ratio.ours == "packed" and ratio.losses and ratio.peer != "best of the factored":
            cases = ", ".join(f"{case} {value:.2f}" for case, value in ratio.losses.items())
            sentences.append(f"slower than {ratio.peer}: {cases}")
    return sentences


def compact(by_op: dict[str, Sequence[dict[str, Any]]]) -> str:
    """One table of all ops, a line a peer: geometric mean and, in brackets, the worst case of our packed form."""
    cells: dict[str, dict[str, str]] = {}
    for op, rows in by_op.items():
        for ratio in ratios(rows):
            if ratio.ours == ("packed" if any(row["candidate"] == "packed" for row in rows) else "automatic"):
                figure = f"{ratio.mean:.2f} ({ratio.ratios[ratio.worst]:.2f})"
                cells.setdefault(ratio.peer, {})[op] = figure
    counts = {op: len({row["case"] for row in rows}) for op, rows in by_op.items()}
    columns = ["peer", *(f"`{op}`, {counts[op]} cases" for op in by_op)]
    return markdown_table(
        columns, [[peer, *(found.get(op, "") for op in by_op)] for peer, found in cells.items()], (0,)
    )


def main() -> None:
    """Print the tables of the CSVs."""
    from benchmarks import memory, models, suites
    from inherit_kernels.registry import OPS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="ops, models, memory; all that have results when none is named")
    parser.add_argument("--device", help="the folder under benchmarks/results; this machine's when left out")
    parser.add_argument("--threads", help="only runs on that many threads")
    parser.add_argument("--suite", choices=["small", "full"], help="only its cases")
    parser.add_argument("--compact", action="store_true", help="one table of all ops: float32, forward")
    arguments = parser.parse_args()
    by_op = {}
    for name in arguments.targets or (*OPS, "models", "memory"):
        cases = {str(p) for p in suites.suite(name, arguments.suite)} if name in OPS and arguments.suite else None
        rows = [
            row
            for row in store.read(store.path_of(name, arguments.device))
            if arguments.threads in (None, row["threads"]) and (cases is None or row["case"] in cases)
        ]
        if not rows or (arguments.compact and name not in OPS):
            continue
        if arguments.compact:
            by_op[name] = newest([r for r in rows if (r["dtype"], r["mode"]) == ("float32", "forward")])
            continue
        printer = {"models": models.markdown, "memory": memory.markdown}.get(name, lambda rows: markdown(newest(rows)))
        print(printer(rows))
    if by_op:
        print(compact(by_op))


if __name__ == "__main__":
    main()
