"""The Trainer, subclassed at few points; schedulers, accelerate and trackers stay the library's.

Ours: the loss (sum over targets / targets of the whole global batch), evaluation by the same law, what a save holds,
and a stop by signal. Law: a step's loss and gradient do not depend on how its examples are divided into micro-batches
or ranks (tests/train/test_oracle.py).
"""

import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from atomtune.errors import RunFailed, listing
from atomtune.model.adapter import Card
from atomtune.model.loss import target_nats
from atomtune.train.checkpoint import STATE, disk_full, write_manifest


class WorkCounter(TrainerCallback, ExportableState):
    """Counts what the run computed; carried through checkpoints, so that a resumed run's figures are of the whole."""

    def __init__(self) -> None:
        self.tokens_computed = 0
        self.tokens_padded = 0
        self.examples = 0
        self.seconds = 0.0
        self._since = 0.0

    def add(self, *, tokens_computed: int, tokens_padded: int, examples: int) -> None:
        self.tokens_computed += tokens_computed
        self.tokens_padded += tokens_padded
        self.examples += examples

    def state(self) -> dict[str, Any]:
        names = ("tokens_computed", "tokens_padded", "examples")
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


class StopOnSignal(TrainerCallback):
    """The first SIGINT or SIGTERM ends the run after its step, with a checkpoint; a second one at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _on_any_rank(self.received is not None, args) and state.global_step < state.max_steps:
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()


class LogWhatIsSaved(TrainerCallback):
    """The losses since the last log go into the history before a checkpoint and at the end, so none is lost with it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


def _on_any_rank(flag: bool, args: Any) -> bool:
    if args.world_size <= 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


class LoraTrainer(Trainer):
    """transformers.Trainer with our loss, evaluation and saves."""

    control: TrainerControl

    def __init__(self, *, tokenizer: Any, card: Card, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer_to_save, self.card = tokenizer, card
        self.work = WorkCounter()
        self.stop = StopOnSignal()
        self.add_callback(self.work)
        self.add_callback(self.stop)
        self.add_callback(LogWhatIsSaved())  # after all that ask for a save
        # The loss below is already divided by the targets of all micro-batches. 5.17 reads the first name, 5.23 both.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of one step, and the targets in them over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor(
            [
                sum(batch["targets"] for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
                sum(batch["tokens_padded"] for batch in batches),
                sum(batch["examples"] for batch in batches),
            ]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device)[None]).sum(0).cpu()
        targets, computed, padded, examples = counts.tolist()
        self.work.add(tokens_computed=computed, tokens_padded=padded, examples=examples)
        return batches, torch.tensor(targets, device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, in nats per target of the global batch.

        DDP and FSDP average gradients over ranks, hence the factor world_size.
        """
        assert num_items_in_batch is not None and not return_outputs
        nats, _ = target_nats(model, inputs, label_smoothing=self.args.label_smoothing_factor)
        return nats * self.args.world_size / num_items_in_batch.clamp(min=1)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; a loss that is not finite ends the run before it can spoil the adapter."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise RunFailed(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, in a batch with these records:\n"
                f"{listing(inputs['origins'])}\nThe adapter on disk is the one of the last checkpoint. "
                "Lower --learning_rate, or pass --dtype bfloat16 (or float32) instead of float16."
            )
        return loss

    def all_steps_made(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the run's last step; its state is then this trainer's.

        The library would make one more step from such a checkpoint (seen on 5.23, with max_steps).
        """
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if not 0 < self.args.max_steps <= state.global_step:
            return False
        self.state = state
        self.work.on_train_begin(self.args, state, self.control)
        self.work.on_train_end(self.args, state, self.control)
        return True

    def mean_loss(self) -> float:
        """Over all steps of the run, those before a resume included; in nats per target of each step."""
        total, last = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        return total / max(last, 1)

    @property
    def _ranks_evaluate_alone(self) -> bool:
        """Whether a rank's forward needs no other rank, so that ranks may hold different numbers of batches."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every record once; accelerate would fill the last ranks up with records that were already counted."""
        even, plan = self.accelerator.even_batches, self.accelerator.dataloader_config
        plan.even_batches = even and not self._ranks_evaluate_alone
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            plan.even_batches = even

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Nats per target over the evaluation records, each counted by its targets, whatever the batch size."""
        loader = self.get_eval_dataloader(eval_dataset)
        began = time.perf_counter()
        model = self.model if self._ranks_evaluate_alone else self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        for batch in loader:
            with torch.no_grad(), self.compute_loss_context_manager():
                nats, count = target_nats(model, self._prepare_inputs(batch))
            sums += torch.stack([nats.double(), count.double()]).cpu()
        model.train()
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device)[None]).sum(0).cpu()
        loss = (sums[0] / sums[1].clamp(min=1)).item()
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_targets": int(sums[1]),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the library does, and the learning rate is that of the schedule now asked for.

        A run that is resumed to be longer would otherwise make one step with the last rate of the old schedule.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter in PEFT's form, the tokenizer with its template, and the card."""
        folder = Path(output_dir or self.args.output_dir)
        super()._save(str(folder), state_dict=state_dict)
        if self.args.should_save:
            self.tokenizer_to_save.save_pretrained(folder)
            self.card.save(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint and its manifest; older ones go only when the new one is whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            if self.args.world_size > 1:
                self.accelerator.wait_for_everyone()  # every rank's random state belongs to the manifest
            if self.args.should_save:
                write_manifest(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        except (OSError, RuntimeError) as error:
            if full := disk_full(error, Path(self.args.output_dir)):
                raise full from error
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
