"""Saving: what a checkpoint holds, written whole or not at all, and read back without running anything.

Before: integrity.py seals a folder, state.py writes states.  After: trainer.py.
"""

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from atomtune.disk import disk_failed
from atomtune.errors import BadModel, RunFailed, listing
from atomtune.model.adapter import refuse_not_finite, refuse_unlike
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.train.checkpoint.atomic import MANIFEST, checkpoints, damage, rotate, seal, staged
from atomtune.train.checkpoint.start import STATE
from atomtune.train.checkpoint.state import gathered, load_state, random_state, save_state, scatter, set_random_state
from atomtune.train.ranks import on_any_rank

#: Saves that may fail one after another before the run ends.
FAILED_SAVES = 3
#: What a parameter group holds that the run's settings decide and no optimizer changes.
GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


_WEIGHTS_ONLY = "Start from its weights alone: --continue_training --checkpoint FOLDER/adapter_model.safetensors"


class SavingTrainer(Trainer):
    """transformers.Trainer whose checkpoints survive a kill, a full disk and flipped bits.

    facts         what each manifest says beside its files: the run's identity and the versions
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
        notice: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tokenizer_to_save, self.metadata, self.facts, self.notice = tokenizer, metadata, facts, notice
        self.resumed_from, self.failed_saves = resumed_from, 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter in PEFT's form, the tokenizer with its template, and its metadata; no pickled settings.

        Raises RunFailed when what was written is not what is in memory.
        """
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        refuse_not_finite(model)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            if state_dict is None:
                refuse_unlike(folder, model)
            self.tokenizer_to_save.save_pretrained(folder)
            self.metadata.save(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that appears whole or not at all; where the disk fails, that is said and tried again later."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        failed: BaseException | None = None
        with staged(final, clears=self.args.should_save) as staging:
            for part in (self._begin_checkpoint, self._fill_checkpoint, self._seal_checkpoint):
                try:
                    part(staging, final)
                except Exception as error:
                    if not disk_failed(error):
                        raise
                    failed = error
                if on_any_rank(failed is not None, self.args):
                    self._give_up(failed)
                    return
        self.failed_saves = 0
        if self.args.should_save:
            protected = [path for path in (self.state.best_model_checkpoint, self.resumed_from) if path]
            rotate(final.parent, keep=self.args.save_total_limit, protected=protected, notice=self.notice)

    def _begin_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _fill_checkpoint(self, staging: Path, final: Path) -> None:
        self.store_flos()
        self._name_the_best(final)
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(staging / STATE))

    def _name_the_best(self, final: Path | None = None) -> None:
        """The best checkpoint by the path it stands under now: a run's folder may have been moved since."""
        best = getattr(self.state, "best_global_step", None)
        path = Path(self.args.output_dir) / f"checkpoint-{best}"
        if best and (path == final or path.is_dir()):
            self.state.best_model_checkpoint = str(path)

    def _load_best_model(self) -> None:
        """As the library does, from a checkpoint that is whole; it would pass a missing one by and keep the last."""
        self._name_the_best()
        best = Path(self.state.best_model_checkpoint)
        if problems := damage(best):
            raise RunFailed(
                f"The best checkpoint, {best}, cannot be taken: {listing(problems, 3)}.\n"
                "Without --load_best_model_at_end the run ends with the last step's adapter (add --resume)."
            )
        super()._load_best_model()

    def _seal_checkpoint(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            seal(staging, final, {**self.facts, "step": self.state.global_step})
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))

    def _give_up(self, error: BaseException | None) -> None:
        """Training goes on without this checkpoint; a run that cannot save at all, or was told to stop, ends."""
        self.failed_saves += 1
        folder = Path(self.args.output_dir)
        kept = next((path for path in checkpoints(folder) if not damage(path)), None)
        said = (
            f"checkpoint-{self.state.global_step} could not be written: {error or 'another rank failed'}.\n"
            f"Last whole checkpoint: {kept or 'none'}."
        )
        if self.failed_saves >= FAILED_SAVES or self.control.should_training_stop:
            raise RunFailed(
                f"The disk is full, or it fails ({self.failed_saves} saves one after another). {said}\nFree some space "
                "(--save_total_limit keeps fewer checkpoints), then go on with --resume."
            ) from error
        self.notice(f"{said} Training goes on; the next save tries again.")

    # --- state, without pickles (state.py) ------------------------------------------------------------------------

    def _is_foreign(self, checkpoint: str) -> bool:
        """Whether the library has to read it: another tool's, or DeepSpeed's own. Else we open what we wrote alone."""
        return self.is_deepspeed_enabled or not (Path(checkpoint) / MANIFEST).is_file()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter came with the model (prepare.load_model), on every rank."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = (
            gathered(self.model, self.optimizer.optimizer) if self.is_fsdp_enabled else self.optimizer.state_dict()
        )
        if self.args.should_save:
            save_state(Path(output_dir), "optimizer", optimizer)
            save_state(Path(output_dir), "schedule", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What was saved, under the settings now in force.

        They differ only where the user said so: a run that is resumed to be longer would otherwise make one step with
        the last rate of the old schedule, and with --resume_anyway the old rate would stay for good.
        """
        if checkpoint is None:
            return
        asked = [
            {name: group[name] for name in GROUP_SETTINGS if name in group} for group in self.optimizer.param_groups
        ]
        if self._is_foreign(checkpoint):
            with _tensors_only(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        elif (Path(checkpoint) / "optimizer.json").is_file():  # else --save_only_model
            optimizer = load_state(Path(checkpoint), "optimizer")
            if self.is_fsdp_enabled:
                scatter(self.model, self.optimizer.optimizer, optimizer)
            else:
                self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint), "schedule"))
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(settings)
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir), "scaler", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if (Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))
        elif self._is_foreign(checkpoint):
            with _tensors_only(checkpoint):
                super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir), f"random-{self.args.process_index}", random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        name = f"random-{self.args.process_index}"
        if (Path(checkpoint) / f"{name}.json").is_file():
            set_random_state(load_state(Path(checkpoint), name))
        elif self._is_foreign(checkpoint):
            with _tensors_only(checkpoint):
                super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _tensors_only(checkpoint: str | None) -> Iterator[None]:
    """Another tool's checkpoint: the library reads its pickles as tensors and refuses programs; so said."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise BadModel(
            f"{checkpoint} holds a state that is a program and not only tensors (a pickle); it was not run.\n"
            f"{_WEIGHTS_ONLY}"
        ) from error
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise BadModel(f"{checkpoint} holds a state that does not fit: {error!r}\n{_WEIGHTS_ONLY}") from error
