"""What is watched over is said, and no update is made from what is not finite."""

from types import SimpleNamespace

import pytest
import torch

from atomtune.errors import RunFailed
from atomtune.train.callbacks import GradientCheck, LossSpikeWarning, SkipNonFinite, WorkCounter

ONE_RANK = SimpleNamespace(world_size=1)


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def spikes_of(losses: list[float]) -> list[str]:
    said: list[str] = []
    spikes = LossSpikeWarning(said.append)
    for step, loss in enumerate(losses):
        spikes.on_log(None, state(step), None, logs={"loss": loss})
    return said


def test_a_jump_of_the_loss_is_said_with_its_step():
    (said,) = spikes_of([2.0, 1.9, 2.1] * 5 + [6.5, 2.0])
    assert "jumped to 6.500 at step 15; it was 2.000" in said


@pytest.mark.parametrize("losses", [[9.0 - 0.3 * n for n in range(25)], [2.0, 2.6, 1.5, 2.4, 1.7] * 6, [2.0, 9.0]])
def test_a_fall_and_a_noisy_loss_are_no_jump(losses):
    assert spikes_of(losses) == []


def model() -> torch.nn.Module:
    made = torch.nn.Module()
    made.lora_A, made.lora_B = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    return made


def test_layers_without_gradient_are_named_once():
    said: list[str] = []
    one, check = model(), GradientCheck(said.append)
    one.lora_B(one.lora_A(torch.zeros(1, 3))).sum().backward()  # a zero input: no gradient for B
    for _ in range(2):
        check.on_pre_optimizer_step(None, state(0), None, model=one)
    assert len(said) == 1
    assert "no gradient reaches 1 of 1 adapter layers" in said[0]


def test_layers_with_gradient_are_not_mentioned():
    one = model()
    one.lora_B(one.lora_A(torch.ones(1, 3))).sum().backward()
    GradientCheck(pytest.fail).on_pre_optimizer_step(None, state(0), None, model=one)


def finite(budget: int, said: list[str] | None = None) -> SkipNonFinite:
    return SkipNonFinite(WorkCounter(), budget=budget, notice=(said if said is not None else []).append)


def step(watch: SkipNonFinite, one: torch.nn.Module, losses: list[float], number: int) -> float:
    total = sum(watch.finite_loss(torch.tensor(loss), [f"d.jsonl:{number}{i}"]).item() for i, loss in enumerate(losses))
    watch.on_pre_optimizer_step(ONE_RANK, state(number), None, model=one)
    watch.on_step_end(ONE_RANK, state(number + 1), None)
    return total


def with_gradient(value: float) -> torch.nn.Module:
    one = model()
    for weight in one.parameters():
        weight.grad = torch.full_like(weight, value)
    return one


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_records(spoiled):
    with pytest.raises(RunFailed, match=r"(nan|inf) at step 4, in a batch with these records:\nd.jsonl:31\n"):
        step(finite(0), with_gradient(1.0), [1.0, spoiled], 3)


def test_a_gradient_that_is_not_finite_names_all_records_of_the_step():
    with pytest.raises(RunFailed, match=r"A gradient is not finite at step 4.*\nd.jsonl:30\nd.jsonl:31\n"):
        step(finite(0), with_gradient(float("inf")), [1.0, 1.0], 3)


def test_a_device_is_waited_for_once_a_step(monkeypatch):
    # A look at each loss and each of 400 gradients let a GPU wait 392 times a step.
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
def test_a_large_gradient_is_no_infinite_one(dtype):
    # A sum of squares would overflow.
    one = with_gradient(1.0).to(dtype)
    for weight in one.parameters():
        weight.grad = torch.full_like(weight, torch.finfo(dtype).max)
    step(finite(0), one, [1.0], 0)


def test_a_step_left_out_changes_no_weight_and_no_mean():
    said: list[str] = []
    watch, one = finite(1, said), with_gradient(float("nan"))
    sums = step(watch, with_gradient(1.0), [0.5, 0.5], 0) + step(watch, one, [0.7, float("nan")], 1)
    sums += step(watch, with_gradient(1.0), [1.0, 1.0], 2)
    assert all(weight.grad is None for weight in one.parameters())
    assert watch.mean_of_steps_made(sums / 3) == pytest.approx((1.0 + 2.0) / 2)
    assert watch.work.skipped_steps == 1
    assert "left out (1 of at most 1)" in said[0]
    with pytest.raises(RunFailed, match="1 such steps were left out before"):
        step(watch, with_gradient(1.0), [float("nan")], 3)


def test_steps_whose_gradients_are_clipped_to_zero_are_counted_and_said():
    # Each gradient is finite, and the norm of all is not: clipping divides by infinity.
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


def test_a_mean_over_no_step_is_none():
    watch = finite(1)
    step(watch, with_gradient(1.0), [float("nan")], 0)
    assert watch.mean_of_steps_made(0.0) is None
    assert watch.mean_of_steps_made(1.0) == 1.0


def test_a_step_whose_gradients_are_not_finite_tells_nothing_of_what_is_reached():
    said: list[str] = []
    check = GradientCheck(said.append)
    check.on_pre_optimizer_step(None, state(0), None, model=with_gradient(float("nan")))
    check.on_pre_optimizer_step(None, state(1), None, model=with_gradient(0.0))
    assert len(said) == 1, "the first step that can tell"
