"""Time one contender on a GPU: warm-up steps, then measured steps for a fixed time, then three profiled steps."""

import json
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.contender import finish

PROFILED_STEPS = 3
#: Kinds of kernels by their names, the first that fits.
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(sdp|fprop|bprop|mha)"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|splitK|cublas|gemv"),
    ("optimizer and norms of gradients", r"multi_tensor|fused_adam|lpnorm|foreach"),
    ("loss", r"softmax|nll|cross_entropy"),
    ("Liger", r"triton|liger|_rms|_swiglu|rope"),
    ("copies and casts", r"memcpy|memset|copy|CatArray|index|gather|scatter|transpose|fill"),
    ("reductions", r"reduce|norm|isfinite"),
    ("elementwise", r"elementwise|vectorized|unrolled|silu|mul|add|rsqrt|pow|neg|dropout|bernoulli|distribution"),
)


class Meter(TrainerCallback):
    """Times the steps of a Trainer; before each step, the trainer reports the step's content with `count`."""

    def __init__(self, *, dry_run: bool, profile: bool, warm_up: int = 4) -> None:
        self.warm_up, self.seconds = (2, 0.1) if dry_run else (warm_up, 2.5)
        self.fewest, self.most = (1, 1) if dry_run else (4, 16)
        self.profiles = profile and torch.cuda.is_available()
        self.figures: dict[str, Any] = {}
        self._counts: list[tuple[int, int]] = []  # (tokens, examples) of each step
        self._measured = 0
        self._profiler: Any = None

    def count(self, *, tokens: int, examples: int) -> None:
        """Note what the next step computes."""
        self._counts.append((tokens, examples))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == 1:
            finish()
            self.figures["first_step_s"] = time.perf_counter() - self._began
            self._began = time.perf_counter()
        elif step == self.warm_up:
            finish()
            each = (time.perf_counter() - self._began) / (step - 1)
            self._measured = max(self.fewest, min(self.most, math.ceil(self.seconds / each)))
            self._began = time.perf_counter()
        elif self._measured and step == self.warm_up + self._measured:
            finish()
            self._finish(time.perf_counter() - self._began)
            if self.profiles:
                self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._profiler.start()
                self._began = time.perf_counter()
            else:
                control.should_training_stop = True
        elif self._profiler and step == self.warm_up + self._measured + PROFILED_STEPS:
            finish()
            seconds = time.perf_counter() - self._began
            self._profiler.stop()
            self.figures["profile"] = kernels(trace_of(self._profiler), seconds)
            self._profiler = None
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "seconds" not in self.figures and self._measured:  # the records ended before the planned steps
            finish()
            self._measured = state.global_step - self.warm_up
            self._finish(time.perf_counter() - self._began)

    def _finish(self, seconds: float) -> None:
        counts = self._counts[self.warm_up : self.warm_up + self._measured]
        tokens, examples = (sum(column) for column in zip(*counts, strict=True))
        self.figures |= {
            "steps": self._measured,
            "seconds": seconds,
            "step_ms": 1e3 * seconds / self._measured,
            "tokens_a_step": tokens / self._measured,
            "tokens_per_s": tokens / seconds,
            "examples_per_s": examples / seconds,
        }


def trace_of(profiler: Any) -> list[dict[str, Any]]:
    """The profiler's events, in the format of a Chrome trace; times in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))["traceEvents"]


def kernels(events: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Idle share of the device, kernels per step and time by kind of kernel, over the profiled steps.

    seconds  wall-clock time of all profiled steps
    """
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_device:
        return {"error": "no kernels seen"}
    by_kind: Counter[str] = Counter()
    by_name: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in on_device:
        kind = next((kind for kind, names in KINDS if re.search(names, event["name"], re.IGNORECASE)), "other")
        by_kind[kind] += event["dur"]
        # Products of different shapes may share a kernel; the launch grid tells them apart.
        key = (event["name"], str(event.get("args", {}).get("grid", "")))
        by_name[key] += event["dur"]
        calls[key] += 1
    busy, end = 0.0, 0.0
    for begin, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in on_device):
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    waits = Counter(event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {
        "idle_share": 1 - busy / (1e6 * seconds),
        "step_ms": 1e3 * seconds / PROFILED_STEPS,
        "busy_ms": busy / 1e3 / PROFILED_STEPS,
        "kernels_a_step": len(on_device) / PROFILED_STEPS,
        "kinds_ms": {kind: round(time_us / 1e3 / PROFILED_STEPS, 2) for kind, time_us in by_kind.most_common()},
        "longest_ms": [
            [name[:110], grid, round(calls[name, grid] / PROFILED_STEPS, 1), round(us / 1e3 / PROFILED_STEPS, 2)]
            for (name, grid), us in by_name.most_common(60)
        ],
        "calls_a_step": {name: round(times / PROFILED_STEPS, 1) for name, times in waits.most_common(10)},
    }
