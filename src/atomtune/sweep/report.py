"""Report: a sweep's result as a table, sentences, a picture and a page: the best settings, and how sure that is."""

import base64
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from atomtune.choices import NOISE
from atomtune.console import Console, program
from atomtune.disk import write_text
from atomtune.durations import duration
from atomtune.language import message, translated
from atomtune.pages import picture, rendered
from atomtune.sweep.trials import Sweep, Trial

#: Files in the sweep's folder: the best settings for `train`, the loss curves, and the report as a page.
BEST, PICTURE, PAGE = "run.yaml", "sweep.png", "sweep.html"


def sentences(sweep: Sweep) -> list[str]:
    """The best trial, those that are not clearly worse, whether the range was wide enough, and the failed trials."""
    best = sweep.best
    if best is None or best.eval_loss is None:
        return ["No trial finished."]
    before = f"{best.loss_before:.3f} before training → " if best.loss_before is not None else ""
    lines = [
        f"Best: {best.name} ({best.words()}). Held-out loss {before}{best.eval_loss:.4f}, at step {best.best_step}."
    ]
    lines += _noise(sweep, best)
    lines += _at_an_end(sweep, best)
    pruned = [trial.name for trial in sweep.trials if trial.status == "pruned"]
    if pruned:
        lines.append(f"Stopped early, clearly behind: {', '.join(pruned)}.")
    lines += [f"{trial.name} failed: {trial.reason}." for trial in sweep.trials if trial.status == "failed"]
    return lines


def _noise(sweep: Sweep, best: Trial) -> Iterator[str]:
    assert best.eval_loss is not None
    others = sweep.ranked()[1:]
    # With other held-out records or another seed, their order could be reversed.
    close = [trial for trial in others if trial.eval_loss and trial.eval_loss <= best.eval_loss * (1 + NOISE)]
    records = f"{sweep.records_held_out:,} held-out records" if sweep.records_held_out else "so few records"
    if close:
        names = ", ".join(f"{trial.name} ({trial.words()})" for trial in close)
        yield (
            f"Within {NOISE:.0%} of it, too close to tell apart with {records} and one seed: {names}. Take the "
            "cheapest of these, or repeat the sweep with another --seed."
        )
    elif others and best.eval_loss:
        gap = (others[0].eval_loss or 0) / best.eval_loss - 1
        yield f"The next, {others[0].name}, is {gap:.1%} behind: more than the {NOISE:.0%} that counts as noise."


def _at_an_end(sweep: Sweep, best: Trial) -> Iterator[str]:
    """A sentence for each setting whose best value is the lowest or highest tried: a better one may lie beyond it."""
    for name, word in best.settings.items():
        try:
            # a resumed sweep may try a setting that its earlier trials left as it was
            numbers = sorted({float(trial.settings[name]) for trial in sweep.trials if name in trial.settings})
            value = float(word)
        except ValueError:
            continue
        if len(numbers) > 1 and value in (numbers[0], numbers[-1]):
            end, further = message("lowest"), message("lower")
            if value == numbers[-1]:
                end, further = message("highest"), message("higher")
            yield f"Its {name} is the {end} of those tried: a {further} one may be better still."


def command_of_best(sweep: Sweep, folder: Path) -> str:
    """The command that trains with the best settings again; the best trial's folder already holds that adapter."""
    return f"{program()} train {shlex.quote(str(folder / BEST))} --output_dir {shlex.quote(f'{folder}-best')}"


def commands(sweep: Sweep, folder: Path) -> list[str]:
    """The user's next commands, ready to copy."""
    assert sweep.best is not None
    best = shlex.quote(str(folder / sweep.best.name))
    return [
        f"{program()} chat --adapter_path {best}",
        f"{program()} evaluate --adapter_path {best}",
        command_of_best(sweep, folder),
    ]


def rows(sweep: Sweep) -> list[list[str]]:
    """A row for each trial, the best first: name, values tried, loss, step, seconds, status."""
    ranked = sweep.ranked()
    unfinished = [trial for trial in sweep.trials if trial not in ranked]
    table = []
    for trial in [*ranked, *unfinished]:
        loss = "–" if trial.eval_loss is None else f"{trial.eval_loss:.4f}"
        tried = [trial.settings.get(name, "–") for name in _tried_names(sweep)]
        step = "–" if trial.best_step is None else f"{trial.best_step:,}"
        table.append([trial.name, *tried, loss, step, duration(trial.seconds), translated(trial.status)])
    return table


def headings(sweep: Sweep) -> list[str]:
    return [message("trial"), *_tried_names(sweep), "held-out loss", "at step", message("time"), message("status")]


def _tried_names(sweep: Sweep) -> list[str]:
    """The settings that any trial tried; a resumed sweep may try one that its earlier trials left as it was."""
    return list(dict.fromkeys(name for trial in sweep.trials for name in trial.settings))


def say_result(sweep: Sweep, folder: Path, console: Console) -> None:
    table = Table(box=None)
    for heading in headings(sweep):
        table.add_column(translated(heading), overflow="fold")  # a truncated value would be useless
    for row in rows(sweep):
        table.add_row(*row)
    console.say("")
    console.print(table)
    console.say("\n" + "\n".join(map(translated, sentences(sweep))), style="bold")
    assert sweep.best is not None
    console.say(
        f"In {folder}: {sweep.best.name}/ (the best adapter), {BEST} (its settings), {PAGE} (all trials as a page), "
        "sweep.json (all figures)."
    )
    console.next_steps(commands(sweep, folder))


def draw(sweep: Sweep, path: Path) -> None:
    """Draw the held-out loss of every trial by step, with the best trial highlighted."""
    best = sweep.best
    with picture(path, loss=message("held-out loss per token (nats)")) as axes:
        for trial in [trial for trial in sweep.trials if trial.eval_history]:
            steps, losses = zip(*trial.eval_history, strict=True)
            width, shade = (2.2, 1.0) if trial == best else (1.2, 0.55)
            name = f"{trial.name}: {trial.words()}"
            axes.plot(steps, losses, "o-", markersize=3, linewidth=width, alpha=shade, label=name)
        if best is not None and best.best_step is not None:
            axes.plot([best.best_step], [best.eval_loss or 0.0], "*", color="black", markersize=12)


def write_report(sweep: Sweep, folder: Path) -> None:
    """Write sweep.png and sweep.html."""
    draw(sweep, folder / PICTURE)
    image = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    write_text(folder / PAGE, page(sweep, title=folder.name, image=image, commands=commands(sweep, folder)))


def page(sweep: Sweep, *, title: str, image: str, commands: Sequence[str]) -> str:
    """The sweep as one HTML file that loads nothing else and runs no script; image: the PNG in base64."""
    return rendered(
        "sweep",
        "sweep.html.jinja",
        title=title,
        picture=image,
        sentences=sentences(sweep),
        headings=headings(sweep),
        rows=rows(sweep),
        shared=sweep.shared.items(),
        commands=commands,
    )
