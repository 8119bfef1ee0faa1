"""Search: a grid has each combination once; optuna's trials are in range, differ, and continue after a stop."""

import pytest

from atomtune.sweep.search import Grid, Sampled, middle_of
from atomtune.sweep.trial_process import Progress
from atomtune.sweep.trials import Trial

TRIED = {"learning_rate": ("1e-5:1e-3",), "lora_rank": ("4:64",), "lora_dropout": ("0", "0.1")}
KINDS = {"learning_rate": float | None, "lora_rank": int, "lora_dropout": float}


def sampled(trials: int, **first: str) -> Sampled:
    pytest.importorskip("optuna")
    return Sampled(TRIED, trials=trials, seed=3, first=first, kinds=KINDS)


def test_a_grid_gives_each_combination_once_and_passes_over_what_was_tried():
    grid, trials = Grid({"a": ("1", "2"), "b": ("x", "y")}), [Trial(1, {"a": "2", "b": "x"}, "finished")]
    while (settings := grid.next(trials)) is not None:
        trials.append(Trial(len(trials) + 1, settings))
    assert sorted((trial.settings["a"], trial.settings["b"]) for trial in trials) == [
        ("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")
    ]  # fmt: skip


def test_a_resumed_grid_knows_its_values_in_another_spelling():
    grid = Grid({"learning_rate": ("0.0001", "3e-4")})
    done = [Trial(1, {"learning_rate": "1e-4"}, "finished")]
    assert grid.next(done) == {"learning_rate": "3e-4"}


def trials_of(search: Sampled, *, known: list[Trial]) -> list[Trial]:
    """Trials whose loss is lowest at a learning rate of 1e-4."""
    trials = list(known)
    while (settings := search.next(trials)) is not None:
        loss = 1 + abs(float(settings["learning_rate"]) / 1e-4 - 1)
        trials.append(Trial(len(trials) + 1, settings, "finished", eval_loss=loss, eval_history=((10, loss),)))
    return trials


def test_sampled_trials_lie_in_their_ranges_and_the_first_is_the_usual_one():
    trials = trials_of(sampled(12, learning_rate="1e-4", lora_rank="8", lora_dropout="0.1"), known=[])
    assert len(trials) == 12
    assert trials[0].settings == {"learning_rate": "0.0001", "lora_rank": "8", "lora_dropout": "0.1"}
    for trial in trials:
        assert 1e-5 <= float(trial.settings["learning_rate"]) <= 1e-3
        assert 4 <= int(trial.settings["lora_rank"]) <= 64
        assert trial.settings["lora_dropout"] in ("0", "0.1")
    assert len({tuple(trial.settings.values()) for trial in trials}) == 12


def test_a_single_value_is_that_of_every_trial():
    pytest.importorskip("optuna")
    search = Sampled({"lora_rank": ("8",)}, trials=2, seed=3, first={}, kinds=KINDS)
    assert search.next([]) == search.next([Trial(1, {"lora_rank": "8"})]) == {"lora_rank": "8"}


def test_a_resumed_sweep_samples_the_same_trials():
    whole = trials_of(sampled(8), known=[])
    assert trials_of(sampled(8), known=whole[:5]) == whole


def test_a_trial_that_is_clearly_behind_is_stopped_and_a_better_one_is_not():
    history = ((1, 2.1), (2, 2.0), (4, 1.5), (6, 1.2), (8, 1.1), (10, 1.0))
    before = [Trial(n, settings_of(n), "finished", eval_loss=1.0, eval_history=history) for n in range(1, 5)]
    search = sampled(10)
    for loss, behind in ((9.0, True), (0.5, False)):
        watch = search.watching(Trial(5, settings_of(5)), before)
        # Its loss before training was lower, which does not count.
        assert watch(Progress(1, 10, ((0, 0.9), (1, 9.0)))) is False, "too early to tell"
        assert watch(Progress(6, 10, ((0, 0.9), (2, loss), (4, loss), (6, loss)))) is behind
        too_few = search.watching(Trial(5, settings_of(5)), before[:2])
        assert too_few(Progress(6, 10, ((6, loss),))) is False


def settings_of(number: int) -> dict[str, str]:
    return {"learning_rate": f"{number}e-5", "lora_rank": "8", "lora_dropout": "0"}


def test_the_middle_of_a_wide_range_is_geometric():
    assert [middle_of(written) for written in ("1e-5:1e-3", "1:10", "0:0.4", "1:9")] == ["0.0001", "3.16", "0.2", "5"]


def test_half_of_the_first_draws_from_a_wide_range_lie_below_its_geometric_middle():
    pytest.importorskip("optuna")
    tried = {"learning_rate": ("1e-5:1e-3",), "lora_rank": ("2:200",)}
    drawn = [Sampled(tried, trials=1, seed=seed, first={}, kinds=KINDS).next([]) for seed in range(40)]
    for name, middle in (("learning_rate", 1e-4), ("lora_rank", 20)):
        # of draws on a linear scale, 4 of 40
        assert 12 <= sum(float(settings[name]) < middle for settings in drawn) <= 28


def test_values_that_rounding_moved_out_of_their_range_and_pruned_trials_are_searched_on():
    # Words have three digits: of a range that begins at 1.2345e-5, the lowest draws are written as 1.23e-05.
    pytest.importorskip("optuna")
    tried = {"learning_rate": ("1.2345e-5:9.876e-4",), "lora_rank": ("1:8",)}
    search = Sampled(tried, trials=9, seed=3, first={"lora_rank": middle_of("1:8")}, kinds=KINDS)
    first = search.next([])
    assert first is not None and first["lora_rank"] == "4"  # of 4.5
    pruned = Trial(
        1, {"learning_rate": "1.23e-05", "lora_rank": "4"}, "pruned", eval_loss=2.0, eval_history=((4, 2.0),)
    )
    finished = Trial(2, {"learning_rate": "9.88e-04", "lora_rank": "8"}, "finished", eval_loss=1.0)
    settings = search.next([pruned, finished])
    assert settings is not None and int(settings["lora_rank"]) in range(1, 9)
