"""Search: the settings of the next trial: every combination in turn, or chosen by the results so far."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from atomtune.settings.tried import ends_of, is_range, number_or_word, points_of
from atomtune.sweep.trial_process import Progress
from atomtune.sweep.trials import Trial

#: A range whose ends differ by at least this factor is searched on a logarithmic scale.
WIDE = 10
#: No trial is stopped early before so many have finished, nor before this percentage of its own steps.
TRIALS_BEFORE_PRUNING, PERCENT_BEFORE_PRUNING = 3, 20

Watch = Callable[[Progress], bool]


class Search(Protocol):
    """Chooses the trials of a sweep."""

    total: int

    def next(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        """The settings of the trial after these; None if there are enough."""

    def watching(self, trial: Trial, trials: Sequence[Trial]) -> Watch:
        """A function that says by a trial's progress whether to stop it because it is clearly worse than the others."""


class Grid:
    """Every combination of the values, in the order they were written."""

    def __init__(self, tried: Mapping[str, tuple[str, ...]]) -> None:
        self.points = points_of(tried)
        self.total = len(self.points)

    def next(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        before = [_meaning(trial.settings) for trial in trials]
        return next((point for point in self.points if _meaning(point) not in before), None)

    def watching(self, trial: Trial, trials: Sequence[Trial]) -> Watch:
        return lambda progress: False


class Sampled:
    """optuna's search: its tree-structured Parzen estimator chooses, and trials worse than the median are stopped.

    first  the settings of the first trial: those that a run would choose by itself, if they are known
    """

    def __init__(
        self,
        tried: Mapping[str, tuple[str, ...]],
        *,
        trials: int,
        seed: int,
        first: Mapping[str, str],
        kinds: Mapping[str, Any],
    ) -> None:
        self.total, self.seed, self.first = trials, seed, first
        self.distributions = {
            name: _distribution(values, whole=float not in _members(kinds[name])) for name, values in tried.items()
        }

    def next(self, trials: Sequence[Trial]) -> dict[str, str] | None:
        if len(trials) >= self.total:
            return None
        study = self._study(trials)
        if not trials:
            study.enqueue_trial({name: self._value(name, word) for name, word in self.first.items()})
        params = study.ask(self.distributions).params
        return {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in params.items()}

    def watching(self, trial: Trial, trials: Sequence[Trial]) -> Watch:
        study = self._study(trials)
        study.enqueue_trial({name: self._value(name, word) for name, word in trial.settings.items()})
        live = study.ask(self.distributions)
        reported: set[int] = set()

        def is_behind(progress: Progress) -> bool:
            for percent, loss in _by_percent(progress.eval_history, progress.steps_planned).items():
                if percent not in reported:
                    reported.add(percent)
                    live.report(loss, percent)
            return bool(live.should_prune())

        return is_behind

    def _study(self, trials: Sequence[Trial]) -> Any:
        """An optuna study of these trials, made anew each time; sweep.json holds all that a stopped sweep needs."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            # The seed differs for each trial: a new study would otherwise draw the same values again.
            sampler=optuna.samplers.TPESampler(seed=self.seed + len(trials), n_startup_trials=4),
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=TRIALS_BEFORE_PRUNING, n_warmup_steps=PERCENT_BEFORE_PRUNING
            ),
        )
        states = {"finished": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
        for trial in trials:
            if trial.status in states:
                steps = max((step for step, _ in trial.eval_history), default=0)
                study.add_trial(
                    optuna.trial.create_trial(
                        state=states[trial.status],
                        value=trial.eval_loss if trial.status == "finished" else None,
                        params={name: self._value(name, word) for name, word in trial.settings.items()},
                        distributions=self.distributions,
                        intermediate_values=_by_percent(trial.eval_history, steps),
                    )
                )
        return study

    def _value(self, name: str, word: str) -> Any:
        """A setting as optuna's value, inside its range: rounding, as to `3.33e-05`, may have moved it outside."""
        import optuna

        distribution = self.distributions[name]
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            return word
        value = min(max(float(word), distribution.low), distribution.high)
        return round(value) if isinstance(distribution, optuna.distributions.IntDistribution) else value


def _meaning(settings: Mapping[str, str]) -> dict[str, float | str]:
    """Equal for settings that differ only in the spelling of numbers, as those of a sweep that is resumed may."""
    return {name: number_or_word(value) for name, value in settings.items()}


def middle_of(written: str) -> str:
    """The middle of a range; the geometric mean if its ends are far apart."""
    low, high = ends_of(written)
    middle = math.sqrt(low * high) if _is_wide(low, high) else (low + high) / 2
    return f"{middle:.3g}"


def _is_wide(low: float, high: float) -> bool:
    return low > 0 and high / low >= WIDE


def _distribution(values: tuple[str, ...], *, whole: bool) -> Any:
    """optuna's distribution over listed values, or over a range of numbers."""
    import optuna

    if len(values) > 1 or not is_range(values[0]):
        return optuna.distributions.CategoricalDistribution(values)
    low, high = ends_of(values[0])
    if whole:
        return optuna.distributions.IntDistribution(int(low), int(high), log=_is_wide(low, high))
    return optuna.distributions.FloatDistribution(low, high, log=_is_wide(low, high))


def _members(kind: Any) -> tuple[Any, ...]:
    """The members of a union type; of any other type, itself."""
    return (kind, *getattr(kind, "__args__", ()))


def _by_percent(history: Sequence[tuple[int, float]], steps: int) -> dict[int, float]:
    """Percent of the steps → held-out loss, so that trials of different lengths are compared at the same progress."""
    return {round(100 * step / steps): loss for step, loss in history if step > 0 and steps}
