"""Step graphs: on a GPU, a batch's loss and gradients are recorded once per shape and replayed.

A step of a thousand tokens launches about four thousand kernels, and the host takes longer to launch them than the GPU
to compute them. A CUDA graph launches them all at once. It reads and writes the same memory each time, so a batch is
copied to where the graph reads, and its sizes are rounded up so that there are few shapes.
Law: replayed, a batch has the same loss and gradients as in the model itself (tests/model/test_step_graphs.py). The
first replay of each shape is compared with the model's own gradients.
Letters: N targets, T tokens of the row, S spans, K gathered keys.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from atomtune.batch.attention_plan import AttentionPlan
from atomtune.model.listed_modules import learned_weights
from atomtune.model.loss import target_nats
from atomtune.model.memory import free_on_gpu, peak_bytes

#: Tokens times weights of a step that keeps the GPU busy without graphs: at 8,192 tokens a 7B model waits for the host
#: 5 % of the time.
MOST_WORK = 8_192 * 8e9
#: A shape is recorded after this many earlier steps, in which its kernels are compiled. Recording costs about a step.
SEEN_BEFORE = 1
#: Share of the free memory that recordings and the largest step may take together.
USABLE = 0.9
#: Largest relative difference of gradients: sums in another order, in 16 bits, through all layers.
MOST_APART = 0.1
#: The tensors of a batch with one item per target, and all its tensors except the plan's.
_OF_TARGETS = ("row", "predicted_from", "target", "learn")
_TENSORS = ("input_ids", "position_ids", *_OF_TARGETS)

Batch = Mapping[str, Any]


class Recorder(Protocol):
    """Records work of a device for replay, and knows the device's memory."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once and return a function that repeats it."""

    def step_bytes(self) -> int:
        """Peak bytes of a step so far, beyond what is allocated between steps."""

    def free_bytes(self) -> int:
        """Free bytes between steps."""

    def release(self) -> None:
        """Free the memory of all recordings, which are no longer used."""


class StepGraphs:
    """Records and replays the steps of one model.

    label_smoothing  as in loss.target_nats
    notice           told why recording ends, if it does
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        recorder: Recorder,
        label_smoothing: float,
        notice: Callable[[str], None],
    ) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self._most_tokens = MOST_WORK / sum(weight.numel() for weight in model.parameters())
        self.weights = learned_weights(model)
        dtypes = {weight.dtype for weight in self.weights}
        self._is_on = len(dtypes) == 1
        numbers = sum(weight.numel() for weight in self.weights)
        #: All recordings write their gradients here, flat and concatenated in the order of `weights`.
        self._grads = torch.zeros(numbers, dtype=self.weights[0].dtype, device=self.weights[0].device)
        self._recorder, self._notice = recorder, notice
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._shapes = self._played = self._launched = 0  # numbers of shapes recorded, and of batches
        self._most_apart = self._seconds = 0.0
        self._longest = 0  # tokens of the longest batch computed so far
        self._no_room: dict[str, int] = {}

    def figures(self) -> dict[str, Any]:
        """Figures for run.json.

        shapes, seconds      how many shapes were recorded, and the time for recording and comparing them
        replayed, launched   batches replayed, and batches computed kernel by kernel
        apart                largest relative difference of replayed gradients from the model's own
        no_room              the last batch that was not recorded for lack of memory: tokens, bytes needed, bytes free
        """
        return {
            "shapes": self._shapes, "seconds": self._seconds, "replayed": self._played,
            "launched": self._launched, "apart": self._most_apart, "no_room": self._no_room,
        }  # fmt: skip

    def nats(self, batch: Batch) -> torch.Tensor:
        """The nats of loss.target_nats for this batch, replayed if its shape was seen before."""
        if not self._takes(batch):
            return self._launch(batch)
        fewer_shapes = rounded(batch)
        shape = _shape(fewer_shapes)
        recording = self._recordings.get(shape)
        if recording is None:
            self._seen[shape] += 1
            if self._seen[shape] <= SEEN_BEFORE or not self._has_room(batch):
                return self._launch(batch)
            began = time.perf_counter()
            recording = self._recorded(batch, fewer_shapes)
            self._seconds += time.perf_counter() - began
            if recording is None:
                return self._launch(batch)
            self._recordings[shape] = recording
            self._shapes += 1
        self._played += 1
        return recording.play(fewer_shapes)

    def _takes(self, batch: Batch) -> bool:
        plan: AttentionPlan | None = batch["plan"]
        return (
            self._is_on
            and plan is not None
            and plan.mixers is None  # carried states would need another graph for each row
            and len(batch["target"]) > 0
            and len(plan.until) <= self._most_tokens
        )

    def _has_room(self, batch: Batch) -> bool:
        """Whether a recording, which keeps the memory of its step, leaves enough for the longest step so far.

        All recordings share one memory pool, so only the longest of them counts.
        """
        bytes_a_token = self._recorder.step_bytes() / self._longest
        tokens, free = batch["input_ids"].shape[1], self._recorder.free_bytes()
        needed = bytes_a_token * (tokens + self._longest)
        if needed <= USABLE * free:
            return True
        self._no_room = {"tokens": tokens, "needed": int(needed), "free": free}
        return False

    def _launch(self, batch: Batch) -> torch.Tensor:
        """Compute the batch kernel by kernel; if memory runs out, drop the recordings and try again."""
        self._launched += 1
        if not (self._recordings and torch.is_grad_enabled()):
            return self._computed(batch)
        nats = self._whole(batch)
        if nats is not None:
            return nats
        self._end(f"a step of {batch['input_ids'].shape[1]:,} tokens did not fit in memory along with them")
        return self._computed(batch)

    def _whole(self, batch: Batch) -> torch.Tensor | None:
        """Compute loss and gradients at once; None if they do not fit in memory."""
        try:
            nats = self._computed(batch)
            _keep(torch.autograd.grad(nats, self.weights, materialize_grads=True), self._grads)
        except torch.OutOfMemoryError:
            return None
        return _Played.apply(nats.detach(), self._grads, *self.weights)

    def _computed(self, batch: Batch) -> torch.Tensor:
        self._longest = max(self._longest, batch["input_ids"].shape[1])
        return target_nats(self.model, batch, label_smoothing=self.label_smoothing)[0]

    def _recorded(self, batch: Batch, fewer_shapes: Batch) -> "_Recording | None":
        """Record the batch's shape; None if that fails, after which nothing more is recorded."""
        try:
            recording = _Recording(fewer_shapes, self.model, self._computed, self.weights, self._grads, self._recorder)
            apart = self._apart(recording, batch, fewer_shapes)
            self._most_apart = max(self._most_apart, apart)
            if apart <= MOST_APART:  # False for NaN too
                return recording
            reason = f"gradients differ by {apart:.1%}"
        # Code that waits for the device cannot be recorded, or there is not enough memory
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        self._end(reason)
        return None

    def _end(self, reason: str) -> None:
        """Stop recording and replaying for the rest of the run."""
        self._is_on = False
        self._recordings.clear()
        self._recorder.release()
        self._notice(f"steps are not replayed as CUDA graphs, which costs small steps some speed: {reason}")

    def _apart(self, recording: "_Recording", batch: Batch, fewer_shapes: Batch) -> float:
        """Relative norm of the difference between the replayed gradients and the model's own."""
        device = self.weights[0].device
        # Both computations and the following step draw the same dropout, because the generator is restored each time.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            own = torch.autograd.grad(self._computed(batch), self.weights, materialize_grads=True)
        with torch.random.fork_rng(devices):
            played = torch.autograd.grad(recording.play(fewer_shapes), self.weights)
        difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(own, played, strict=True)])
        return float(difference / torch.nn.utils.get_total_norm(own))


class GpuRecorder:
    """Records CUDA graphs that share one memory pool, since a step is over before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record a graph. If that fails, restore the device's random generator and raise the error of `work`."""
        try:
            return self._capture(work)
        except RuntimeError as error:
            # The error at the end of a capture only says that something failed earlier; its context is that failure.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        # A failed capture leaves the random generator waiting for its end; a capture that succeeds releases it.
        self._capture(lambda: torch.zeros(1, device=self.device), shares=False)
        raise cause

    def _capture(self, work: Callable[[], Any], *, shares: bool = True) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads stay out of the capture: the one that pins the next batch continues.
        with torch.cuda.graph(graph, pool=self._pool if shares else None, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def step_bytes(self) -> int:
        return peak_bytes(self.device) - torch.cuda.memory_allocated(self.device)

    def free_bytes(self) -> int:
        return free_on_gpu(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()


class _Recording:
    """The recording of one shape, with the memory for its batch, loss and gradients."""

    def __init__(  # noqa: PLR0917
        self,
        batch: Batch,
        model: nn.Module,
        nats_of: Callable[[Batch], torch.Tensor],
        weights: Sequence[torch.Tensor],
        place: torch.Tensor,
        recorder: Recorder,
    ) -> None:
        """place [sum of all weights' sizes] is where the gradients are written"""
        self._weights, self._place = weights, place
        self._inputs = [tensor.clone() for tensor in _tensors(batch)]

        def work() -> None:
            # Build a new plan, so that what it caches (a mask) is computed from the tensors that the graph reads.
            with torch.enable_grad(), _new_leaves(model) as leaves:
                nats = nats_of(_with_tensors(batch, self._inputs))
                _keep(torch.autograd.grad(nats, leaves, materialize_grads=True), place)
            self._nats = nats.detach()

        self._play = recorder.record(work)

    def play(self, batch: Batch) -> torch.Tensor:
        """Replay with this batch; returns the loss, with gradients for the weights."""
        for place, tensor in zip(self._inputs, _tensors(batch), strict=True):
            place.copy_(tensor)
        self._play()
        return _Played.apply(self._nats, self._place, *self._weights)


@contextmanager
def _new_leaves(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The trained weights, in the order of `parameters`, replaced by new autograd leaves that share their memory.

    An old leaf belongs to the stream of the step that first used it, as long as that step's graph is alive. A recording
    that passes a gradient to that stream fails.
    """
    # Parameters too, because loss.Head takes any other class of weight for a sharded one.
    leaves = {id(w): nn.Parameter(w.detach()) for w in model.parameters() if w.requires_grad}
    places = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(weight) in leaves
    ]
    try:
        for module, name, weight in places:
            setattr(module, name, leaves[id(weight)])
        yield list(leaves.values())
    finally:
        for module, name, weight in places:
            setattr(module, name, weight)


def _keep(grads: Sequence[torch.Tensor], place: torch.Tensor) -> None:
    """Write all gradients to `place`, flat and concatenated."""
    torch.cat([grad.flatten() for grad in grads], out=place)


class _Played(torch.autograd.Function):
    """A loss whose gradients are already known, up to a factor that backward is given."""

    @staticmethod
    def forward(ctx: Any, nats: torch.Tensor, grads: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.grads, ctx.shapes = grads, [weight.shape for weight in weights]
        return nats.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (ctx.grads * factor).split([shape.numel() for shape in ctx.shapes])
        return None, None, *(grad.view(shape) for grad, shape in zip(scaled, ctx.shapes, strict=True))


def rounded(batch: Batch) -> Batch:
    """The same batch with rounded sizes: extra targets are learned zero times, and extra spans have no queries.

    A row of T tokens has at most T targets; their number is rounded up to T / 4, T / 2, 3 T / 4 or T.
    """
    targets, step = len(batch["target"]), -(-batch["input_ids"].shape[1] // 4)
    padding = -targets % step
    padded = {name: functional.pad(batch[name], (0, padding)) for name in _OF_TARGETS}
    return {**batch, **padded, "plan": batch["plan"].to(batch["target"].device).rounded()}


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [*(batch[name] for name in _TENSORS), *batch["plan"].tensors()]


def _with_tensors(batch: Batch, tensors: Sequence[torch.Tensor]) -> Batch:
    """The batch with its tensors replaced by these."""
    rest = iter(tensors)
    return {**batch, **{name: next(rest) for name in _TENSORS}, "plan": batch["plan"].with_tensors(rest)}


def _shape(batch: Batch) -> Hashable:
    """A key that is equal for batches with the same recording."""
    spans = batch["plan"].spans
    longest = tuple((window, each.longest_queries, each.longest_keys) for window, each in spans.items())
    return tuple(tensor.shape for tensor in _tensors(batch)), longest
