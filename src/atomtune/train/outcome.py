"""Outcome: whether a run worked, in a few sentences derived from its losses, with the setting to change.

The held-out loss decides. The training loss alone also falls for a model that memorises.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from atomtune.choices import NOISE
from atomtune.train.run_report import logged

#: If the held-out loss fell by a smaller share, the model did not learn what the records have in common.
LITTLE = 0.05
#: If the loss falls by more than LITTLE after this part of the run, it has not levelled off.
LATE = 0.6
#: A run with fewer steps is too short to level off; if it ends at its lowest loss, it was too short.
LEAST_TO_LEVEL = 20
#: If no evaluation was made after this part of the run, whether the loss fell until its end is unknown.
MEASURED = 0.6
#: How many times as long a run should be that was too short, and one that has not changed any answer yet.
LONGER, FAR_LONGER = 1.5, 4.0

Verdict = Literal["untold", "not learned", "diverged", "too long", "too short", "level"]


@dataclass(frozen=True)
class Outcome:
    """What the losses of a finished run say.

    before, last, best  held-out loss before the first step, at the last evaluation, and the lowest after a step
    last_step           the step of the last evaluation; a run that is resumed without evaluations ends later
    best_step           the step of the lowest loss
    kept_step           the step whose adapter is the result
    in_steps            whether the length is set by --max_steps, not by --num_train_epochs
    has_held_out        whether there are records to evaluate on
    are_trained         whether most of these are nearly the same as training records
    train_first, train_last  training loss at the beginning and at the end
    answers     number of answers shown before and after training, to prompts that are not trained on
    as_before   whether all of them equal the base's answers word for word, and none equals its reference
    broken      how many of them are empty, repeat one piece or run on (samples.Sample.is_broken)
    """

    verdict: Verdict
    before: float | None
    last: float | None
    last_step: int | None
    best: float | None
    best_step: int | None
    kept_step: int
    steps: int
    epochs: float
    in_steps: bool
    has_held_out: bool
    are_trained: bool
    train_first: float | None
    train_last: float | None
    answers: int = 0
    as_before: bool = False
    broken: int = 0

    def to_run_json(self) -> dict[str, Any]:
        return {**asdict(self), "sentences": self.sentences()}

    def sentences(self) -> list[str]:
        """What happened, which step's adapter is the result, and what to change."""
        return [*self._losses(), *self._advice()]

    def _losses(self) -> list[str]:
        if self.best is None or self.last is None:
            if self.train_first is None or self.train_last is None:
                return []
            if self.steps == 1:
                return [f"Training loss {self.train_first:.3f}."]
            return [f"Training loss {self.train_first:.3f} → {self.train_last:.3f}."]
        begins = f"{self.before:.3f} before training → " if self.before is not None else ""
        at_end = ""
        if self.last != self.best:
            at_end = f"; {self.last:.3f} at the end"
            if self.last_step != self.steps:
                at_end = f"; {self.last:.3f} at step {self.last_step:,}, the last evaluation"
        if self.kept_step == self.best_step:
            return [
                f"Held-out loss {begins}{self.best:.3f} at step {self.best_step:,}, the best, which is kept{at_end}."
            ]
        text = f"Held-out loss {begins}{self.best:.3f} at step {self.best_step:,}, the best{at_end}."
        return [text, f"The adapter is that of step {self.kept_step:,} of {self.steps:,}, not of the best one."]

    def _advice(self) -> list[str]:
        match self.verdict:
            case "untold":
                text = self._untold()
            case "diverged" if self.best is not None and self.best >= (self.before or math.inf):
                text = "The loss rose instead of falling: lower --learning_rate; start with a third of it."
            case "diverged":
                text = (
                    f"Past step {self.best_step:,} the loss rose instead of falling further: lower --learning_rate; "
                    "start with a third of it."
                )
            case "not learned":
                text = (
                    "It did not work: the held-out loss hardly fell. Look at the records with "
                    f"`atomtune inspect`; then try a higher --learning_rate or {self._length}."
                )
            case "too long":
                text = (
                    f"Overfitting: past step {self.best_step:,} the held-out loss rose again. More records help most; "
                    f"else stop there ({self._length} {self._until_best()})."
                )
            case "too short" | "level" if 2 * self.broken > self.answers and not self.as_before:
                text = (
                    "The held-out loss fell, but most answers shown are empty, repeat themselves or run on without an "
                    f"end ({self.broken} of {self.answers}): read them before you use the adapter. More records help "
                    "most; else try half the --learning_rate."
                )
            case "too short" if self.as_before:
                text = (
                    "It has only begun to learn: the held-out loss was still falling at the end, and the answers shown "
                    f"are still the base's. Try {self._length} {self._longer(FAR_LONGER)} or more."
                )
            case "too short":
                text = (
                    "It worked, and the held-out loss was still falling at the end: "
                    f"{self._length} {self._longer()} may bring it further down."
                )
            case _ if self.as_before:
                text = (
                    "The held-out loss has levelled off, but the answers shown are still the base's: try a higher "
                    "--learning_rate."
                )
            case _:
                text = "It worked, and the held-out loss has levelled off: this length suits these records."
        return [text]

    def _untold(self) -> str:
        if self.are_trained:
            return (
                "Most records of --eval_path are nearly the same as training records, so whether it answers new "
                "questions is unknown. Pass other records; without --eval_path, some are held out."
            )
        if self.last_step is not None and self.last_step < MEASURED * self.steps:
            return (
                f"The held-out records were not evaluated after step {self.last_step:,}, so how it went on from there "
                "is unknown: leave out --eval_strategy no."
            )
        if self.last is not None:
            return (
                "The held-out loss was not computed before training, so whether it fell is unknown: leave out "
                "--eval_on_start false and --eval_delay."
            )
        if self.has_held_out:
            return (
                "The held-out records were not evaluated after any step, so whether it works is unknown: leave out "
                "--eval_strategy no and --eval_delay."
            )
        if self.answers:
            return (
                "No records were held out, so only the answers shown tell whether it works: --eval_size 0.1 or "
                "--eval_path measures it."
            )
        return (
            "No records were held out, so whether it answers new questions is unknown. Pass --eval_path, or "
            "--eval_size 0.1 if the records differ."
        )

    @property
    def _length(self) -> str:
        """The setting that decides the run's length."""
        return "--max_steps" if self.in_steps else "--num_train_epochs"

    def _until_best(self) -> str:
        best_step = self.best_step or self.steps
        fewer_epochs = self.epochs * best_step / max(self.steps, 1)
        return str(best_step) if self.in_steps else f"{max(round(fewer_epochs, 1), 0.1):g}"

    def _longer(self, times: float = LONGER) -> str:
        now = self.steps if self.in_steps else self.epochs
        return f"{max(round(times * now), round(now) + 1)}"


def outcome(
    history: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    epochs: float,
    kept_step: int,
    in_steps: bool,
    has_held_out: bool,
    are_trained: bool = False,
) -> Outcome:
    """The outcome according to the Trainer's log.

    epochs        passes over the records
    kept_step     the step whose adapter is the result
    in_steps      whether --max_steps sets the length
    has_held_out  whether there are records to evaluate on
    are_trained   whether most of these are nearly the same as training records
    """
    training, held_out = logged(history, "loss"), logged(history, "eval_loss")
    losses = list(training.values())
    before = held_out.pop(0, None)
    best_step = min(held_out, key=held_out.__getitem__, default=None)
    tenth = max(len(losses) // 10, 1)
    verdict = _verdict(before, held_out, training)
    is_measured = not held_out or max(held_out) >= MEASURED * steps
    holds_for_trained = verdict in ("diverged", "not learned")
    holds_unmeasured = verdict not in ("too short", "level")
    if (are_trained and not holds_for_trained) or not (is_measured or holds_unmeasured):
        verdict = "untold"
    return Outcome(
        verdict=verdict,
        before=before,
        last=held_out[max(held_out)] if held_out else None,
        last_step=max(held_out, default=None),
        best=None if best_step is None else held_out[best_step],
        best_step=best_step,
        kept_step=kept_step,
        steps=steps,
        epochs=epochs,
        in_steps=in_steps,
        has_held_out=has_held_out,
        are_trained=are_trained,
        train_first=losses[0] if losses else None,
        train_last=statistics.fmean(losses[-tenth:]) if losses else None,
    )


def _verdict(before: float | None, held_out: Mapping[int, float], training: Mapping[int, float]) -> Verdict:
    """The verdict. Both losses are step → loss, held_out without the one before training.

    A training loss is that of a few batches, so it differs by chance from one entry to the next. The held-out records
    are always the same ones: they alone tell whether the loss rose.
    """
    in_order = [held_out[step] for step in sorted(held_out)]
    if not in_order or (before is None and _is_flat(in_order)):
        return "untold"
    best, last = min(in_order), in_order[-1]
    if before is not None and best > before * (1 - LITTLE):
        return "diverged" if last > before * (1 + LITTLE) else "not learned"
    if last > best * (1 + NOISE):
        best_step = min(held_out, key=held_out.__getitem__)
        return "diverged" if _rose_past(best_step, training) else "too long"
    if last > best:
        return "level"
    # At the end the learning rate falls to 0, and the loss falls with it. The loss before that shows whether there was
    # more to learn.
    steps = sorted(held_out)
    until_then = [held_out[step] for step in steps if step <= LATE * steps[-1]]
    earlier = until_then[-1] if until_then else before
    if steps[-1] < LEAST_TO_LEVEL:
        return "too short"
    return "too short" if earlier is not None and last < earlier * (1 - LITTLE) else "level"


def _is_flat(losses: Sequence[float]) -> bool:
    """Whether these losses neither fell nor rose; what happened before the first one is not known."""
    best = min(losses)
    return best > losses[0] * (1 - LITTLE) and losses[-1] <= best * (1 + NOISE)


def _rose_past(best_step: int, training: Mapping[int, float]) -> bool:
    """Whether the training loss rose past this step. While a model memorises its records, it falls."""
    until = [loss for step, loss in training.items() if step <= best_step]
    past = [loss for step, loss in training.items() if step > best_step]
    return bool(until and past) and statistics.fmean(past) > statistics.fmean(until) * (1 + LITTLE)
