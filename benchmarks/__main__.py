"""`make bench`: train every contender on every workload, each in its own process; write a table and a figure.

The contenders take turns, round by round, so that a slow phase of the machine slows all of them. They are compared by
the median of the ratios within each round.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.contender import CONTENDERS, figures_of


def measure(
    source: Path, counts: Mapping[str, int], names: Sequence[str], *, rounds: int, shape: str
) -> list[dict[str, Any]]:
    """Train each contender on each workload, `rounds` times; one dictionary of figures per run."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        every = workloads.read(source, 10**9)
        base = workloads.build_base(Path(folder) / "base", every, shape)
        for workload, count in counts.items():
            data = workloads.write(workload, every[:count], Path(folder) / f"{workload}.jsonl")
            for turn in range(rounds):
                for name in names:
                    words = [name, "--base", str(base), "--data", str(data)]
                    figures = figures_of("benchmarks.contender", words, what=f"{name} on {workload}") | {"round": turn}
                    print(
                        f"{workload:6} round {turn}  {name:16} {figures['examples_per_second']:8.2f} examples/s  "
                        f"{figures['peak_memory_mb']:6.0f} MB  loss {figures['loss']:.3f}  "
                        f"{figures['share_of_floor']:.2f} of the floor",
                        flush=True,
                    )
                    runs.append(figures)
    return runs


def medians(runs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """The median of each figure, by (workload, contender)."""
    keys = ("examples_per_second", "peak_memory_mb", "computed_tokens", "loss", "share_of_floor")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figures in runs:
        groups.setdefault((figures["workload"], figures["name"]), []).append(figures)
    return {key: {k: statistics.median(figures[k] for figures in group) for k in keys} for key, group in groups.items()}


@dataclass(frozen=True)
class Against:
    """The fastest atomtune contender on a workload, compared with the fastest other contender.

    speed   ratio of examples per second, median over the rounds
    memory  ratio of peak memory to that of TRL packed, median over the rounds; if TRL packed is not there,
            to that of the fastest other
    """

    own: str
    other: str
    speed: float
    memory: float


def against_fastest_other(runs: list[dict[str, Any]], workload: str) -> Against | None:
    """None if only one of the two sides was measured."""
    middle = medians(runs)
    names = [name for at, name in middle if at == workload]

    def fastest_of(names: Iterable[str]) -> str:
        return max(names, key=lambda name: middle[workload, name]["examples_per_second"], default="")

    own = fastest_of(name for name in names if name.startswith("atomtune"))
    other = fastest_of(name for name in names if not name.startswith("atomtune"))
    if not own or not other:
        return None
    packed = next((name for name in names if name == f"trl-packed-{own.rpartition('-')[2]}"), other)
    of_workload = [figures for figures in runs if figures["workload"] == workload]
    speed = median_ratio(of_workload, "examples_per_second", own, other)
    return Against(own, other, speed=speed, memory=median_ratio(of_workload, "peak_memory_mb", own, packed))


def median_ratio(runs: list[dict[str, Any]], figure: str, own: str, other: str) -> float:
    """A figure of one contender over that of another on one workload: the median of the ratios within each round."""
    by_round = {(figures["name"], figures["round"]): figures[figure] for figures in runs}
    rounds = {number for _, number in by_round}
    return statistics.median(by_round[own, number] / by_round[other, number] for number in rounds)


def report(runs: list[dict[str, Any]]) -> str:
    """Two Markdown tables: the ratios, and the medians of all figures."""
    names = dict.fromkeys(figures["workload"] for figures in runs)
    lines = []
    for workload, found in [(workload, against_fastest_other(runs, workload)) for workload in names]:
        if found:
            lines.append(f"| {workload} | {found.other} | {found.own} | **{found.speed:.1f}×** | {found.memory:.2f} |")
    if lines:
        head = "| workload | fastest other | fastest here | examples/s over the other | peak memory over TRL packed |"
        lines = [head, "|---|---|---|---|---|", *lines, ""]
    lines += ["| workload | contender | examples/s | peak MB | computed tokens | mean loss | share of the floor |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (workload, name), figures in medians(runs).items():
        lines.append(
            f"| {workload} | {name} | {figures['examples_per_second']:.2f} | {figures['peak_memory_mb']:.0f} | "
            f"{figures['computed_tokens']:,.0f} | {figures['loss']:.3f} | {figures['share_of_floor']:.2f} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw bars of examples per second, one panel per workload."""
    import matplotlib.pyplot as plt

    middle = medians(runs)
    names = list(dict.fromkeys(figures["workload"] for figures in runs))
    shown = list(dict.fromkeys(name for _, name in middle))
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), squeeze=False)
    for axis, workload in zip(axes[0], names, strict=True):
        values = [middle.get((workload, name), {}).get("examples_per_second", 0.0) for name in shown]
        bars = axis.barh(shown, values, color=["#b8442a" if "atomtune" in name else "#9aa3ab" for name in shown])
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_title(workload)
        axis.set_xlabel("examples/s")
        axis.invert_yaxis()
        axis.set_xlim(0, max(values) * 1.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    libraries = ", ".join(_with_version(name) for name in ("torch", "transformers", "peft", "trl"))
    if torch.cuda.is_available():
        return f"Commit {commit.stdout.strip()}; {torch.cuda.get_device_name()}; {libraries}."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Commit {commit.stdout.strip()}; {cores} CPU cores ({platform.machine()}); {libraries}."


def _with_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def arguments(about: str | None, contenders: Mapping[str, str], *, records: int, out: str) -> argparse.ArgumentParser:
    """The argument parser that the benchmarks on these workloads share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=workloads.PERSONA, help="dialogues, JSONL; default: the demo's persona"
    )
    parser.add_argument(
        "--records", type=int, default=records, help=f"first N records for short, a quarter for others; {records}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=workloads.NAMES, default=list(workloads.NAMES))
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=list(contenders))
    parser.add_argument("--out", type=Path, default=Path(out), help=f"results.json, table.md and bench.png; {out}")
    parser.add_argument("--shape", choices=workloads.SHAPES, default="small", help="the model's sizes; small")
    return parser


def bench(options: argparse.Namespace) -> None:
    """Run the measurement, then write results.json, the table and the figure."""
    counts = {name: options.records if name == "short" else options.records // 4 for name in options.workloads}
    runs = measure(options.source, counts, options.contenders, rounds=options.rounds, shape=options.shape)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    (options.out / "table.md").write_text(f"{report(runs)}\n\n{machine()}\n", encoding="utf-8")
    draw(runs, options.out / "bench.png")
    print(f"\n{report(runs)}\n\n{machine()}\n\nThe results lie in {options.out}.")


if __name__ == "__main__":
    bench(arguments(__doc__, CONTENDERS, records=512, out="runs/bench").parse_args())
