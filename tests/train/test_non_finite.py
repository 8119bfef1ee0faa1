"""Values that are not finite cause no update, whether a step is checked before the update or on the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from atomtune.errors import RunFailed
from atomtune.train import non_finite
from atomtune.train.callbacks import WorkCounter
from atomtune.train.non_finite import SkipNonFinite
from tests.train.test_callbacks import model, state, with_gradient

NAN = float("nan")
ONE_RANK = SimpleNamespace(world_size=1, max_grad_norm=1.0)


def finite(budget: int, said: list[str] | None = None) -> SkipNonFinite:
    return SkipNonFinite(WorkCounter(), budget=budget, notice=(said if said is not None else []).append)


def step(watch: SkipNonFinite, one: torch.nn.Module, losses: list[float], number: int) -> float:
    total = sum(watch.finite_loss(torch.tensor(loss), [f"d.jsonl:{number}{i}"]).item() for i, loss in enumerate(losses))
    watch.on_pre_optimizer_step(ONE_RANK, state(number), None, model=one)
    watch.on_step_end(ONE_RANK, state(number + 1), None)
    return total


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_reported_with_step_and_records(spoiled):
    with pytest.raises(RunFailed, match=r"(nan|inf) at step 4, in a batch with these records:\nd.jsonl:31\n"):
        step(finite(0), with_gradient(1.0), [1.0, spoiled, 1.0], 3)


def test_a_non_finite_gradient_is_reported_with_all_records_of_the_step():
    with pytest.raises(RunFailed, match=r"A gradient is not finite at step 4.*\nd.jsonl:30\nd.jsonl:31\n"):
        step(finite(0), with_gradient(float("inf")), [1.0, 1.0], 3)


def test_the_device_is_synchronized_only_once_per_step(monkeypatch):
    # Reading each loss and each of 400 gradients made the host wait for a GPU 392 times per step.
    waits: list[int] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: (waits.append(1), real(self))[1])
    watch = finite(0)
    for loss in (1.0, 2.0, 3.0):
        watch.finite_loss(torch.tensor(loss), ["d.jsonl:1"])
    watch.on_pre_optimizer_step(ONE_RANK, state(0), None, model=with_gradient(1.0))
    assert len(waits) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_finite_gradient_is_not_taken_for_infinite(dtype):
    # A sum of squares would overflow.
    one = with_gradient(1.0).to(dtype)
    for weight in one.parameters():
        weight.grad = torch.full_like(weight, torch.finfo(dtype).max)
    step(finite(0), one, [1.0], 0)


def test_a_skipped_step_changes_no_weight_and_not_the_mean_loss():
    said: list[str] = []
    watch, one = finite(1, said), with_gradient(float("nan"))
    sums = step(watch, with_gradient(1.0), [0.5, 0.5], 0) + step(watch, one, [0.7, float("nan")], 1)
    sums += step(watch, with_gradient(1.0), [1.0, 1.0], 2)
    assert all(weight.grad is None for weight in one.parameters())
    assert watch.mean_of_steps_made(sums / 3) == pytest.approx((1.0 + 2.0) / 2)
    assert watch.work.skipped_steps == 1
    assert "is skipped (1 of at most 1)" in said[0]
    with pytest.raises(RunFailed, match="1 such steps were skipped before"):
        step(watch, with_gradient(1.0), [float("nan")], 3)


def _mean_of_one_rank(rank: int, losses: list[list[float]], folder: str) -> None:
    """In its own process: make steps with these losses, and write the mean that is logged."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    watch, ranks = finite(len(losses)), SimpleNamespace(world_size=2, device=torch.device("cpu"))
    total = 0.0
    for number, loss in enumerate(losses):
        total += watch.finite_loss(torch.tensor(loss[rank]), ["d.jsonl:1"]).item()
        watch.on_pre_optimizer_step(ranks, state(number), None, model=with_gradient(1.0))
        watch.on_step_end(ranks, state(number + 1), None)
    everyones = torch.tensor(total)
    torch.distributed.all_reduce(everyones)  # as the Trainer does
    mean = watch.mean_of_steps_made(everyones.item() / 2 / len(losses))
    Path(folder, str(rank)).write_text(str(mean), encoding="utf-8")


@pytest.mark.slow
def test_a_step_skipped_on_all_ranks_is_excluded_from_every_ranks_mean_loss(tmp_path):
    # Catches a rank that counts only its own losses: the NaN may be another rank's.
    losses = [[1.0, 3.0], [5.0, NAN], [2.0, 4.0]]
    torch.multiprocessing.spawn(_mean_of_one_rank, args=(losses, str(tmp_path)), nprocs=2)
    assert [float((tmp_path / rank).read_text()) for rank in ("0", "1")] == [2.5, 2.5]


def test_steps_with_gradients_clipped_to_zero_are_counted_and_reported():
    # Each gradient is finite, but their common norm is not, and clipping divides by infinity.
    said: list[str] = []
    watch = finite(0, said)
    for number in range(8):
        one = with_gradient(1e30)
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        step(watch, one, [1.0], number)
    step(watch, with_gradient(1.0), [1.0], 8)
    assert watch.work.steps_without_gradient == 8
    assert len(said) == SkipNonFinite.WARNINGS
    assert "every gradient is zero at step 1" in said[0]
    assert "--max_grad_norm" in said[0]
    assert "d.jsonl:00" in said[0]


def test_the_mean_loss_over_zero_steps_is_none():
    watch = finite(1)
    step(watch, with_gradient(1.0), [float("nan")], 0)
    assert watch.mean_of_steps_made(0.0) is None
    assert watch.mean_of_steps_made(1.0) == 1.0


class Run:
    """Steps of an optimizer that skips non-finite updates on the device, as on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
        monkeypatch.setattr(non_finite, "JUDGED_LATER", ("cpu",))
        torch.manual_seed(0)
        self.model, self.said, self.steps = model(), list[str](), 0
        self.watch = finite(budget, self.said)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.scaler: torch.amp.GradScaler | None = None

    def step(self, loss: float, gradient: float) -> None:
        for weight in self.model.parameters():
            weight.grad = torch.full_like(weight, gradient)
        self.watch.finite_loss(torch.tensor(loss), [f"d.jsonl:{self.steps}"])
        inside_accelerate = AcceleratedOptimizer.__new__(AcceleratedOptimizer)  # __init__ needs a whole Accelerator
        inside_accelerate.optimizer, inside_accelerate.scaler = self.optimizer, self.scaler
        self.watch.on_pre_optimizer_step(
            ONE_RANK, state(self.steps), None, model=self.model, optimizer=inside_accelerate
        )
        self.optimizer.step()
        self.steps += 1
        self.watch.on_step_end(ONE_RANK, state(self.steps), None)

    def figures(self) -> list[Any]:
        """The weights, and the optimizer's state for each."""
        states = [{name: value.tolist() for name, value in each.items()} for each in self.optimizer.state.values()]
        return [*(weight.tolist() for weight in self.model.parameters()), *states]


@pytest.mark.parametrize(("loss", "gradient"), [(NAN, 1.0), (float("inf"), 1.0), (1.0, NAN), (1.0, float("-inf"))])
def test_a_step_skipped_on_the_device_changes_nothing_and_is_reported_later(monkeypatch, loss, gradient):
    one = Run(monkeypatch, budget=1)
    one.step(1.0, 1.0)
    before = one.figures()
    one.step(loss, gradient)
    assert one.figures() == before
    assert not one.said, "nobody has waited for it yet"
    one.step(1.0, 1.0)
    assert one.figures() != before
    assert "at step 2, in a batch with these records:\nd.jsonl:1\n" in one.said[0]
    assert one.watch.work.skipped_steps == 1


def test_exceeding_the_skip_budget_on_the_device_ends_the_run_before_an_update(monkeypatch):
    one = Run(monkeypatch, budget=0)
    one.step(NAN, 1.0)
    before = one.figures()
    with pytest.raises(RunFailed, match=r"nan at step 1, in a batch with these records:\nd.jsonl:0\n"):
        one.step(1.0, 1.0)
    assert one.figures()[:2] == before[:2]


def test_the_last_step_is_checked_before_the_mean_loss_is_computed(monkeypatch):
    one = Run(monkeypatch, budget=1)
    one.step(1.0, 1.0)
    one.step(3.0, NAN)
    one.watch.judge(ONE_RANK)
    assert one.watch.mean_of_steps_made((1.0 + 3.0) / 2) == 1.0


def never_fused(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.1)


def resumed_from_an_unfused_one(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer supports fused steps, but its groups come from the checkpoint."""
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    optimizer.load_state_dict(never_fused(weights).state_dict())
    return optimizer


@pytest.mark.parametrize("optimizer", [never_fused, resumed_from_an_unfused_one])
def test_an_optimizer_that_cannot_skip_on_the_device_is_checked_immediately(monkeypatch, optimizer):
    one = Run(monkeypatch, budget=1)
    one.optimizer = optimizer(list(one.model.parameters()))
    before = one.figures()
    one.step(NAN, 1.0)
    assert one.said
    assert one.figures() == before
    assert not hasattr(one.optimizer, "found_inf")


def test_with_a_grad_scaler_a_non_finite_loss_is_detected_immediately(monkeypatch):
    one = Run(monkeypatch, budget=1)
    one.scaler = torch.amp.GradScaler("cpu")
    one.scaler.scale(torch.tensor(1.0))  # as in the backward pass
    before = one.figures()
    one.step(float("inf"), 1.0)
    assert one.said
    assert one.figures() == before


@pytest.mark.parametrize(("max_grad_norm", "has_looked"), [(1.0, True), (0.0, True), (0.0, False)])
def test_a_skipped_step_also_updates_the_float16_grad_scaler(monkeypatch, max_grad_norm, has_looked):
    # A scaler that had not looked at the gradients before they were taken away ended the run, and so did one that was
    # asked to look again: transformers 5.24 lets it look even if nothing is clipped.
    one = Run(monkeypatch, budget=1)
    one.optimizer, one.scaler = never_fused(list(one.model.parameters())), torch.amp.GradScaler("cpu", init_scale=4.0)
    args = SimpleNamespace(world_size=1, max_grad_norm=max_grad_norm)
    before = one.figures()
    for loss in (NAN, 1.0):
        for weight in one.model.parameters():
            weight.grad = torch.full_like(weight, loss)
        one.scaler.scale(torch.tensor(loss))  # as in the backward pass
        if has_looked:
            one.scaler.unscale_(one.optimizer)
        one.watch.finite_loss(torch.tensor(loss), ["d.jsonl:1"])
        inside_accelerate = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
        inside_accelerate.optimizer, inside_accelerate.scaler = one.optimizer, one.scaler
        one.watch.on_pre_optimizer_step(args, state(0), None, model=one.model, optimizer=inside_accelerate)
        one.scaler.step(one.optimizer)
        one.scaler.update()
        one.watch.on_step_end(args, state(1), None)
        assert (one.figures() == before) == (loss != 1.0)
    assert one.watch.work.skipped_steps == 1 and one.scaler.get_scale() == 2.0
