"""Saving trainer: writes checkpoints complete or not at all, and reads them without running code in them.

The Trainer's own methods write and read optimizer, schedule, scaler and random states (state.py). This class decides
where they do so, and makes a checkpoint appear in one rename.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from atomtune.disk import disk_failed, disk_reason, write_text
from atomtune.errors import BadModel, RunFailed, listing
from atomtune.folders import identity_of, new_folder
from atomtune.model.adapter import fill_again, refuse_not_finite, refuse_unlike
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.settings.contradictions import FOLLOWS_THE_LOSS
from atomtune.train.checkpoint.atomic import facts_in, newest_undamaged, rotate, seal, staged
from atomtune.train.checkpoint.best import why_unusable
from atomtune.train.checkpoint.start import STATE, step_of
from atomtune.train.checkpoint.state import WEIGHTS_ONLY, has_optimizer
from atomtune.train.hub_upload import HubUpload
from atomtune.train.ranks import on_any_rank

#: How many saves in a row may fail before the run ends.
FAILED_SAVES = 3
#: Attributes of the Trainer's state that say which checkpoint is the best.
BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
#: Keys of a parameter group that come from the run's settings and that no optimizer changes.
GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
#: Settings of a run that decide its learning rates.
RATE_SETTINGS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")
#: The Trainer writes its arguments beside every adapter, as a pickle that nothing reads.
_TRAINING_ARGUMENTS = "training_args.bin"
_CARD = "README.md"


class SavingTrainer(Trainer):
    """A transformers.Trainer whose checkpoints survive a kill, a full disk and flipped bits.

    facts         content of each manifest besides its files: the run's identity and the versions
    card          makes the text of README.md from the Trainer's log
    resumed_from  the checkpoint that this run resumed from, which is never rotated away; None for a new run
    best          the best checkpoint until then (best.py)
    """

    control: TrainerControl
    lr_scheduler: Any

    def __init__(
        self,
        *,
        tokenizer: Any,
        metadata: AdapterMetadata,
        facts: Mapping[str, Any],
        resumed_from: Path | None,
        best: Path | None,
        card: Callable[[Sequence[Mapping[str, Any]]], str],
        notice: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.card = card
        # Not passed as the Trainer's processing_class, which would change the model's special ids to the tokenizer's.
        self.tokenizer_to_save, self.metadata, self.facts, self.notice = tokenizer, metadata, facts, notice
        self.resumed_from, self.best, self.failed_saves = resumed_from, best, 0
        self._best_saved: dict[str, Any] = dict.fromkeys(BEST)
        self._best_loaded: int | None = None
        self._folder_identity = identity_of(Path(self.args.output_dir))
        #: The names of the files that the last save_model wrote.
        self.adapter_files: list[str] = []
        sends = self.args.push_to_hub and self.is_world_process_zero()
        self.upload = HubUpload(str(self.hub_model_id), self.args, notice) if sends else None

    def refuse_replaced_folder(self) -> None:
        """Raise RunFailed if another folder has replaced the one in which this run started."""
        folder = Path(self.args.output_dir)
        if self._folder_identity is not None and identity_of(folder) != self._folder_identity:
            raise RunFailed(
                f"{folder} is not the folder this run started in: it was moved or replaced during the run. Nothing was "
                "written into the new one. Find the old folder and continue there: --resume --output_dir "
                "OLD_FOLDER."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter in PEFT's format, the tokenizer with its chat template, and the adapter's metadata.

        Raises RunFailed if a weight is not finite, or if the file differs from what is in memory.
        """
        folder = Path(output_dir or self.args.output_dir)
        self.take_averaged_weights()
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        refuse_not_finite(model)
        super().save_model(str(folder), _internal_call)
        if not self.args.should_save:
            return
        (folder / _TRAINING_ARGUMENTS).unlink(missing_ok=True)
        if not self.is_sharded:
            refuse_unlike(folder, model)
        self.tokenizer_to_save.save_pretrained(folder)
        self.metadata.save(folder)
        write_text(folder / _CARD, self.card(self.state.log_history))  # replaces PEFT's template of a model card
        self.adapter_files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]

    def take_averaged_weights(self) -> None:
        """Switch schedule_free_* optimizers to the averaged weights, which are the run's result.

        They compute gradients at other weights, and the Trainer switches back before each micro-batch. The optimizer's
        saved state says which weights a checkpoint has.
        """
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def before_saving(self) -> None:
        """Called before each checkpoint, for subclasses."""

    # Private, because there is no public method around everything that a checkpoint consists of.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that appears complete or not at all. If the disk fails, the next save tries again."""
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
        self.note_best_saved()
        if self.args.should_save:
            protected = [path for path in (self.state.best_model_checkpoint, self.resumed_from) if path]
            rotate(final.parent, keep=self.args.save_total_limit, protected=protected, notice=self.notice)

    def _begin_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            self.refuse_replaced_folder()
            new_folder(staging)

    def _fill_checkpoint(self, staging: Path, final: Path) -> None:
        self.store_flos()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            # The Trainer's own methods for these files; it has no public ones.
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
            if self.upload is not None:
                self.upload.send_checkpoint(final, self.adapter_files)

    def _give_up(self, error: BaseException | None) -> None:
        """Continue training without this checkpoint, which then is not the best one either.

        Raises RunFailed after FAILED_SAVES failures or if the run is stopping.
        """
        self.failed_saves += 1
        self._set_best(self._best_saved)
        folder = Path(self.args.output_dir)
        reason = disk_reason(error, folder) if error else "another rank failed"
        newest_whole = newest_undamaged(folder)
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

    def name_the_best(self) -> None:
        """Enter the best checkpoint in a resumed run's state; the Trainer has only looked where it was recorded.

        Its metric is read from the log, in which both are: --metric_for_best_model may be another one now.
        """
        metric = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        for entry in self.state.log_history:
            if entry["step"] == self.state.best_global_step and metric in entry:
                self.state.best_metric = entry[metric]
        if self.best is not None:
            self.state.best_model_checkpoint = str(self.best)
        elif self.args.load_best_model_at_end:
            self._set_best(dict.fromkeys(BEST))

    def _set_best(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.state, name, value)

    def note_best_saved(self) -> None:
        """Note the best checkpoint once it is on the disk; it stays the best if a better one cannot be written."""
        self._best_saved = {name: getattr(self.state, name) for name in BEST}

    def take_the_best(self) -> None:
        """Load the best checkpoint's weights in place of the last step's, if the settings say so."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed holds the weights, so that no rank has all of them or can compute alone."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has at the end: the best one if it was loaded, else the last."""
        return self.state.global_step if self._best_loaded is None else self._best_loaded

    # Private: if a checkpoint is missing, the Trainer would only warn and keep the last step's weights.
    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights. Raises RunFailed if it is damaged."""
        self.take_averaged_weights()  # called later, it would change the best weights
        best = Path(self.state.best_model_checkpoint)
        if problems := why_unusable(best):
            raise RunFailed(
                f"The best checkpoint, {best}, cannot be used: {listing(problems, 3)}.\n"
                "With --resume --load_best_model_at_end false the run ends with the last step's adapter."
            )
        super()._load_best_model()
        if not self.is_sharded:
            fill_again(self.accelerator.unwrap_model(self.model), best)  # PEFT may leave out some tensors
        self._best_loaded = self.state.best_global_step

    # Private: with a limit of one, the Trainer would remove every checkpoint but the best, also that of a stop.
    def _finalize_training(self, *args: Any) -> Any:
        """As in the Trainer, but no checkpoint is removed: `rotate` has done that."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    # Private: train.model has already loaded the adapter on every rank, checking every tensor.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing."""

    # Private: the Trainer would load the old run's learning rates together with its state.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the saved state, but keep the settings now in force.

        The two differ only if the user changed a setting. Otherwise a run that is resumed for more steps would make one
        step with the last rate of the old schedule, and with --resume_anyway the old rate would stay forever.
        """
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        settings_now = [{name: group[name] for name in GROUP_SETTINGS if name in group} for group in groups]
        before = facts_in(Path(checkpoint), "identity")
        if not (has_optimizer(Path(checkpoint)) and self._has_the_optimizer(before)):
            self._move_schedule_to(step_of(Path(checkpoint)))  # a new optimizer, but the schedule continues
        elif self._has_the_schedule(before):
            with _fitting(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            self._say_kept_rate(before)
        else:  # a new schedule, but the optimizer continues
            settings_now = [
                {**settings, "lr": group["lr"]} for settings, group in zip(settings_now, groups, strict=True)
            ]
            schedule, self.lr_scheduler = self.lr_scheduler, _Stateless()  # the Trainer loads both states or none
            with _fitting(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            self.lr_scheduler = schedule
            self._move_schedule_to(step_of(Path(checkpoint)))
        for group, settings in zip(self.optimizer.param_groups, settings_now, strict=True):
            group.update(settings)
        if isinstance(self.lr_scheduler, LambdaLR):
            _follow(self.lr_scheduler, self.optimizer.param_groups)

    def _has_the_optimizer(self, before: Mapping[str, Any]) -> bool:
        """Whether the state is of this run's --optim; if not (--resume_anyway), give a notice."""
        optim = before.get("optim", self.args.optim)
        if optim.removesuffix("_fused") == self.args.optim.removesuffix("_fused"):  # both have the same state
            return True
        self.notice(f"the checkpoint holds the state of --optim {optim}, so the optimizer starts from scratch.")
        return False

    def _has_the_schedule(self, before: Mapping[str, Any]) -> bool:
        """Whether the state is of a schedule like this run's; those that follow the losses have states of their own."""
        now = self.facts["identity"]["lr_scheduler_type"]
        schedule = before.get("lr_scheduler_type", now)
        return bool(schedule == now) or not {schedule, now} & set(FOLLOWS_THE_LOSS)

    def _say_kept_rate(self, before: Mapping[str, Any]) -> None:
        """Give a notice if a changed learning rate or schedule (--resume_anyway) does not replace the saved rate."""
        now = self.facts["identity"]
        changed = any(before.get(name, now[name]) != now[name] for name in RATE_SETTINGS)
        if changed and not isinstance(self.lr_scheduler, LambdaLR):
            schedule, rate = now["lr_scheduler_type"], self.optimizer.param_groups[0]["lr"]
            self.notice(
                f"--lr_scheduler_type {schedule} follows the losses, so it goes on with the state in the checkpoint, "
                f"at a learning rate of {rate:g}."
            )

    def _move_schedule_to(self, step: int) -> None:
        """Move the schedule to a step of the run; give a notice if it also depends on more than the step."""
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.last_epoch = step
        else:  # it follows the losses, which only its state records
            self.notice(
                "the learning-rate schedule follows the losses, and no state of it is loaded, so the schedule starts "
                "from scratch."
            )


class _Stateless:
    """In place of a schedule that does not take the state in a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


def _follow(schedule: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Set the rates to what this schedule gives at its present step."""
    base_rates = [group["initial_lr"] for group in groups]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(base_rates, factors, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": base_rates, "_last_lr": rates})


@contextlib.contextmanager
def _fitting(checkpoint: str) -> Iterator[None]:
    """Within this context, an error becomes a BadModel: the state belongs to another optimizer or model."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise BadModel(f"{checkpoint} holds a state that does not fit: {error!r}\n{WEIGHTS_ONLY}") from error
