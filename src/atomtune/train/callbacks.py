"""Watch: callbacks that count a run's work, stop it in good order, and look at what it learns from.

Before: run.py hands in the limits.  After: trainer.py asks them around each step.
"""

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from atomtune.errors import RunFailed, listing
from atomtune.train.ranks import of_all_ranks, on_any_rank

#: What asks a run to stop. A launcher sends TERM, a terminal INT or HUP, a cluster's scheduler USR1 before its limit.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class WorkCounter(TrainerCallback, ExportableState):
    """Counts what the run computed; carried through checkpoints, so that a resumed run's figures are of the whole.

    owes_evaluation  an evaluation was given up for a stop; the resumed run makes it first
    """

    def __init__(self) -> None:
        self.tokens_computed = 0
        self.tokens_padded = 0
        self.examples = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self.owes_evaluation = False
        self._since = 0.0

    def add(self, *, tokens_computed: int, tokens_padded: int, examples: int) -> None:
        self.tokens_computed += tokens_computed
        self.tokens_padded += tokens_padded
        self.examples += examples

    def state(self) -> dict[str, Any]:
        names = ("tokens_computed", "tokens_padded", "examples", "skipped_steps", "owes_evaluation")
        return {"args": {}, "attributes": {**{n: getattr(self, n) for n in names}, "seconds": self.elapsed()}}

    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds, self._since = self.elapsed(), 0.0


class Stop(TrainerCallback):
    """A signal or the end of the time ends the run after its step, with a checkpoint; a second signal ends it at once.

    reason  why this rank or another asked to stop, once all have agreed
    """

    def __init__(self, *, deadline: float | None, said: str) -> None:
        self.received: int | None = None
        self.reason: str | None = None
        self._deadline, self._said = deadline, said
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this rank was told to stop."""
        return self.received is not None or self._late()

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.received = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has a run outlive its terminal
                self._before[number] = signal.signal(number, self._receive)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if on_any_rank(self.asked, args) and state.global_step < state.max_steps:
            self.agree(control)

    def agree(self, control: Any) -> None:
        """All ranks stop here, with a checkpoint."""
        if self.received is not None:
            self.reason = f"{signal.Signals(self.received).name} received"
        else:
            self.reason = self._said if self._late() else "another rank was told to stop"
        control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()


class AtBegin(TrainerCallback):
    """Does something before the first step, when a resumed run has its state again."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action()


class LogWhatIsSaved(TrainerCallback):
    """The losses since the last log go into the history before a checkpoint and at the end, so none is lost with it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


class FiniteSteps(TrainerCallback):
    """No update is made from a loss or gradient that is not finite.

    budget  how many such steps of a run may be left out; one more ends it
    """

    def __init__(self, work: WorkCounter, *, budget: int, notice: Callable[[str], None]) -> None:
        self.work, self.budget, self.notice = work, budget, notice
        self._origins: list[str] = []
        self._spoiled: list[str] = []
        self._step_loss = self._lost = 0.0
        self._value = math.nan
        self._steps = self._left_out = 0

    def see(self, loss: torch.Tensor, origins: Sequence[str]) -> torch.Tensor:
        """A micro-batch's loss, or zero in its place when it is not finite: `corrected` mends the mean."""
        self._origins += origins
        if torch.isfinite(loss):
            self._step_loss += loss.item()
            return loss
        self._value = loss.item()
        self._spoiled += origins
        return torch.zeros_like(loss)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        scaled = getattr(optimizer, "scaler", None) is not None  # float16's scaler skips such gradients itself
        finite = scaled or all(bool(torch.isfinite(_local(weight.grad)).all()) for weight in weights)
        if not on_any_rank(bool(self._spoiled) or not finite, args):
            return
        what = f"The loss is {self._value}" if self._spoiled else "A gradient is not finite"
        records = of_all_ranks(self._spoiled or self._origins, args)
        said = f"{what} at step {state.global_step + 1}, in a batch with these records:\n{listing(records)}"
        if self.work.skipped_steps >= self.budget:
            left_out = f"{self.work.skipped_steps} such steps were left out before. " if self.work.skipped_steps else ""
            raise RunFailed(
                f"{said}\n{left_out}The adapter on disk is the one of the last checkpoint. "
                "Lower --learning_rate, pass --dtype bfloat16 (or float32) instead of float16, or leave out up to N "
                "such steps with --skip_nonfinite N."
            )
        self.work.skipped_steps += 1
        self.notice(f"{said}\nThe step is left out ({self.work.skipped_steps} of at most {self.budget}).")
        for weight in weights:
            weight.grad = None  # an optimizer passes such weights by
        self._lost += self._step_loss
        self._left_out += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        self._step_loss = 0.0
        self._origins, self._spoiled = [], []

    def corrected(self, mean: float) -> float | None:
        """The mean loss since the last log over the steps that were made; None when there was none."""
        steps, left_out, lost = self._steps, self._left_out, self._lost
        self._steps, self._left_out, self._lost = 0, 0, 0.0
        if not left_out:
            return mean
        return (mean * steps - lost) / (steps - left_out) if steps > left_out else None


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient that is divided among ranks."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


class Spikes(TrainerCallback):
    """Says when the loss jumps far above what it was."""

    REMEMBERED, KNOWN, SAID = 20, 10, 5

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice, self._said = notice, 0
        self._losses: deque[float] = deque(maxlen=self.REMEMBERED)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if len(self._losses) >= self.KNOWN and self._said < self.SAID:
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(one - middle) for one in self._losses)
            if loss > 1.5 * middle and loss - middle > 6 * spread:
                self._said += 1
                self.notice(
                    f"the loss jumped to {loss:.3f} at step {state.global_step:,}; it was {middle:.3f} "
                    f"(median of {len(self._losses)} logs). A lower --learning_rate or --max_grad_norm may help."
                )
        self._losses.append(loss)


class Reach(TrainerCallback):
    """Says at the first step which adapter layers no gradient reaches: they would never learn."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice, self._looked = notice, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._looked:
            return
        # A's gradient is zero as long as B is, so B tells.
        grads = {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}
        if not all(bool(torch.isfinite(_local(grad)).all()) for grad in grads.values() if grad is not None):
            return  # NaN spreads to every layer and tells nothing
        self._looked = True
        unreached = sorted(
            name.partition(".lora_B")[0] for name, grad in grads.items() if grad is None or not bool(_local(grad).any())
        )
        if unreached:
            self.notice(
                f"no gradient reaches {len(unreached)} of {len(grads)} adapter layers in the first step:\n"
                f"{listing(unreached, 5)}"
            )
