"""Saving trainer: what a checkpoint holds, written whole or not at all, and read back without running anything.

The Trainer writes and reads optimizer, schedule, scaler and random numbers itself (state.py); where that happens, and
that a checkpoint appears in one rename, is decided here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from atomtune.disk import disk_failed, disk_reason, identity_of, new_folder, write_text
from atomtune.errors import BadModel, RunFailed, listing
from atomtune.model.adapter import fill_again, refuse_not_finite, refuse_unlike
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.train.checkpoint.atomic import checkpoints, damage, rotate, seal, staged
from atomtune.train.checkpoint.start import STATE, step_of
from atomtune.train.checkpoint.state import WEIGHTS_ONLY, has_optimizer
from atomtune.train.ranks import on_any_rank

#: Saves that may fail one after another before the run ends.
FAILED_SAVES = 3
#: What a parameter group holds that the run's settings decide and no optimizer changes.
GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
#: The Trainer leaves its arguments beside every adapter, as a pickle that nothing reads.
_TRAINING_ARGUMENTS = "training_args.bin"
_CARD = "README.md"


class SavingTrainer(Trainer):
    """transformers.Trainer whose checkpoints survive a kill, a full disk and flipped bits.

    facts         what each manifest says beside its files: the run's identity and the versions
    card          the text of README.md, of the Trainer's log
    resumed_from  the checkpoint this run began from; never rotated away
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        tokenizer: Any,
        metadata: AdapterMetadata,
        facts: Mapping[str, Any],
        resumed_from: Path | None,
        card: Callable[[Sequence[Mapping[str, Any]]], str],
        notice: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.card = card
        # Not the Trainer's processing_class: that would change the model's special ids to the tokenizer's.
        self.tokenizer_to_save, self.metadata, self.facts, self.notice = tokenizer, metadata, facts, notice
        self.resumed_from, self.failed_saves = resumed_from, 0
        self._folder_identity = identity_of(Path(self.args.output_dir))

    def refuse_replaced_folder(self) -> None:
        """Raise RunFailed where another folder took the place of the one this run holds."""
        folder = Path(self.args.output_dir)
        if self._folder_identity is not None and identity_of(folder) != self._folder_identity:
            raise RunFailed(
                f"{folder} is not the folder this run started in: it was moved or replaced during the run. Nothing was "
                "written into the new one. Find the old folder and continue there: --resume --output_dir "
                "OLD_FOLDER."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter in PEFT's form, the tokenizer with its template, and the adapter's metadata.

        Raises RunFailed when what was written is not what is in memory.
        """
        folder = Path(output_dir or self.args.output_dir)
        self.take_averaged_weights()
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        refuse_not_finite(model)
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        (folder / _TRAINING_ARGUMENTS).unlink(missing_ok=True)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # there no rank holds all weights
            refuse_unlike(folder, model)
        self.tokenizer_to_save.save_pretrained(folder)
        self.metadata.save(folder)
        write_text(folder / _CARD, self.card(self.state.log_history))  # in place of PEFT's form

    def take_averaged_weights(self) -> None:
        """The weights that are the run's result, where an optimizer (schedule_free_*) computes gradients at others.

        The Trainer takes those back before each micro-batch. A checkpoint's optimizer state says which ones it has.
        """
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def before_saving(self) -> None:
        """What has to be known of the run before a checkpoint is made; nothing here."""

    # Private, for want of a public place around all that a checkpoint is made of.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that appears whole or not at all; where the disk fails, that is said and tried again later."""
        self.before_saving()
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        failure: BaseException | None = None
        with staged(final, clears=self.args.should_save) as staging:
            for part in (self._begin_checkpoint, self._fill_checkpoint, self._seal_checkpoint):
                try:
                    part(staging, final)
                except Exception as error:
                    if not disk_failed(error):
                        raise
                    failure = error
                if on_any_rank(failure is not None, self.args):
                    self._give_up(failure)
                    return
        self.failed_saves = 0
        if self.args.should_save:
            protected = [path for path in (self.state.best_model_checkpoint, self.resumed_from) if path]
            rotate(final.parent, keep=self.args.save_total_limit, protected=protected, notice=self.notice)

    def _begin_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            self.refuse_replaced_folder()
            new_folder(staging)

    def _fill_checkpoint(self, staging: Path, final: Path) -> None:
        self.store_flos()
        self.name_the_best(final)
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            # The Trainer's own writers; it offers no public way to call one.
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(staging / STATE))

    def _seal_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            seal(staging, final, {**self.facts, "step": self.state.global_step})
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))  # what --push_to_hub with --hub_strategy means; no public way

    def _give_up(self, error: BaseException | None) -> None:
        """Training goes on without this checkpoint; a run that cannot save at all, or was told to stop, ends."""
        self.failed_saves += 1
        newest_whole = next((path for path in checkpoints(Path(self.args.output_dir)) if not damage(path)), None)
        reason = disk_reason(error, Path(self.args.output_dir)) if error else "another rank failed"
        what = (
            f"checkpoint-{self.state.global_step} could not be written: {reason}.\nLast complete checkpoint: "
            f"{newest_whole or 'none'}."
        )
        if self.failed_saves >= FAILED_SAVES or self.control.should_training_stop:
            raise RunFailed(
                f"The disk is full or failing ({self.failed_saves} saves in a row failed). {what}\nFree some space "
                "(--save_total_limit keeps fewer checkpoints), then continue with --resume."
            ) from error
        self.notice(f"{what} Training continues; the next save tries again.")

    def name_the_best(self, final: Path | None = None) -> None:
        """The best checkpoint by the path it stands under now: a run's folder may have been moved since."""
        best = getattr(self.state, "best_global_step", None)
        path = Path(self.args.output_dir) / f"checkpoint-{best}"
        if best and (path == final or path.is_dir()):
            self.state.best_model_checkpoint = str(path)

    def take_the_best(self) -> None:
        """The best checkpoint's weights in place of the last step's, where that was asked for."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    # Private: the Trainer would pass a missing checkpoint by and keep the last step's weights in its place.
    def _load_best_model(self) -> None:
        """The best checkpoint's weights, if it is whole. Raises RunFailed if it is not."""
        self.take_averaged_weights()  # later, it would change the best ones
        self.name_the_best()
        best = Path(self.state.best_model_checkpoint)
        if problems := damage(best):
            raise RunFailed(
                f"The best checkpoint, {best}, cannot be used: {listing(problems, 3)}.\n"
                "Without --load_best_model_at_end the run ends with the last step's adapter (add --resume)."
            )
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            fill_again(self.accelerator.unwrap_model(self.model), best)  # PEFT may pass over some tensors

    # Private: the adapter came with the model (train.model), on every rank, checked tensor by tensor.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing."""

    # Private: the Trainer puts the old run's rates in force with the old run's state.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What was saved, under the settings now in force.

        They differ only where the user said so: a run that is resumed to be longer would otherwise make one step with
        the last rate of the old schedule, and with --resume_anyway the old rate would stay for good.
        """
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        settings_now = [{name: group[name] for name in GROUP_SETTINGS if name in group} for group in groups]
        if has_optimizer(Path(checkpoint)):
            with _fitting(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        else:  # --save_only_model: the optimizer begins anew, and its rates go on
            self._move_schedule_to(step_of(Path(checkpoint)))
        for group, settings in zip(self.optimizer.param_groups, settings_now, strict=True):
            group.update(settings)
        if isinstance(self.lr_scheduler, LambdaLR):
            _follow(self.lr_scheduler, self.optimizer.param_groups)

    def _move_schedule_to(self, step: int) -> None:
        """The schedule at a step of the run; said where it cannot be known from the step alone."""
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.last_epoch = step
        else:  # it follows the losses, and kept them in its state
            self.notice(
                "the checkpoint holds no state of the learning-rate schedule, so the schedule starts from scratch."
            )


def _follow(schedule: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Rates as this schedule has them at the step it stands at."""
    base_rates = [group["initial_lr"] for group in groups]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(base_rates, factors, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": base_rates, "_last_lr": rates})


@contextlib.contextmanager
def _fitting(checkpoint: str) -> Iterator[None]:
    """Raise BadModel for a state that is another optimizer's or another model's."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise BadModel(f"{checkpoint} holds a state that does not fit: {error!r}\n{WEIGHTS_ONLY}") from error
