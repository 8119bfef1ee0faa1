"""Best: the checkpoint with the best evaluation, which a run may end with, and what a resume does if it is gone."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from atomtune.errors import BadModel, listing
from atomtune.train.checkpoint.atomic import damage
from atomtune.train.checkpoint.start import STATE


def best_to_keep(
    checkpoint: Path, args: TrainingArguments, *, anyway: bool, notice: Callable[[str], None]
) -> Path | None:
    """The best checkpoint so far of the run that continues from `checkpoint`; None if it has none that can be used.

    anyway  if the run should end with one that cannot be used, give a notice instead of an error
    Raises BadModel, so that a user hears of it before the steps are made that it would be compared with.
    """
    best = _recorded_in(checkpoint, Path(args.output_dir))
    problems = why_unusable(best) if best else []
    if not problems:
        return best
    if args.load_best_model_at_end:
        what = f"The best checkpoint so far, {best}, cannot be used: {listing(problems, 3)}."
        if not anyway:
            raise BadModel(
                f"{what}\nPut it back; or pass --resume_anyway to keep the best of the evaluations still to come, or "
                "--load_best_model_at_end false to end with the last step's adapter."
            )
        notice(f"{what} Only the evaluations still to come are compared (--resume_anyway).")
    return None


def why_unusable(best: Path) -> list[str]:
    """Why the best checkpoint cannot be used; empty if it can."""
    return damage(best) if best.is_dir() else ["there is no such folder"]


def _recorded_in(checkpoint: Path, output_dir: Path) -> Path | None:
    """The best checkpoint according to a checkpoint's state, or its expected place; None if the state names none.

    It lies beside that checkpoint, wherever both were moved; or in the folder that the run continues in; or, if an
    earlier resume changed the folder, where it was then.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if not state.best_global_step:
        return None
    if state.best_global_step == state.global_step:
        return checkpoint
    name = f"checkpoint-{state.best_global_step}"
    places = [checkpoint.parent / name, output_dir / name]
    if state.best_model_checkpoint:
        places.append(Path(state.best_model_checkpoint))
    return next((place for place in places if place.is_dir()), places[0])
