"""Where do a step's time and a run's memory go?

    python -m benchmarks.steps --source dialogues.jsonl

Each workload runs in its own process: `atomtune train` as in the benchmark, with its last steps under torch's profiler.
On a CPU without bfloat16 instructions use --dtype float32, which `train` uses there. Every kernel is counted once, by
its name and its shapes.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import workloads
from benchmarks.contender import BATCH, RANK, atomtune, figures_of, matmul_rate, non_embedding_weights, peak_memory_mb

PROFILED = 4  # the last steps of the run
FLOOR, SMALL, HEAD, ATTENTION = "frozen matrices", "LoRA's products", "output matrix and loss", "attention"
ELEMENTWISE, COPIES, REST = "norms, SwiGLU, RoPE, residuals", "copies and casts", "other kernels"
PYTHON = "between kernels (Python, and the profiler's own)"
#: Kernels by the beginning of their names; matrix products are told apart by their shapes.
_KINDS = {
    ATTENTION: "bmm baddbmm_ _softmax",
    HEAD: "_log_softmax nll_loss",
    COPIES: "copy_ index cat fill_ zero_ empty",
    ELEMENTWISE: "mul add silu rsqrt pow mean neg div sum sigmoid sub cos sin",
}


def kind_of(name: str, shapes: list[Any], words: int) -> str:
    """The part of a step that a kernel belongs to."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "mkldnn::_linear_pointwise"):
        sides = {side for shape in shapes for side in shape if isinstance(side, int)}
        if words in sides:
            return HEAD
        return SMALL if any(side <= 4 * RANK for side in sides if side > 1) else FLOOR
    beginnings = {kind: tuple(f"aten::{one}" for one in names.split()) for kind, names in _KINDS.items()}
    return next((kind for kind, names in beginnings.items() if name.startswith(names)), REST)


def profiled(base: Path, data: Path, dtype: str) -> dict[str, Any]:
    """Profile one run: milliseconds per step by kind, and the process's memory in MB at several points."""
    from transformers import AutoConfig, TrainerCallback

    from atomtune.train import run

    number_format = getattr(torch, dtype)
    rate = matmul_rate(number_format)  # measured again after the run, because the host is noisy
    memory = {"libraries imported": _resident_mb()}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    class Watch(TrainerCallback):
        tokens, began, step = 0, 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            memory["model loaded"] = _resident_mb()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps - PROFILED:
                memory["steps, before the profile"] = peak_memory_mb()
                profiler.start()
                Watch.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                memory["first step"] = peak_memory_mb()
            if state.global_step == state.max_steps:
                Watch.step = (time.perf_counter() - Watch.began) / PROFILED * 1e3
                profiler.stop()

    class Profiled(run.LoraTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.add_callback(Watch())

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, targets = super().get_batch_samples(*args, **kwargs)
            if self.state.global_step >= self.state.max_steps - PROFILED:
                Watch.tokens += sum(batch["input_ids"].numel() for batch in batches)
            return batches, targets

    run.LoraTrainer = Profiled  # type: ignore[misc]
    words = AutoConfig.from_pretrained(base).vocab_size
    with tempfile.TemporaryDirectory() as out:
        atomtune(base, data, out, dtype=dtype, layout="auto")
    parts: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        parts[kind_of(event.key, event.input_shapes, words)] += event.self_cpu_time_total / 1e3 / PROFILED
    floor = 4 * non_embedding_weights(base) * Watch.tokens / PROFILED / max(rate, matmul_rate(number_format)) * 1e3
    parts[PYTHON] = Watch.step - parts.total()
    tokens = Watch.tokens / PROFILED
    return {"tokens": tokens, "step": Watch.step, "floor": floor, "parts": dict(parts), "memory": memory}


def _resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="instruction/input/output JSONL")
    parser.add_argument("--records", type=int, default=16 * BATCH, help="of each workload; the last steps are profiled")
    parser.add_argument("--workloads", nargs="+", choices=workloads.NAMES, default=list(workloads.NAMES))
    parser.add_argument("--shape", choices=workloads.SHAPES, default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--one", nargs=2, type=Path, help=argparse.SUPPRESS
    )  # base and data, for the process that measures
    options = parser.parse_args()
    if options.one:
        print(json.dumps(profiled(*options.one, options.dtype)))
        return
    profiles = {}
    with tempfile.TemporaryDirectory() as folder:
        every = workloads.read(options.source, 10**9)
        base = workloads.build_base(Path(folder) / "base", every, options.shape)
        for name in options.workloads:
            data = workloads.write(name, every[: options.records], Path(folder) / f"{name}.jsonl")
            words = ["--source", str(options.source), "--one", str(base), str(data), "--dtype", options.dtype]
            profiles[name] = figures_of("benchmarks.steps", words, what=name)
    print(table(profiles))


def _row(name: str, figures: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{figure:,.0f}' for figure in figures)} |"


def table(profiles: dict[str, dict[str, Any]]) -> str:
    """All profiles as Markdown, one column per workload."""
    head = f"| | {' | '.join(profiles)} |\n|---|{'---|' * len(profiles)}"
    kinds = (FLOOR, ATTENTION, HEAD, SMALL, ELEMENTWISE, COPIES, REST, PYTHON)
    rows = [("tokens a step", "tokens"), ("a step under the profiler, ms", "step"), ("the floor, ms", "floor")]
    lines = [head, *(_row(title, [profile[key] for profile in profiles.values()]) for title, key in rows)]
    each = list(profiles.values())
    lines += [_row(f"{kind}, ms", [profile["parts"].get(kind, 0) for profile in each]) for kind in kinds]
    lines += ["", head]
    lines += [_row(f"{station}, MB", [profile["memory"][station] for profile in each]) for station in each[0]["memory"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
