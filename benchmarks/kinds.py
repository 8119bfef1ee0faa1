"""How much faster are trees on experts, linear attention and short convolutions? Against padded rows and against TRL.

    python -m benchmarks.kinds --source DIALOGUES.jsonl      a table on standard output

Small models with random weights in float32, LoRA on the same layers for all. Each run is its own process and the
contenders take turns, so they are compared by the median of the ratios within each round. TRL pads, because in packed
rows such layers would carry their state from one record into the next.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.__main__ import machine, measure, median_ratio

CONTENDERS = ("atomtune-fp32", "atomtune-padded-fp32", "trl-padded-fp32")
WORKLOADS = ("style", "short")


def _line(kind: str, workload: str, runs: list[dict[str, Any]]) -> str:
    """A row of the table, from the runs on one workload."""
    ours, padded, trl = CONTENDERS
    over = {other: median_ratio(runs, "examples_per_second", ours, other) for other in (padded, trl)}
    last = {figures["name"]: figures for figures in runs}  # of the last round
    tokens = last[padded]["computed_tokens"] / last[ours]["computed_tokens"]
    losses = " · ".join(f"{last[name]['loss']:.3f}" for name in CONTENDERS)
    cells = (
        kind,
        workload,
        last[ours]["layout"],
        f"{tokens:.1f}",
        f"{over[padded]:.1f} ×",
        f"{over[trl]:.1f} ×",
        losses,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=workloads.PERSONA, help="dialogues, JSONL; default: the demo's persona"
    )
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=workloads.KINDS, default=list(workloads.KINDS))
    options = parser.parse_args()
    lines = [
        "| model | workload | layout | fewer tokens | over padded rows | over TRL | mean loss of the three |",
        "|---|---|---|---|---|---|---|",
    ]
    counts = dict.fromkeys(WORKLOADS, options.records)
    for kind in options.kinds:
        runs = measure(options.source, counts, CONTENDERS, rounds=options.rounds, shape=kind)
        for workload in WORKLOADS:
            lines.append(_line(kind, workload, [figures for figures in runs if figures["workload"] == workload]))
    print("\n".join(["", *lines, "", machine()]))


if __name__ == "__main__":
    main()
