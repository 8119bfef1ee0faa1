"""Report: the figures of all models, a sentence on each tuned model, and how report.json and report.md are written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from atomtune import __version__
from atomtune.evaluate.account import Account
from atomtune.evaluate.evaluation import Evaluation
from atomtune.evaluate.intervals import Bootstrap, Figure
from atomtune.evaluate.metrics import (
    ALL_METRICS,
    NATS,
    PROBE,
    Metric,
    Score,
    change_per_record,
    differences,
    figures_of,
    judged,
    probe_results,
)
from atomtune.language import message, singular

#: How many records are shown on each side.
SHOWN = 8
#: From here on, powers of ten are shown: the perplexity of a model that has diverged may have hundreds of digits.
_LARGE = 1e9
#: Measures that the sentence names as better, worse or unclear.
_TELLING = ("nats_per_token", "chrf", "exact_match", "stop_rate", "call_known_rate", "probe_nats_per_token")


_INTERVALS = "In brackets: the 95 % interval (shares of answers: Wilson score; other figures: bootstrap over records)."


@dataclass(frozen=True)
class Shown:
    """One record side by side."""

    origin: str
    user_text: str  # the user's own words
    prompt: str  # all that the model is sent
    reference: str
    answers: dict[str, str]  # by model
    nats: dict[str, float]  # per token, by model


@dataclass(frozen=True)
class MostChanged:
    """The records that a model improved or worsened most against the base, the most changed first."""

    title: str
    records: list[Shown]


@dataclass(frozen=True)
class Report:
    """All that is written into the reports and shown on the terminal."""

    base_path: str
    sources: list[str]
    records: int
    answers: int
    models: dict[str, dict[str, Figure]]
    changes: dict[str, dict[str, Figure]]  # model → metric → difference from the base
    most_changed: list[MostChanged]
    max_new_tokens: int
    stopped_early: bool
    lm_eval: dict[str, dict[str, Score]]  # model → task and metric → score
    account: Account
    made_from: Mapping[str, Any]  # what the figures depend on, for report.json

    @property
    def lm_eval_names(self) -> list[str]:
        """The tasks and metrics that lm-eval scored."""
        return list(dict.fromkeys(name for own in self.lm_eval.values() for name in own))

    @property
    def has_probe(self) -> bool:
        """Whether the forgetting probe was done; Ctrl-C may have come before it."""
        return any(PROBE.name in own for own in self.models.values())

    def to_json(self) -> dict[str, Any]:
        """report.json; other programs read its `models`, so their form stays."""
        return {
            "atomtune": __version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": self.base_path,
            "records": self.records,
            "answers": self.answers,
            **self.account.to_json(),
            "data": self.sources,
            "stopped_early": self.stopped_early,
            **self.made_from,
            "interval": "95 %; shares of answers: Wilson score, other figures: bootstrap over records",
            "models": _listed(self.models),
            "against_base": _listed(self.changes),
            "lm_eval": {
                model: {name: asdict(score) for name, score in own.items()} for model, own in self.lm_eval.items()
            },
        }

    def sentences(self, worded: Callable[[str], str] = str) -> list[str]:
        """What the figures say about each tuned model.

        worded  translates the words, for example `translated`
        """
        return [_sentence(name, self.models, changes, worded) for name, changes in self.changes.items()]


def make_report(
    done: Evaluation,
    *,
    base_path: str,
    sources: list[str],
    max_new_tokens: int,
    seed: int,
    account: Account,
    made_from: Mapping[str, Any],
) -> Report:
    """Figures with intervals, over the same resamples of the records for every model."""
    names = list(done.results)
    draws = Bootstrap(len(done.records), seed=seed)
    models = {name: figures_of(results, draws) for name, results in done.results.items()}
    changes = {name: differences(done.results[name], done.results[names[0]], draws) for name in names[1:]}
    if done.probe:
        probe = {name: probe_results(scores) for name, scores in done.probe.items()}
        probe_draws = Bootstrap(len(probe[names[0]]), seed=seed)
        for name in names:
            models[name][PROBE.name] = figures_of(probe[name], probe_draws)[NATS.name]
        for name in names[1:]:
            changes[name][PROBE.name] = differences(probe[name], probe[names[0]], probe_draws)[NATS.name]
    return Report(
        base_path=base_path,
        sources=sources,
        records=len(done.records),
        answers=sum(len(result.answers) for result in done.results[names[0]]),
        models=models,
        changes=changes,
        most_changed=[side for name in names[1:] for side in _most_changed(done, name, alone=len(names) == 2)],
        max_new_tokens=max_new_tokens,
        stopped_early=done.stopped_early,
        lm_eval=done.lm_eval,
        account=account,
        made_from=made_from,
    )


def _most_changed(done: Evaluation, model: str, *, alone: bool) -> Iterator[MostChanged]:
    """The records whose loss a tuned model lowered most, then those whose loss it raised most, where there are any."""
    base = next(iter(done.results))
    changes = change_per_record(done.results[model], done.results[base])
    order = sorted(range(len(changes)), key=lambda row: changes[row])
    improved = "Most improved" if alone else f"Most improved by {model}"
    worsened = "Most worsened" if alone else f"Most worsened by {model}"
    for title, rows in (
        (improved, [row for row in order if changes[row] < 0]),
        (worsened, [row for row in reversed(order) if changes[row] > 0]),
    ):
        if rows:
            yield MostChanged(title, [_shown(done, row) for row in rows[:SHOWN]])


def _shown(done: Evaluation, row: int) -> Shown:
    """A record's last answer, so that the whole conversation is before it."""
    record = done.records[row]
    question = record.questions[-1] if record.questions else None
    answers: dict[str, str] = {}
    nats: dict[str, float] = {}
    for name, results in done.results.items():
        result = results[row]
        nats[name] = result.scores.nats_per_token
        if result.answers:
            answers[name] = result.answers[-1].text
    prompt, reference = (question.prompt, question.reference) if question else ("", "")
    return Shown(record.origin, record.user_text, prompt, reference, answers, nats)


def _listed(figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, list[float]]]:
    return {name: {key: figure.as_list() for key, figure in own.items()} for name, own in figures.items()}


def _sentence(
    name: str,
    models: Mapping[str, Mapping[str, Figure]],
    changes: Mapping[str, Figure],
    worded: Callable[[str], str],
) -> str:
    base = next(iter(models))
    words: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for metric in ALL_METRICS:
        if metric.name not in _TELLING or metric.name not in changes:
            continue
        verdict = judged(metric, changes[metric.name])
        before, after = models[base][metric.name], models[name][metric.name]
        if verdict in words:
            change = f"{shown(metric, before.value)} → {shown(metric, after.value)}"
            words[verdict].append(f"{worded(metric.title)} {change}")
    colon, comma, stop = worded(message(": ")), worded(message(", ")), worded(message("."))
    parts = [f"{worded(title)}{colon}{comma.join(words[key])}{stop}" for key, title in _TITLES if words[key]]
    gap = " " if stop == "." else ""  # Chinese has no space after a full stop
    return gap.join([worded(f"{name} compared with {base}."), *parts])


_TITLES = (
    ("better", message("Better")),
    ("worse", message("Worse")),
    ("unclear", "No clear difference with so few records"),
)


def shown(metric: Metric, value: float) -> str:
    """A value in the metric's own unit."""
    if metric.shares_answers or metric.name == "token_accuracy":
        return f"{100 * value:.1f} %"
    if metric.name == "chrf":
        return f"{value:.1f}"
    if value >= _LARGE:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def metric_text(report: Report, model: str, metric: Metric) -> str:
    """A model's value with its interval and one unit: `10.0 % (4.0–18.0)`; a dash if the model has no such figure.

    For a single record, the value alone.
    """
    figure = report.models[model].get(metric.name)
    if figure is None:
        return "–"
    if not figure.has_interval:
        return shown(metric, figure.value)
    return f"{shown(metric, figure.value)} ({interval(metric, figure)})"


def interval(metric: Metric, figure: Figure) -> str:
    """The interval alone, in figures that are the same in every language; "" for a single record."""
    if not figure.has_interval:
        return ""
    low, high = (shown(metric, bound).removesuffix(" %") for bound in (figure.low, figure.high))
    return f"{low}–{high}"


def score_text(report: Report, model: str, name: str) -> str:
    """A model's score in lm-eval with its standard error; a dash if Ctrl-C came before it."""
    score = report.lm_eval.get(model, {}).get(name)
    if score is None:
        return "–"
    return f"{score.value:.3f}" + (f" ± {score.standard_error:.3f}" if score.standard_error is not None else "")


def used_metrics(report: Report) -> list[Metric]:
    """The metrics that at least one model has."""
    return [metric for metric in ALL_METRICS if any(metric.name in own for own in report.models.values())]


def markdown(report: Report) -> str:
    """report.md"""
    names = list(report.models)
    lines = [
        "# Evaluation",
        "",
        *report.sentences(),
        "",
        singular(f"{report.records:,} records of {', '.join(report.sources)}; base {report.base_path}. ")
        + (_INTERVALS if report.records > 1 else ""),
        "",
        *_account(report.account),
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for metric in used_metrics(report):
        cells = [metric_text(report, model, metric) for model in names]
        lines.append(f"| {metric.title} | {' | '.join(cells)} |")
    for name in report.lm_eval_names:
        cells = [score_text(report, model, name) for model in names]
        lines.append(f"| lm-eval {name} (± standard error) | {' | '.join(cells)} |")
    for side in report.most_changed:
        lines += ["", f"## {side.title}", ""]
        for record in side.records:
            lines += [f"### {record.origin}", "", *_quoted("prompt", record.user_text or record.prompt)]
            lines += _quoted("reference", record.reference)
            for name, answer in record.answers.items():
                lines += _quoted(f"{name} ({record.nats[name]:.2f} nats per token)", answer)
    return "\n".join(lines) + "\n"


def _account(account: Account) -> Iterator[str]:
    """The account's sentences, each followed by an empty line; the places of a list are an indented block."""
    for note in (account.summary(), *account.notes()):
        title, _, places = singular(note).partition("\n")
        yield from (title, "", *(f"    {line}" for line in places.splitlines()), *([""] if places else []))


def _quoted(title: str, text: str) -> list[str]:
    """A text as an indented block, which Markdown shows as it is."""
    return [f"{title}:", "", *(f"    {line}" for line in text.splitlines() or [""]), ""]
