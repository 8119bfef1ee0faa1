"""What does a step cost on a GPU, compared with TRL and plain PEFT? One prepared call of at most eight minutes.

    python -m benchmarks.gpu --out runs/gpu.jsonl
    python -m benchmarks.gpu --out runs/gpu.jsonl --kinds      # experts and linear attention instead of a Qwen2.5-7B
    python -m benchmarks.gpu --out runs/gpu.jsonl --dry_run    # tiny shapes, also on a CPU: shows that everything runs

Every job runs in its own forked process and appends its line of JSON when it ends, so a call that is stopped early
still has results. The first jobs check the attention against a dense float64 softmax and time it, and check loss and
gradients against plain PEFT. Then come the contenders, whose warm-up is not timed. Bases get random weights in a real
shape, created on the device.

The parent imports everything once. It must not start CUDA or threads, because neither survives a fork.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ask NVML, not CUDA, whether there is a device: a process in which CUDA has started cannot be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from benchmarks import gpu_checks, gpu_contenders, gpu_workloads  # after the variables that torch reads

Figures = dict[str, Any]

#: (workload, batch, contenders), the most important first, because a call may end early.
RUNS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("style", 16, ("atomtune", "trl-padded-liger", "trl-packed")),
    ("style", 64, ("atomtune", "trl-padded-liger")),
    ("long", 1, ("atomtune", "trl-padded-liger")),
    ("short", 64, ("atomtune", "trl-packed-liger")),
    ("rows", 2, ("atomtune",)),
    ("style", 16, ("plain", "atomtune-eager", "trl-padded")),
    ("style", 64, ("trl-packed",)),
    ("short", 64, ("trl-padded-liger", "plain", "atomtune-eager")),
    ("long", 4, ("atomtune", "trl-padded-liger")),
    ("long", 1, ("atomtune-eager",)),
    ("style", 16, ("atomtune-noliger", "trl-packed-liger")),
)
#: The same for the shapes of gpu_workloads.KINDS (`--kinds`); "equality" is the check of a shape.
KIND_RUNS: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("qwen3.5", "style", 16, ("atomtune", "atomtune-padded")),
    ("qwen3-moe", "style", 16, ("atomtune", "atomtune-padded")),
    ("qwen3.5", "equality", 0, ()),
    ("qwen3-moe", "equality", 0, ()),
    ("qwen3.5", "style", 16, ("trl-padded-liger",)),
    ("qwen3-moe", "style", 16, ("trl-padded-liger",)),
    ("qwen3.5", "short", 64, ("atomtune", "atomtune-padded")),
    ("qwen3-moe", "short", 64, ("atomtune", "atomtune-padded")),
)
#: Runs that profile three steps.
PROFILED = {("style", 16, "atomtune"), ("long", 1, "atomtune"), ("style", 64, "atomtune"), ("rows", 2, "atomtune")}
#: Seconds: the most for one job, and the least that must be left to begin one.
LIMIT, LEAST = 75, 12
#: Characters kept from the end of a job's terminal output.
TAIL = 1_500


def files(job: Figures, base: Path, folder: Path, scratch: Path) -> Figures:
    """Write the data files and cache the encoded records, in a job of its own.

    This process does not tokenize, because a tokenizer's threads do not survive a fork.
    """
    names = job.get("workloads", list(gpu_workloads.RECORDS))
    gpu_workloads.write_base(base, job["shape"], small=job["dry_run"])
    gpu_workloads.write_all(folder, names, dry_run=job["dry_run"])
    for name in names:
        gpu_workloads.encoded(base, folder / f"{name}.jsonl")
    return {"files": sorted(path.name for path in folder.glob("*.jsonl"))}


KINDS: dict[str, Callable[[Figures, Path, Path, Path], Figures]] = {
    "machine": gpu_checks.machine,
    "files": files,
    "attention": gpu_checks.attention,
    "equality": gpu_checks.equality,
    "throughput": gpu_contenders.throughput,
}


def jobs(*, dry_run: bool, kinds: bool = False, shape: str = "qwen2.5-7b") -> list[Figures]:
    """Every job, the most important first."""
    if kinds:
        return [{**job, "dry_run": dry_run} for job in _jobs_of_kinds(dry_run=dry_run)]
    shape = "tiny" if dry_run else shape
    planned: list[Figures] = [{"name": kind, "kind": kind} for kind in ("machine", "files", "attention", "equality")]
    for workload, batch, contenders in RUNS:
        for contender in contenders:
            run = {"workload": workload, "contender": contender, "batch": min(batch, 4) if dry_run else batch}
            run["profile"] = (workload, batch, contender) in PROFILED
            planned.append({"name": f"{workload} {batch} {contender}", "kind": "throughput", **run})
    return [{**job, "shape": shape, "dry_run": dry_run} for job in planned]


def _jobs_of_kinds(*, dry_run: bool) -> Iterator[Figures]:
    yield {"name": "machine", "kind": "machine", "shape": ""}
    for shape in gpu_workloads.KINDS:
        yield {"name": f"files {shape}", "kind": "files", "shape": shape, "workloads": ["style", "short"]}
    for shape, workload, batch, contenders in KIND_RUNS:
        if workload == "equality":
            # By default Triton multiplies float32 in TF32, which keeps 19 bits.
            environment = {"TRITON_F32_DEFAULT": "ieee"}
            yield {"name": f"equality {shape}", "kind": "equality", "shape": shape, "environment": environment}
        for contender in contenders:
            run = {"workload": workload, "contender": contender, "batch": min(batch, 4) if dry_run else batch}
            name = f"{shape} {workload} {batch} {contender}"
            yield {"name": name, "kind": "throughput", "shape": shape, "profile": False, **run}


def import_everything() -> None:
    """Import what the jobs need, once, before the forks."""
    import peft  # noqa: F401
    from transformers import Qwen2ForCausalLM, Trainer  # noqa: F401

    import atomtune.cli
    import atomtune.train.run
    import atomtune.verify  # noqa: F401

    if gpu_contenders.has("trl"):
        from trl import SFTTrainer  # noqa: F401


def run_forked(job: Figures, base: Path, folder: Path, *, limit: float) -> Figures:
    """Run one job in its own process: its figures, or how it ended."""
    began = time.monotonic()
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _as_child(job, base, folder, answer, log)
    status = 0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    took = time.monotonic() - began
    figures = json.loads(answer.read_text()) if answer.exists() else {}
    if not figures:
        code = os.waitstatus_to_exitcode(status)
        figures = {"error": f"killed after {limit:.0f} s" if took > limit else f"its process ended with {code}"}
    tail = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
    return {"name": job["name"], **figures, "took_s": round(took, 1), "stderr": tail}


def _as_child(job: Figures, base: Path, folder: Path, answer: Path, log: Path) -> None:
    """Do the job, write its figures, and end the process."""
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(job.get("environment", {}))
        _prepare(folder, dry_run=job["dry_run"])
        with tempfile.TemporaryDirectory() as scratch:
            try:
                figures = KINDS[job["kind"]](job, base, folder, Path(scratch))
            except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever fails, the next job has to run
                traceback.print_exc()
                figures = {
                    "error": f"{type(error).__name__}: {str(error)[:600]}",
                    "traceback": traceback.format_exc()[-2_000:],
                    **gpu_contenders.memory_figures(),
                }
        part = answer.with_suffix(".part")
        part.write_text(json.dumps(figures), encoding="utf-8")
        part.replace(answer)  # atomic: the parent sees all figures or none
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _prepare(folder: Path, *, dry_run: bool) -> None:
    import datasets
    import torch

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    if dry_run:
        torch.set_num_threads(1)  # for tiny products, several threads only wait for each other


def summary(figures: Figures) -> str:
    """A job's line for the terminal."""
    if "left_out" in figures:
        return f"left out: {figures['left_out']}"
    if "step_ms" not in figures:
        if "error" in figures:
            return f"ERROR {' '.join(figures['error'].split())[:300]}"
        shown = {key: value for key, value in figures.items() if key not in ("name", "took_s", "stderr")}
        return json.dumps(shown)[:2_500]
    profile = figures.get("profile", {})
    idle = ""
    if "idle_share" in profile:
        idle = f" idle {profile['idle_share']:.0%}, {profile['kernels_a_step']:,.0f} kernels"
    return (
        f"{figures['examples_per_s']:8.1f} examples/s {figures['tokens_per_s']:8,.0f} tokens/s "
        f"{figures['step_ms']:7.1f} ms  {figures['peak_gb']:.1f} GB of {figures['reserved_gb']:.1f}  "
        f"{figures['share_of_matmul']:.0%} of matmul{idle}  loss {figures['loss'] or 0:.3f} {figures.get('note', '')}"
        f"{' ERROR ' + figures['error'][:200] if 'error' in figures else ''}"
    )


def table(lines: list[Figures]) -> str:
    """Markdown: the machine, the checks, and a row for each contender and workload."""
    machine = next((line for line in lines if line["name"] == "machine"), {})
    checks = ", ".join(f"{line['name']}: {line['verdict']}" for line in lines if "verdict" in line)
    rows = [
        f"{machine.get('card')}; {machine.get('matmul_tflops', 0):.0f} TFLOP/s; {machine.get('versions')}",
        f"Checks: {checks}",
        "",
        "| run | examples/s | tokens/s | ms a step | tokens a step | peak GB | share of matmul | idle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "step_ms" in line:
            idle = line.get("profile", {}).get("idle_share")
            note = f" ({line['note']})" if line.get("note") else ""
            rows.append(
                f"| {line['name']}{note} | {line['examples_per_s']:.1f} | {line['tokens_per_s']:,.0f} | "
                f"{line['step_ms']:.1f} | {line['tokens_a_step']:,.0f} | {line['peak_gb']:.1f} | "
                f"{line['share_of_matmul']:.0%} | {'' if idle is None else f'{idle:.0%}'} |"
            )
        elif "error" in line:
            rows.append(f"| {line['name']} | {' '.join(line['error'].split())[:120]} | | | | | | |")
    return "\n".join(rows)


def _bench(options: argparse.Namespace, began: float) -> list[Figures]:
    """Run the jobs that there is time for, and write each line at once."""
    lines: list[Figures] = []
    rate: Figures = {}
    with tempfile.TemporaryDirectory() as name, options.out.open("a", encoding="utf-8") as out:
        folder = Path(name)
        for job in jobs(dry_run=options.dry_run, kinds=options.kinds, shape=options.shape):
            wanted = not options.only or any(re.search(pattern, job["name"]) for pattern in options.only)
            if not wanted and job["kind"] not in ("machine", "files"):
                continue
            left = options.seconds - (time.monotonic() - began)
            if left < LEAST:
                line = {"name": job["name"], "left_out": "no time"}
            else:
                base = folder / f"base {job['shape']}"
                line = run_forked({**job, **rate}, base, folder, limit=min(LIMIT, left + LEAST))
            if "matmul_tflops" in line:
                rate = {"matmul_tflops": line["matmul_tflops"]}
            lines.append(line)
            out.write(json.dumps(line) + "\n")
            out.flush()
            now = time.monotonic() - began
            print(f"[{now:4.0f} s] {line['name']:28} {line.get('took_s', 0):5.1f} s  {summary(line)}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"), help="a line of JSON a job is added here")
    parser.add_argument("--seconds", type=float, default=420, help="after these nothing new is started")
    parser.add_argument("--only", nargs="+", default=[], help="jobs whose name has one of these", metavar="REGEX")
    parser.add_argument("--shape", choices=list(gpu_workloads.SHAPES), default="qwen2.5-7b", help="of the base")
    parser.add_argument("--kinds", action="store_true", help="models with experts and with linear attention")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes and few steps, also without a GPU")
    options = parser.parse_args()
    began = time.monotonic()
    if not (options.dry_run or gpu_workloads.has_gpu()):
        raise SystemExit(
            "There is no GPU here, and 7 billion weights do not train on a CPU in your lifetime: --dry_run."
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    import_everything()
    print(f"[{time.monotonic() - began:4.0f} s] imported", flush=True)
    lines = _bench(options, began)
    print(f"\n{table(lines)}\n\nThe lines are in {options.out}.")
    if any(line.get("verdict", "PASS") != "PASS" for line in lines):
        raise SystemExit("A check failed.")


if __name__ == "__main__":
    main()
