"""Laws of averaging optimizers (schedule_free_*): the average is evaluated and saved, and resuming continues the run.

The optimizer here behaves like those of the package schedulefree (train(), eval(), no step outside of training). It
stores its average, which the package computes from the weights.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback

import atomtune.train.model  # noqa: F401  # `atomtune.train` is also a function
from atomtune.cli import main
from atomtune.train.trainer import LoraTrainer

INTERPOLATION = 0.9  # share of the average in the weights at which gradients are computed
EVALUATES = ("--eval_size", "8", "--eval_strategy", "steps", "--eval_steps", "4")


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: z follows the gradient, x is the mean of all z, and gradients are computed between the two."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "steps": 0, "train_mode": False})

    def _each(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight].update(x=weight.detach().clone(), z=weight.detach().clone())
                yield group, weight, self.state[weight]

    @torch.no_grad()
    def train(self) -> None:
        for group, weight, state in self._each():
            if not group["train_mode"]:
                weight.copy_(torch.lerp(state["z"], state["x"], INTERPOLATION))
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        for group, weight, state in self._each():
            if group["train_mode"]:
                weight.copy_(state["x"])
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert self.param_groups[0]["train_mode"], "not in train mode"
        for group in self.param_groups:
            group["steps"] += 1
        for group, weight, state in self._each():
            if weight.grad is None:
                continue
            state["z"] -= group["lr"] * weight.grad
            state["x"].lerp_(state["z"], 1 / group["steps"])
            weight.copy_(torch.lerp(state["z"], state["x"], INTERPOLATION))


@pytest.fixture
def evaluated(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The adapter's weights at each evaluation, the first before training; runs use the optimizer above."""
    seen = []
    sums = LoraTrainer._evaluation_sums

    def noted(trainer, eval_dataset):
        answer = sums(trainer, eval_dataset)
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora" in name}
        seen.append({name.replace(".default", ""): weight for name, weight in weights.items()})
        return answer

    monkeypatch.setattr(LoraTrainer, "_evaluation_sums", noted)
    optimizer = staticmethod(lambda args, model=None: (Averaging, {"lr": args.learning_rate}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", optimizer)
    return seen


def train(base: Path, data: Path, out: Path, *more: str) -> None:
    words = ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)]
    words += ["--dtype", "float32", "--per_device_train_batch_size", "4", "--learning_rate", "0.5"]
    assert main([*words, "--optim", "schedule_free_sgd", "--lr_scheduler_type", "constant", *more]) == 0


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def averages(checkpoint: Path) -> list[torch.Tensor]:
    """The averages in an optimizer's state, which numbers its weights."""
    return [state["x"] for state in torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()]


def sums(weights) -> list[float]:
    return sorted(weight.double().sum().item() for weight in weights)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_saved_adapter_is_the_average_that_was_evaluated(models, dialogues, tmp_path, evaluated):
    train(models("llama"), dialogues, tmp_path, "--max_steps", "6", "--save_steps", "2", *EVALUATES)
    assert same(adapter(tmp_path / "checkpoint-4"), evaluated[1])
    assert same(adapter(tmp_path), adapter(tmp_path / "checkpoint-6"))
    for checkpoint in (tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)):
        assert sums(adapter(checkpoint).values()) == sums(averages(checkpoint)), checkpoint.name


def test_the_final_adapter_is_the_average_without_checkpoints_too(models, dialogues, tmp_path, evaluated):
    train(
        models("llama"), dialogues, tmp_path / "none", "--max_steps", "6", "--save_strategy", "no", "--eval_size", "0"
    )
    train(models("llama"), dialogues, tmp_path / "some", "--max_steps", "6", "--save_steps", "3", "--eval_size", "0")
    assert sums(adapter(tmp_path / "none").values()) == sums(averages(tmp_path / "some" / "checkpoint-6"))


@pytest.mark.slow
def test_a_resumed_run_gives_the_adapter_of_an_uninterrupted_run(models, dialogues, tmp_path, evaluated):
    flags = ("--max_steps", "6", "--save_steps", "3", *EVALUATES)
    train(models("llama"), dialogues, tmp_path / "whole", *flags)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    train(models("llama"), dialogues, tmp_path / "resumed", *flags, "--resume_from_checkpoint", checkpoint)
    assert same(adapter(tmp_path / "resumed"), adapter(tmp_path / "whole"))


def test_the_best_checkpoint_is_kept_exactly_as_it_was_saved(models, dialogues, tmp_path, evaluated, monkeypatch):
    # If other weights were still in use, they would be taken for the best ones and changed when these are saved.
    flow = DefaultFlowCallback.on_step_end

    def ends_without_evaluation(callback, args, state, control, **kwargs):
        control = flow(callback, args, state, control, **kwargs)
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = False
        return control

    monkeypatch.setattr(DefaultFlowCallback, "on_step_end", ends_without_evaluation)
    best = ("--load_best_model_at_end", "true", "--save_steps", "4")
    train(models("llama"), dialogues, tmp_path, "--max_steps", "6", *EVALUATES, *best)
    assert json.loads((tmp_path / "run.json").read_text())["outcome"]["kept_step"] == 4
    assert same(adapter(tmp_path), evaluated[1])
