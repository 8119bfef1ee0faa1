"""How much faster are trees on experts, linear attention and short convolutions? Against padded rows and against TRL.

    python -m benchmarks.kinds --source DIALOGUES.jsonl      a table on standard output

Small models with random weights in float32, LoRA on the same layers for all. Each run is its own process and the
contenders take turns, so they are compared by the median of the ratios within each round. TRL pads, because in packed
rows such layers would carry their state from one record into the next.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.__main__ import PERSONA, machine, run

CONTENDERS = ("atomtune-fp32", "atomtune-padded-fp32", "trl-padded-fp32")
WORKLOADS = ("style", "short")


def measure(kind: str, source: Path, *, records: int, rounds: int) -> list[str]:
    """Lines of the table, one per workload."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        dialogues = workloads.read(source, 10**9)
        base = workloads.build_base(Path(folder) / "base", dialogues, kind)
        for workload in WORKLOADS:
            data = workloads.write(workload, dialogues[:records], Path(folder) / f"{workload}.jsonl")
            in_rounds: list[dict[str, dict[str, Any]]] = []
            for number in range(rounds):
                in_rounds.append({name: run(name, base, data) for name in CONTENDERS})
                speeds = {name: round(figures["examples_per_second"], 2) for name, figures in in_rounds[-1].items()}
                print(f"{kind} {workload} round {number}: {speeds}", flush=True)
            lines.append(_line(kind, workload, in_rounds))
    return lines


def _line(kind: str, workload: str, in_rounds: list[dict[str, dict[str, Any]]]) -> str:
    ours, padded, trl = CONTENDERS
    over = {}
    for other in (padded, trl):
        speeds = [
            (figures[ours]["examples_per_second"], figures[other]["examples_per_second"]) for figures in in_rounds
        ]
        over[other] = statistics.median(our_speed / other_speed for our_speed, other_speed in speeds)
    last = in_rounds[-1]
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
    parser.add_argument("--source", type=Path, default=PERSONA, help="dialogues, JSONL; default: the demo's persona")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=workloads.KINDS, default=list(workloads.KINDS))
    options = parser.parse_args()
    lines = [
        "| model | workload | layout | fewer tokens | over padded rows | over TRL | mean loss of the three |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in options.kinds:
        lines += measure(kind, options.source, records=options.records, rounds=options.rounds)
    print("\n".join(["", *lines, "", machine()]))


if __name__ == "__main__":
    main()
