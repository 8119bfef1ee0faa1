"""Trainer: transformers' Trainer with our loss and evaluation; schedulers, accelerate and trackers are the library's.

The loss is a sum over targets, divided by the targets of the whole global batch; evaluation uses the same rule. Saving
is in saving_trainer.py.
Law: a step's loss and gradient do not depend on how its examples are divided into micro-batches or ranks
(tests/train/test_trainer.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy

from atomtune.errors import RunFailed, listing
from atomtune.model.listed_modules import learned_weights
from atomtune.model.loss import target_nats
from atomtune.model.step_graphs import StepGraphs
from atomtune.train.arguments import shuffling_seed
from atomtune.train.callbacks import (
    BeforeFirstStep,
    EarlyStopping,
    GradientCheck,
    LogBeforeSaving,
    LossSpikeWarning,
    Stop,
    WorkCounter,
)
from atomtune.train.checkpoint.saving_trainer import SavingTrainer
from atomtune.train.checkpoint.start import STATE
from atomtune.train.dataloader import with_signal_masked_workers
from atomtune.train.non_finite import SkipNonFinite
from atomtune.train.random_state import random_state_kept
from atomtune.train.ranks import of_all_ranks, on_any_rank
from atomtune.train.run_length import run_length


class LoraTrainer(SavingTrainer):
    """transformers.Trainer with our loss, evaluation and checkpoints."""

    def __init__(
        self, *, stop: Stop, skip_nonfinite: int, patience: int = 0, graphs: StepGraphs | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.graphs = graphs
        self.work, self.stop, self.early_stopping = WorkCounter(), stop, EarlyStopping(patience)
        self.first_step = 0  # the step at which this process began; an earlier process made those before
        self.non_finite = SkipNonFinite(self.work, budget=skip_nonfinite, notice=self.notice)
        # With sharded weights, this rank's part of a gradient may be zero without a fault
        if not self.is_sharded:
            # Before `non_finite`, which may clear the gradients of a skipped step
            self.add_callback(GradientCheck(self.notice))
        self.add_callback(self.work)
        self.add_callback(BeforeFirstStep(self.begin))
        self.add_callback(self.non_finite)
        self.add_callback(stop)
        self.add_callback(self.early_stopping)
        self.add_callback(LossSpikeWarning(self.notice))
        self.add_callback(LogBeforeSaving())  # after all callbacks that may request a save
        # Tell the Trainer that the loss is already divided by the targets of all micro-batches. 5.17 reads the first
        # attribute, 5.23 both.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of one step, and the number of their targets on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor(
            [
                sum(batch["targets"] for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
                sum(batch["tokens_padded"] for batch in batches),
                sum(batch["records"] for batch in batches),
            ]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device)[None]).sum(0).cpu()
        targets, computed, padded, examples = counts.tolist()
        self.work.add(tokens_computed=computed, tokens_padded=padded, examples=examples)
        # Kept on the CPU: copying it to the device would wait for all work queued there.
        return batches, torch.tensor(targets)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's part of the step's loss, in nats per target of the global batch.

        DDP and FSDP average gradients over ranks; the factor world_size turns that into a sum.
        """
        assert num_items_in_batch is not None and not return_outputs
        if self.graphs is not None:
            nats = self.graphs.nats(inputs)
        else:
            nats, _ = target_nats(model, inputs, label_smoothing=self.args.label_smoothing_factor)
        return nats * self.args.world_size / num_items_in_batch.clamp(min=1)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; a loss that is not finite becomes zero and is recorded (non_finite.py)."""
        return self.non_finite.finite_loss(super().training_step(model, inputs, num_items_in_batch), inputs["origins"])

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As in the Trainer, which counts the model's weights again at every step: 5 ms of 32 layers with adapters."""
        return 6 * inputs["input_ids"].numel() * self._weights_counted

    # Private: for --include_num_input_tokens_seen non_padding, the Trainer would add up a mask that rows do not have.
    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """As in the Trainer; rows without a mask have no padding."""
        super()._track_num_input_tokens({name: value for name, value in inputs.items() if value is not None})

    @cached_property
    def _weights_counted(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    # Private: the only way to clip without a walk through all modules at every step (3 ms of 32 layers with adapters).
    def _clip_grad_norm(self, model: Any) -> Any:
        if self.is_sharded:  # FSDP and DeepSpeed recognise their own parameters
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(learned_weights(self.model), self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of the steps that were made, without skipped steps."""
        self.non_finite.judge(self.args)
        if "loss" in logs:
            mean = self.non_finite.mean_of_steps_made(logs.pop("loss"))
            logs = {**({} if mean is None else {"loss": mean}), **logs}
        super().log(logs, start_time)

    def before_saving(self) -> None:
        """Judge the last step before a checkpoint is written."""
        self.non_finite.judge(self.args)

    def no_step_is_left(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the run's last step; an evaluation that it owes may be made to find that out.

        The Trainer itself would make one more step from such a checkpoint (seen in 5.23, with max_steps).
        """
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        steps_are_made = state.global_step >= self._steps_of_the_run
        return steps_are_made or self.early_stopping.is_due(state.log_history) or self._owed_evaluation_ends(state)

    def finish_at(self, checkpoint: Path) -> None:
        """Do all that a run does besides its steps: take the checkpoint's state, evaluate if owed, load the best."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        self.state.max_steps = self._steps_of_the_run
        self.work.on_train_begin(self.args, self.state, self.control)
        self.begin()
        self.take_the_best()
        self.work.on_train_end(self.args, self.state, self.control)

    @property
    def _steps_of_the_run(self) -> int:
        """All its steps at the present length, which may be another than a checkpoint's."""
        return self.args.max_steps if self.args.max_steps > 0 else run_length(len(self.train_dataset), self.args).steps

    def _owed_evaluation_ends(self, state: TrainerState) -> bool:
        """Whether a checkpoint owes an evaluation that ends the run early.

        The evaluation is made here to find that out, and made again later to be logged: the Trainer reacts to the
        result of an evaluation only after a further step.
        """
        carried = state.stateful_callbacks.get(type(self.work).__name__, {}).get("attributes", {})
        if not self.early_stopping.patience or not carried.get("owes_evaluation"):
            return False
        with random_state_kept():
            sums = self._evaluation_sums(None)
        assert sums is not None, "no stop is heard before the first step"
        loss = sums[0] / max(sums[1], 1)
        return self.early_stopping.is_due([*state.log_history, {"eval_loss": loss, "step": state.global_step}])

    def mean_loss(self) -> float:
        """Mean over all steps of the run, including those before a resume, of nats per target."""
        total, last = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        return total / max(last, 1)

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader, with workers that ignore signals to the job."""
        return with_signal_masked_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """A loader that yields every record once.

        accelerate would repeat records to fill the last ranks' batches, and --dataloader_drop_last leave out the last.
        """
        # Both have one setting for all loaders, so it is changed only while this one is created.
        loader_config = self.accelerator.dataloader_config
        for_training = loader_config.even_batches, self.args.dataloader_drop_last
        # Ranks that can compute alone may have different numbers of batches.
        loader_config.even_batches = loader_config.even_batches and self.is_sharded
        self.args.dataloader_drop_last = False
        try:
            return with_signal_masked_workers(super().get_eval_dataloader(eval_dataset))
        finally:
            loader_config.even_batches, self.args.dataloader_drop_last = for_training

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate: nats per target over all evaluation records, independent of the batch size.

        Returns {} if the run is told to stop meanwhile; a resumed run then makes the evaluation first. Random numbers
        of training are not affected. Raises RunFailed if the loss is not finite.
        """
        began = time.perf_counter()
        with random_state_kept():
            sums = self._evaluation_sums(eval_dataset)
        if sums is None:
            self.work.owes_evaluation = True
            self.control.should_evaluate = False  # otherwise it would start again at the end of the epoch
            self.stop.stop_here(self.control)
            return {}
        nats, targets = sums
        loss = nats / max(targets, 1)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_targets": targets,
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_sums(self, eval_dataset: Any) -> tuple[float, int] | None:
        """(nats, targets) of all evaluation records on all ranks; None if a stop interrupted it."""
        model = self.model_wrapped if self.is_sharded else self.model
        model.eval()
        self.take_averaged_weights()
        sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # nats, targets, number of ranks that gave up
        not_finite: list[str] = []
        for batch in self.get_eval_dataloader(eval_dataset):
            give_up = self._may_give_up and self.stop.requested
            if self.is_sharded:  # all ranks give up together: each needs the others
                give_up = on_any_rank(give_up, self.args)
            if give_up:
                sums[2] = 1
                break
            with torch.no_grad(), self.compute_loss_context_manager():
                nats, count = target_nats(model, send_to_device(batch, self.args.device))
            if not torch.isfinite(nats):
                not_finite += batch["origins"]
            sums[:2] += torch.stack([nats.double(), count.double()]).cpu()
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device)[None]).sum(0).cpu()
        if sums[2]:
            return None
        if not torch.isfinite(sums[0]):
            raise RunFailed(
                f"The evaluation loss is {sums[0].item()} at step {self.state.global_step}, in batches with these "
                f"records:\n{listing(of_all_ranks(not_finite, self.args))}\n"
                "The adapter on disk is the one of the last checkpoint. Lower --learning_rate, or pass --dtype bfloat16"
                " or float32 instead of float16."
            )
        return sums[0].item(), int(sums[1])

    @property
    def _may_give_up(self) -> bool:
        """Whether a stop may interrupt an evaluation.

        It may not if the schedule needs the result, or before the first step, when no checkpoint could record it as
        owed.
        """
        return isinstance(self.lr_scheduler, LambdaLR) and self.state.global_step > 0

    # Private: the Trainer calls it after every evaluation, even one without a result.
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in the Trainer, but only a step with a checkpoint can be the best.

        An interrupted evaluation is saved as owed, not as the best.
        """
        if not metrics:
            return self.work.owes_evaluation
        is_best = self._is_saved_by_schedule and super()._determine_best_metric(metrics, trial)
        return is_best or self.stop.reason is not None  # a stop saves its step, with --save_strategy best too

    @property
    def _is_saved_by_schedule(self) -> bool:
        """Whether the settings ask for a checkpoint of this step. A stop saves other steps, which must not matter."""
        state, strategy = self.state, self.args.save_strategy
        if strategy == SaveStrategy.STEPS:
            return state.global_step % state.save_steps == 0 or state.global_step >= state.max_steps
        if strategy == SaveStrategy.EPOCH:
            return state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        return True

    @property
    def is_stopped_early(self) -> bool:
        """Whether the run was told to stop while work was left, which a resumed run does."""
        is_unfinished = self.state.global_step < self.state.max_steps or self.work.owes_evaluation
        return self.stop.reason is not None and is_unfinished

    # Private: the Trainer would load the best checkpoint even if the run is to be resumed from the last one.
    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights if the run is over. Raises RunFailed if it is damaged."""
        if not self.is_stopped_early:
            super()._load_best_model()

    # Private: the only way to use another sampler in the Trainer's own DataLoader.
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in the Trainer, but both ways to sort by length use the run's seed.

        Grouping by length uses a new seed in each epoch, so that a resume repeats it.
        """
        sampler, seed = super()._get_train_sampler(train_dataset), shuffling_seed(self.args)
        if hasattr(sampler, "seed"):  # batch_rebalance, for which the Trainer has a seed of its own
            sampler.seed = seed
        if type(sampler) is LengthGroupedSampler:
            return _ByLength(sampler, seed=lambda: seed + math.floor((self.state.epoch or 0) + 1e-6))
        return sampler

    def begin(self) -> None:
        """Before the first step, apply the present settings' intervals, name the best, make an owed evaluation."""
        self.first_step = self.state.global_step
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step:
            self.args.eval_on_start = False  # it was made at the start of the original run
        self.name_the_best()
        self.make_owed_evaluation()
        self.note_best_saved()

    def make_owed_evaluation(self) -> None:
        """Make the evaluation that was due at the checkpoint's step but not made before it was saved."""
        if self.work.owes_evaluation:
            self.work.owes_evaluation = False
            # Private: calls evaluate(), and then steps a schedule that needs the result.
            self._determine_best_metric(self._evaluate(None, None), None)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(self.resumed_from)


class _ByLength(LengthGroupedSampler):
    """The Trainer's grouping by length, with random numbers from a seed per epoch instead of the process's state."""

    def __init__(self, like: LengthGroupedSampler, *, seed: Callable[[], int]) -> None:
        super().__init__(like.batch_size, lengths=like.lengths, generator=torch.Generator())
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed())
        return super().__iter__()
