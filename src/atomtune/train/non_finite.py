"""Non-finite steps: a loss or gradient that is not finite changes no weight, and the check does not wait for the GPU.

torch's fused optimizers can skip a step on the device (`found_inf`, made for float16's scaler). With one of them on a
single GPU, the numbers of a step are copied to the host while the next step computes, and judged then. Otherwise they
are judged before the update.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atomtune.errors import RunFailed, listing
from atomtune.model.listed_modules import learned_weights
from atomtune.train.callbacks import WorkCounter
from atomtune.train.ranks import local, mean_over_ranks, of_all_ranks, on_any_rank

#: Devices on which a step is judged during the next one.
JUDGED_LATER = ("cuda",)


@dataclass(frozen=True)
class _Step:
    """What is checked of a step.

    number         from 1
    origins        of each micro-batch's records
    read           returns the largest absolute gradient and each micro-batch's loss, once they are on the host
    has_gradients  whether the gradients are whole; if they are sharded, this rank's part may be zero without a fault
    """

    number: int
    origins: Sequence[Sequence[str]]
    read: Callable[[], list[float]]
    has_gradients: bool


class SkipNonFinite(TrainerCallback):
    """Skips steps that are not finite, or ends the run.

    budget  how many steps of a run may be skipped; one more ends it
    Steps whose gradients are all zero change nothing; they are counted and reported.
    """

    #: How many steps without a gradient are reported; all are counted.
    WARNINGS = 5

    def __init__(self, work: WorkCounter, *, budget: int, notice: Callable[[str], None]) -> None:
        self.work, self.budget, self.notice = work, budget, notice
        self._micro_batches: list[tuple[torch.Tensor, Sequence[str]]] = []  # (loss, origins) of the current step
        self._waiting: _Step | None = None  # made or skipped on the device, but not judged yet
        # Counted since the last log.
        self._steps = self._skipped = 0
        self._skipped_loss = 0.0

    def finite_loss(self, loss: torch.Tensor, origins: Sequence[str]) -> torch.Tensor:
        """A micro-batch's loss, or zero if it is not finite, which `mean_of_steps_made` then leaves out."""
        self._micro_batches.append((loss.detach(), origins))
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the losses and gradients of the step before the optimizer changes the weights.

        With a fused optimizer on one GPU, the device itself skips a bad step, and the step is judged during the next
        one. Otherwise it is judged here, and a bad one loses its gradients.
        """
        self.judge(args)  # the step before
        weights = [weight for weight in learned_weights(model) if weight.grad is not None]
        gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:
            gradients = []  # float16's scaler skips such gradients itself
        numbers = self._largest_gradient_and_losses(gradients)
        is_sharded = any(hasattr(weight.grad, "to_local") for weight in weights)
        is_alone = args.world_size == 1 and not is_sharded
        fused = _leaves_out_on_device(optimizer, numbers.device) if is_alone else None
        self._waiting = _Step(
            state.global_step + 1,
            [origins for _, origins in self._micro_batches],
            numbers.tolist if fused is None else _copied_to_host(numbers),
            bool(gradients) and not is_sharded,
        )
        if fused is not None:
            fused.found_inf = (~numbers.isfinite()).any().float()  # type: ignore[attr-defined]
        elif not self.judge(args):
            if scaler is not None:
                # A scaler that has looked at no gradient refuses to step. It raises RuntimeError if it has looked
                # already: the Trainer lets it when it clips, and in 5.24 also when it only measures the norm.
                with contextlib.suppress(RuntimeError):
                    scaler.unscale_(optimizer.optimizer)  # type: ignore[union-attr]
            for weight in weights:
                weight.grad = None  # the optimizer then skips this weight

    def _largest_gradient_and_losses(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """[1 + micro-batches] the largest absolute gradient, and each micro-batch's loss, on the losses' device."""
        # The maximum is finite if all gradients are; unlike a sum of squares, it does not overflow.
        numbers = [torch.nn.utils.get_total_norm(gradients, math.inf), *(loss for loss, _ in self._micro_batches)]
        device = numbers[-1].device
        exact = [number.to(device, torch.promote_types(number.dtype, torch.float32)) for number in numbers]
        return torch.stack(exact)

    def judge(self, args: TrainingArguments) -> bool:
        """Judge the last step if that is not done yet; returns whether it was made.

        Raises RunFailed if more steps than `budget` would be skipped.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return True
        step, (largest, *losses) = waiting.number, waiting.read()
        spoiled = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if on_any_rank(bool(spoiled) or not math.isfinite(largest), args):
            cause = f"The loss is {losses[spoiled[-1]]}" if spoiled else "A gradient is not finite"
            origins = [origin for number in spoiled or range(len(losses)) for origin in waiting.origins[number]]
            records = listing(of_all_ranks(origins, args))
            self._leave_out(f"{cause} at step {step}, in a batch with these records:\n{records}")
            # The Trainer logs the mean over ranks, and the losses of other ranks may be finite.
            self._skipped_loss += mean_over_ranks(sum(loss for loss in losses if math.isfinite(loss)), args)
            return False
        if largest == 0 and waiting.has_gradients:
            self._warn_of_no_gradient(step, [origin for origins in waiting.origins for origin in origins])
        return True

    def _leave_out(self, place: str) -> None:
        if self.work.skipped_steps >= self.budget:
            self._end_the_run(place)
        self.work.skipped_steps += 1
        self.notice(f"{place}\nThe step is skipped ({self.work.skipped_steps} of at most {self.budget}).")
        self._skipped += 1

    def _warn_of_no_gradient(self, step: int, records: Sequence[str]) -> None:
        """Count and report a step with zero gradients; clipping makes them zero if their norm overflows."""
        self.work.steps_without_gradient += 1
        if self.work.steps_without_gradient > self.WARNINGS:
            return
        self.notice(
            f"every gradient is zero at step {step}, so this step teaches nothing. The gradients may be so large that "
            "--max_grad_norm clips them to zero: look at these records, or lower --learning_rate.\n"
            f"{listing(records, 5)}"
        )

    def _end_the_run(self, place: str) -> NoReturn:
        skipped = self.work.skipped_steps
        earlier = f"{skipped} such steps were skipped before. " if skipped else ""
        raise RunFailed(
            f"{place}\n{earlier}The adapter on disk is the one of the last checkpoint. "
            "Lower --learning_rate, pass --dtype bfloat16 (or float32) instead of float16, or skip up to N such steps "
            "with --skip_nonfinite N."
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        self._micro_batches = []

    def mean_of_steps_made(self, mean: float) -> float | None:
        """The mean loss since the last log without the skipped steps; None if no step was made.

        All of these steps must have been judged.
        """
        steps, skipped, skipped_loss = self._steps, self._skipped, self._skipped_loss
        self._steps, self._skipped, self._skipped_loss = 0, 0, 0.0
        if not skipped:
            return mean
        steps_made = steps - skipped
        if steps_made <= 0:
            return None
        return (mean * steps - skipped_loss) / steps_made


def _leaves_out_on_device(optimizer: Any, device: torch.device) -> Optimizer | None:
    """The optimizer inside accelerate's, if it can skip a step whose `found_inf` is 1 on the device; else None."""
    if device.type not in JUDGED_LATER or type(optimizer) is not AcceleratedOptimizer:  # DeepSpeed has another class
        return None
    if optimizer.scaler is not None:
        return None  # the scaler sets found_inf itself, and checks gradients only
    inner = optimizer.optimizer
    # Private: float16's scaler reads the same attribute. A resumed run's parameter groups come from the checkpoint, so
    # their own `fused` decides.
    is_able = getattr(inner, "_step_supports_amp_scaling", False)
    return inner if is_able and all(group.get("fused") for group in inner.param_groups) else None


def _copied_to_host(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying; returns a function that waits only for the copy, not for later work of the device."""
    if numbers.device.type != "cuda":  # for tests: a CPU has nothing to wait for
        return numbers.tolist
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
