"""Is what the GPU computes right? The machine, each implementation of row attention, and the comparison of `verify`.

machine    the card, versions, and the rates of large matrix products and of copies
attention  output and gradients of each implementation against a dense softmax in float64; then the time of a layer
equality   atomtune.verify.Check on a small base with random weights, by dtype, layout and attention
"""

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_workloads
from benchmarks.contender import finish
from benchmarks.gpu_workloads import device, has_gpu

Figures = dict[str, Any]

#: Largest relative L2 error of a correct result: bfloat16 keeps 8 bits, and sums of a few hundred terms lose some.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


# --- machine ---------------------------------------------------------------------------------------------------------


def machine(job: Figures, base: Path, folder: Path, scratch: Path) -> Figures:
    size, times = (256, 2) if job["dry_run"] else (8192, 20)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    product_seconds = seconds_of(lambda: a @ b, times=times)
    source = torch.empty(2**16 if job["dry_run"] else 2**31, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy_seconds = seconds_of(lambda: target.copy_(source), times=10)
    packages = ("torch", "transformers", "peft", "trl", "liger_kernel", "triton")
    # Once per step the trainer takes one norm over all gradients: it must be NaN or infinite if any gradient is.
    norms = [_largest_beside(float(bad)) for bad in ("nan", "inf")]
    return {
        "card": torch.cuda.get_device_name() if has_gpu() else "a CPU",
        "matmul_tflops": 2 * size**3 / product_seconds / 1e12,
        "copy_tb_s": 2 * len(source) / copy_seconds / 1e12,
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "python": sys.version.split()[0],
        "verdict": "PASS" if norms == ["nan", "inf"] else f"FAIL: a norm over NaN and inf says {norms}",
    }


def _largest_beside(bad: float) -> str:
    gradients = [torch.ones(9, device=device()), torch.tensor([1.0, bad], device=device())]
    return str(torch.nn.utils.get_total_norm(gradients, float("inf")).item())


def seconds_of(work: Callable[[], Any], *, times: int = 10) -> float:
    """Mean seconds of a call, after three calls as warm-up."""
    for _ in range(3):
        work()
    finish()
    began = time.perf_counter()
    for _ in range(times):
        work()
    finish()
    return (time.perf_counter() - began) / times


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


# --- attention -------------------------------------------------------------------------------------------------------


def small_rows() -> Iterator[tuple[str, Any]]:
    """(name, Row) of a few hundred tokens, for the check."""
    from atomtune.batch.pack import pack
    from atomtune.batch.tree import graft

    draw = random.Random(0)
    prefix, middles = _ids(draw, 75), [_ids(draw, 33) for _ in range(3)]
    yield "two levels", graft(_examples([prefix + middles[n % 3] + _ids(draw, draw.randint(5, 60)) for n in range(9)]))
    yield "tree", graft(_examples([prefix + _ids(draw, draw.randint(5, 60)) for _ in range(9)]))
    yield "packed", pack(_examples([_ids(draw, draw.randint(3, 90)) for _ in range(9)]))


def large_rows() -> Iterator[tuple[str, Any]]:
    """(name, Row) like the workloads' rows, for timing."""
    from atomtune.batch.pack import pack
    from atomtune.batch.tree import graft

    draw = random.Random(0)
    style = _ids(draw, 225)
    for count in (16, 64):
        yield f"style {count}", graft(_examples([style + _ids(draw, draw.randint(20, 100)) for _ in range(count)]))
    yield "short 64", pack(_examples([_ids(draw, draw.randint(25, 95)) for _ in range(64)]))
    yield "long 1", pack(_examples([_ids(draw, 3_072)]))
    yield "long 4", pack(_examples([_ids(draw, draw.randint(2_200, 3_800)) for _ in range(4)]))


def _ids(draw: random.Random, number: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1_000) for _ in range(number))


def _examples(records: list[tuple[int, ...]]) -> list[Any]:
    from atomtune.data.records import Example

    return [Example(record, (0,) * len(record), "") for record in records]


#: Heads, key heads, their width, the values' width, window, soft cap, sinks.
CASES: dict[str, Figures] = {
    "Qwen2.5-7B": {"heads": 28, "key_heads": 4, "width": 128},
    "as many heads of keys": {"heads": 8, "key_heads": 8, "width": 64},
    "width 80": {"heads": 8, "key_heads": 2, "width": 80},
    "window 40": {"heads": 8, "key_heads": 2, "width": 64, "window": 40},
    "latent attention, 192 and 128": {"heads": 8, "key_heads": 8, "width": 192, "value_width": 128},
    "sinks": {"heads": 8, "key_heads": 2, "width": 64, "sinks": True},
    "sinks and a window": {"heads": 8, "key_heads": 2, "width": 64, "sinks": True, "window": 40},
    "soft cap": {"heads": 8, "key_heads": 2, "width": 64, "softcap": 1.0},
}
#: Cases that the dry run checks.
DRY_CASES = ("width 80", "window 40", "sinks", "soft cap")


class Layer:
    """One layer's inputs over a row, and its attention by each implementation."""

    def __init__(self, row: Any, case: Figures, dtype: torch.dtype) -> None:
        from atomtune.batch.attention_plan import padded_length, plan_attention

        tokens = padded_length(len(row))
        self.window, self.softcap = case.get("window"), case.get("softcap")
        cut = {"windows": (None, self.window), "width": tokens}
        self.plans = {name: plan_attention(row, **cut, cut=name).to(device()) for name in ("spans", "blocks")}
        draw = torch.Generator(device()).manual_seed(0)
        heads, width, value_width = case["heads"], case["width"], case.get("value_width", case["width"])

        def normal(count: int, wide: int) -> torch.Tensor:
            x = torch.randn(1, tokens, count, wide, generator=draw, device=device(), dtype=torch.float32)
            return x.to(dtype)

        shapes = ((heads, width), (case["key_heads"], width), (case["key_heads"], value_width))
        self.inputs = [normal(count, wide).transpose(1, 2).requires_grad_() for count, wide in shapes]
        self.grad = normal(heads, value_width)
        self.grad[:, len(row) :] = 0  # nothing reads the output of padding
        self.real = len(row)
        self.sinks = None
        if case.get("sinks"):
            self.sinks = torch.randn(heads, generator=draw, device=device()).to(dtype).requires_grad_()

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [*self.inputs, *([] if self.sinks is None else [self.sinks])]

    def result(self, way: str) -> list[torch.Tensor]:
        """[out, dq, dk, dv, and the gradient of sinks if any] of the row's real tokens, by one implementation."""
        out = self.output(way)
        return self._real(out, torch.autograd.grad(out, self.leaves, self.grad))

    def output(self, way: str) -> torch.Tensor:
        """[1, T, H, D']; makes `attend` use the given implementation."""
        from atomtune.model import row_attention

        row_attention.method_of = lambda *_, **__: way  # type: ignore[assignment, return-value]
        plan = self.plans["blocks" if way == "blocks" else "spans"]
        keywords = {"sliding_window": self.window, "softcap": self.softcap, "s_aux": self.sinks}
        keywords[row_attention.ROW_PLAN] = plan
        out, _ = row_attention.attend(torch.nn.Module(), *self.inputs, None, **keywords)
        return out

    def dense(self) -> list[torch.Tensor]:
        """The same from a dense softmax in float64, written like in a textbook."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        q, k, v = leaves[:3]
        groups = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~self.plans["spans"].visible(self.window), -torch.inf)
        if self.sinks is not None:
            sinks = leaves[3][None, :, None, None].expand(1, -1, scores.shape[2], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)
        return self._real(out, torch.autograd.grad(out, leaves, self.grad.double()))

    def _real(self, out: torch.Tensor, grads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        of_tokens = [grad[:, :, : self.real] for grad in grads[:3]]
        return [out.detach()[:, : self.real], *of_tokens, *grads[3:]]


def attention(job: Figures, base: Path, folder: Path, scratch: Path) -> Figures:
    """Errors first, so that a wrong kernel shows within seconds; then times."""
    worst: dict[str, float] = {}
    wrong: list[str] = []
    rows = list(small_rows())[: 1 if job["dry_run"] else None]
    cases = {name: CASES[name] for name in DRY_CASES} if job["dry_run"] else CASES
    for row_name, row in rows:
        for case_name, case in cases.items():
            for dtype, limit in LIMITS.items():
                _check(f"{row_name}, {case_name}", Layer(row, case, dtype), dtype, limit, worst, wrong)
    times = {} if job["dry_run"] else _times_a_layer()
    return {"verdict": "FAIL" if wrong else "PASS", "worst": worst, "wrong": wrong[:20], "ms_a_layer": times}


def _check(  # noqa: PLR0917
    label: str, layer: Layer, dtype: torch.dtype, limit: float, worst: dict[str, float], wrong: list[str]
) -> None:
    """Compare each implementation with the dense one; `worst` gets the largest errors, `wrong` those too large."""
    reference = layer.dense()
    # The fused kernels with a mask support neither sinks nor soft caps, and `attend` does not use them for these.
    over_mask = layer.sinks is None and layer.softcap is None
    for way in ("spans", "mask", "blocks") if over_mask else ("spans", "blocks"):
        kind = f"{way} {str(dtype).removeprefix('torch.')}"
        try:
            apart = [_apart(*pair) for pair in zip(layer.result(way), reference, strict=True)]
        except Exception as error:  # noqa: BLE001  # the other implementations still have to be checked
            wrong.append(f"{label}, {kind}: {type(error).__name__}: {str(error)[:200]}")
            continue
        worst[kind] = max(worst.get(kind, 0.0), *apart)
        limits = [limit] * 4 + [4 * limit]  # a sink's gradient sums terms of both signs over all tokens
        if not all(error < bound for error, bound in zip(apart, limits, strict=False)):  # false for NaN too
            wrong.append(f"{label}, {kind}: out, dq, dk, dv (and the sinks' gradient) differ by {apart}")


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 norm of the difference."""
    return float(f"{((ours.double() - theirs).norm() / theirs.norm()).item():.2e}")


def _times_a_layer() -> dict[str, Figures]:
    """Milliseconds for forward and backward of one layer's attention in a Qwen2.5-7B, bfloat16."""
    times: dict[str, Figures] = {}
    for name, row in large_rows():
        layer = Layer(row, CASES["Qwen2.5-7B"], torch.bfloat16)
        tokens = layer.grad.shape[1]
        times[name] = {"tokens": tokens}
        for way in ("spans", "mask") if tokens <= 8_192 else ("spans",):

            def both(way: str = way, layer: Layer = layer) -> None:
                torch.autograd.grad(layer.output(way), layer.inputs, layer.grad)

            times[name][way] = round(1e3 * seconds_of(both, times=20), 3)
            times[name][f"{way}, replayed"] = round(1e3 * seconds_of(_recorded(both), times=20), 3)
    return times


def _recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as a CUDA graph, which is timed without the host's time to launch kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


# --- equality --------------------------------------------------------------------------------------------------------


def equality(job: Figures, base: Path, folder: Path, scratch: Path) -> Figures:
    """Run the comparison of `atomtune verify` for each dtype and layout, and for trees also with spans."""
    from atomtune.console import Console
    from atomtune.model import liger, row_attention
    from atomtune.settings.command_settings import VerifySettings
    from atomtune.verify import Check

    small = scratch / "base"
    shutil.copytree(base, small)
    _fewer_layers(job).save_pretrained(small)
    gpu_workloads.load_random_weights()
    settings = VerifySettings(model_path=str(small), dataset_path=str(folder / "style.jsonl"), lora_rank=8)
    examples = gpu_workloads.encoded(base, folder / "style.jsonl")[
        :6
    ]  # plain PEFT computes one record at a time, at the host's pace
    chosen = row_attention.method_of
    kernels = liger.Circumstances(wanted=None, device=device().type, is_installed=liger.is_installed())
    figures: Figures = {}
    runs = [("tree", ""), ("packed", ""), ("padded", ""), ("tree", "spans")]
    if job["shape"] in gpu_workloads.KINDS:
        runs = runs[:1]
        gpu_workloads.take_kernels_untuned()
    for dtype in (torch.bfloat16, torch.float32):
        for layout, way in runs:
            row_attention.method_of = (lambda *_, way=way, **__: way) if way else chosen
            if way and not has_gpu():
                continue  # on a CPU the plan has blocks and no spans
            compared = Check(
                examples=examples, model=settings, lora=settings, wanted=layout, kernels=kernels, device=device(),
                pad_id=0, per_batch=6, console=Console(speaks=False),
            ).compare(dtype)  # fmt: skip
            name = f"{str(dtype).removeprefix('torch.')} {layout} {way}".strip()
            apart = {
                measure.name: [_short(measure.difference), _short(measure.allowed)] for measure in compared.measures
            }
            print(name, compared.holds, apart, flush=True)  # stays in the log of a job that is killed
            figures[name] = {"holds": compared.holds, "layout": compared.layout, "apart, allowed": apart}
    verdict = "PASS" if all(found["holds"] for found in figures.values()) else "FAIL"
    return {"verdict": verdict, "comparisons": figures}


def _fewer_layers(job: Figures) -> Any:
    """The config of a model small enough to compute records one at a time."""
    if job["shape"] in gpu_workloads.KINDS:
        return gpu_workloads.config_of(job["shape"], layers=4, small=job["dry_run"])
    return gpu_workloads.config_of("tiny" if job["dry_run"] else "qwen2.5-0.5b")


def _short(value: float) -> float:
    return float(f"{value:.2e}")
