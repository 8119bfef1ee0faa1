"""What a step costs on a GPU, beside TRL and plain PEFT: one prepared call of at most eight minutes.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --out runs/gpu --dry_run    # tiny shapes, also on a CPU: shows that everything runs

Every job runs in a forked process of its own and adds its line to results.jsonl as it ends, so a call that is stopped
early is of use. First the attention of every row is checked against a dense float32 softmax and timed, and loss and
gradients against plain PEFT; then the contenders, warm-up outside the clock. Bases are random weights of a real shape,
made on the device. The parent imports everything once, and starts neither the device nor a thread: neither is forked.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# The device is asked for through NVML, which leaves CUDA alone: a process that has begun it cannot be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from benchmarks import gpu_jobs  # after the environment that torch reads

#: (workload, batch, contenders): what the first lines say is what is wanted most.
RUNS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("style", 16, ("atomtune", "trl-packed-liger")),
    ("long", 1, ("atomtune", "trl-padded-liger")),
    ("style", 64, ("atomtune", "atomtune-liger")),
    ("short", 64, ("atomtune", "atomtune-liger", "trl-packed-liger")),
    ("rows", 2, ("atomtune-liger", "atomtune")),
    ("long", 4, ("atomtune-liger", "atomtune", "trl-padded-liger")),
    ("style", 16, ("atomtune-liger", "trl-packed", "plain")),
)
#: Contenders of which three steps are profiled.
PROFILED = ("atomtune", "atomtune-liger")
#: A job gets so many seconds, and is not begun with less than the second left.
LIMIT, LEAST = 60, 14


def jobs(*, dry_run: bool) -> list[dict[str, Any]]:
    """Every job, in the order of their worth."""
    shape = "tiny" if dry_run else "qwen2.5-7b"
    planned: list[dict[str, Any]] = [
        {"name": "machine", "kind": "machine"},
        {"name": "files", "kind": "files", "shape": shape},
        {"name": "attention", "kind": "attention"},
        {"name": "equality", "kind": "equality"},
    ]
    for workload, batch, contenders in RUNS:
        for contender in contenders:
            planned.append(
                {
                    "name": f"{workload} {batch} {contender}",
                    "kind": "throughput",
                    "workload": workload,
                    "batch": min(batch, 4) if dry_run else batch,
                    "contender": contender,
                    "shape": shape,
                    "profile": contender in PROFILED,
                }
            )
    return planned


def run_forked(job: dict[str, Any], base: Path, folder: Path, out: Path) -> float:
    """One job in a process of its own; seconds it took. Its line is in results.jsonl, whatever became of it."""
    began = time.monotonic()
    log = folder / f"{job['name'].replace(' ', '-')}.log"
    child = os.fork()
    if child == 0:
        _as_child(job, base, folder, out, log)
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() - began > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            _add_line(out, {"name": job["name"], "error": f"killed after {LIMIT} s"})
            break
        time.sleep(0.05)
    with (out / "log.txt").open("a", encoding="utf-8") as logs:
        logs.write(f"=== {job['name']}\n{log.read_text(errors='replace')[-3000:] if log.exists() else ''}\n")
    return time.monotonic() - began


def _as_child(job: dict[str, Any], base: Path, folder: Path, out: Path, log: Path) -> None:
    """Do the job, write its line, and end the process."""
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                figures = gpu_jobs.KINDS[job["kind"]](job, base, folder, Path(scratch))
            except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, the next job is to run
                traceback.print_exc()
                figures = {"error": f"{type(error).__name__}: {str(error)[:600]}", **gpu_jobs.memory_figures()}
        _add_line(out, {"name": job["name"], **figures})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _add_line(out: Path, figures: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(figures: dict[str, Any]) -> str:
    """One job's line as a person reads it while the call goes on."""
    if "error" in figures:
        return f"ERROR {' '.join(figures['error'].split())[:200]}"
    if "step_ms" not in figures:
        shown = {key: value for key, value in figures.items() if key != "name"}
        return json.dumps(shown)[:1500]
    profile = figures.get("profile", {})
    idle = (
        f" idle {profile['idle_share']:.0%}, {profile['kernels_a_step']:,.0f} kernels"
        if "idle_share" in profile
        else ""
    )
    return (
        f"{figures['examples_per_s']:8.1f} examples/s {figures['tokens_per_s']:8,.0f} tokens/s "
        f"{figures['step_ms']:7.1f} ms  {figures['peak_gb']:.1f} GB of {figures['reserved_gb']:.1f}  "
        f"{figures['share_of_matmul']:.0%} of matmul{idle}  loss {figures['loss']:.3f} {figures.get('note', '')}"
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the card, and every contender by workload."""
    machine = next((line for line in lines if line["name"] == "machine"), {})
    rows = [
        f"{machine.get('card')}; {machine.get('matmul_tflops', 0):.0f} TFLOP/s; {machine.get('versions')}",
        "",
        "| run | examples/s | tokens/s | ms a step | tokens a step | peak GB | share of matmul | idle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "step_ms" in line:
            idle = line.get("profile", {}).get("idle_share")
            rows.append(
                f"| {line['name']} | {line['examples_per_s']:.1f} | {line['tokens_per_s']:,.0f} | "
                f"{line['step_ms']:.1f} | {line['tokens_a_step']:,.0f} | {line['peak_gb']:.1f} | "
                f"{line['share_of_matmul']:.0%} | {'' if idle is None else f'{idle:.0%}'} |"
            )
        elif "error" in line:
            rows.append(f"| {line['name']} | {' '.join(line['error'].split())[:120]} | | | | | | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="results.jsonl, table.md and log.txt")
    parser.add_argument("--minutes", type=float, default=8.0, help="jobs that would end later are left out")
    parser.add_argument("--only", default="", help="jobs with this in their name")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes and few steps, also without a GPU")
    options = parser.parse_args()
    began = time.monotonic()
    if not (options.dry_run or gpu_jobs.has_gpu()):
        raise SystemExit(
            "There is no GPU here, and 7 billion weights do not train on a CPU in your lifetime: --dry_run."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").write_text("")
    gpu_jobs.import_everything()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        print(f"[{time.monotonic() - began:4.0f} s] imported", flush=True)
        for job in jobs(dry_run=options.dry_run):
            if options.only not in job["name"]:
                continue
            if time.monotonic() - began > 60 * options.minutes - LEAST:
                print(f"{job['name']:28} left out: no time", flush=True)
                continue
            job |= {"dry_run": options.dry_run}
            with contextlib.suppress(StopIteration):
                job["matmul_tflops"] = next(
                    line["matmul_tflops"] for line in lines_of(options.out) if "matmul_tflops" in line
                )
            took = run_forked(job, base, folder, options.out)
            now = time.monotonic() - began
            print(f"[{now:4.0f} s] {job['name']:28} {took:5.1f} s  {summary(lines_of(options.out)[-1])}", flush=True)
    (options.out / "table.md").write_text(table(lines_of(options.out)) + "\n", encoding="utf-8")
    print(f"\n{table(lines_of(options.out))}\n\nThe results lie in {options.out}.")


if __name__ == "__main__":
    main()
