"""Sweep: the command. It estimates the time, runs the trials one after another, and names the best settings."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from atomtune.choices import RUN_RECORD
from atomtune.console import Console, print_json, progress_bar
from atomtune.data.reading.sources import among_records
from atomtune.disk import read_json_object
from atomtune.durations import duration, rough_duration
from atomtune.errors import AtomtuneError, BadSettings, ExitCode, RunFailed, Stopped, UserError
from atomtune.extras import refuse_missing_packages
from atomtune.folders import held, numbered, scratch_folder
from atomtune.language import message, translated
from atomtune.process import end_with_parent
from atomtune.settings.flags import types_of
from atomtune.settings.library import library_types
from atomtune.settings.read import TRAIN_GROUPS
from atomtune.settings.train_settings import SweepSettings
from atomtune.settings.tried import is_range, number_or_word
from atomtune.sweep.report import BEST, command_of_best, say_result, write_report
from atomtune.sweep.search import Grid, Sampled, Search, Watch, middle_of
from atomtune.sweep.settings_file import write_settings
from atomtune.sweep.trial_process import Progress, run_trial
from atomtune.sweep.trials import DONE, Sweep, Trial, read_sweep_record, write_sweep

#: Without --try: the factor between neighbouring learning rates, half an order of magnitude.
RATE_FACTOR = 3
#: With --trials and without --try: learning rates up to this factor from the derived one, and these values.
RATE_REACH = 10
USUAL_RANGES = {"lora_rank": ("4", "8", "16", "32", "64"), "lora_dropout": ("0", "0.05", "0.1")}


def sweep(settings: SweepSettings) -> int:
    """Run `atomtune sweep` and return its exit code; an AtomtuneError holds its own."""
    folder, result = sweep_into_folder(settings, Console(stderr=settings.json))
    if settings.json:
        print_json({"folder": str(folder), **result.to_json(), "command": command_of_best(result, folder)})
    return 0


def sweep_into_folder(settings: SweepSettings, console: Console) -> tuple[Path, Sweep]:
    """Run all trials; return the folder that holds them, and their results.

    Raises BadSettings, BadData or BadModel before the first trial, RunFailed if every trial failed, and Stopped on a
    signal: finished trials are kept, and --resume continues.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadSettings(["A sweep starts its trials itself, one process each: start it without torchrun."])
    if settings.trials:
        refuse_missing_packages(["optuna"], extra="sweep", what="--trials", otherwise="--try NAME=A,B without it")
    folder = _folder(settings)
    if problems := list(among_records(settings.train.data.dataset_paths, folder)):
        raise BadSettings(problems)
    with held(folder, message("sweep")):
        sweep, search = _begin(settings, folder, console)
        _say_beginning(sweep, search, folder, console)
        try:
            sweep = _run_trials(sweep, search, folder, console)
        except KeyboardInterrupt as stop:
            sweep = _stopped(folder)
            done = sum(trial.status in DONE for trial in sweep.trials)
            name = stop.args[0] if stop.args else "SIGINT"
            raise Stopped(
                f"{name} received; {done} of {search.total} trials are done and kept."
                f"\nThe same command with --resume continues with the others (--output_dir {folder})."
            ) from None
        sweep = replace(sweep, status="finished")
        write_sweep(folder, sweep)
        _refuse_nothing_finished(sweep)
        _write_best(sweep, folder)
        write_report(sweep, folder)
        say_result(sweep, folder, console)
    return folder, sweep


def _folder(settings: SweepSettings) -> Path:
    """--output_dir, or the first runs/sweep-NAME-1 that does not exist."""
    chosen = settings.train.trainer.get("output_dir")
    if chosen:
        return Path(chosen)
    if settings.train.run.resume:
        raise BadSettings(["--resume needs the --output_dir of the sweep to continue."])
    return numbered(Path("runs") / f"sweep-{Path(settings.train.data.dataset_paths[0]).stem}")


def _begin(settings: SweepSettings, folder: Path, console: Console) -> tuple[Sweep, Search]:
    """The sweep that the folder holds, or a new one with its plan."""
    before = read_sweep_record(folder)
    if before is None:
        if any(path.name != ".lock" for path in folder.iterdir()):
            raise BadSettings([f"{folder} is not empty and holds no sweep. Pass another --output_dir."])
        sweep = _planned(settings, console)
    else:
        if not settings.train.run.resume:
            raise BadSettings(
                [f"{folder} already holds a sweep. --resume continues it; another --output_dir starts a new one."]
            )
        _refuse_other_settings(settings, before)
        sweep = replace(before, tried=dict(settings.tried) or before.tried)
    search = _search(settings, sweep)
    write_sweep(folder, sweep)
    return sweep, search


def _refuse_other_settings(settings: SweepSettings, before: Sweep) -> None:
    """Raise BadSettings if this sweep's trials could not be compared with those in the folder."""
    shared = json.loads(json.dumps(dict(settings.shared)))
    names = sorted(name for name in shared.keys() | before.shared.keys() if shared.get(name) != before.shared.get(name))
    problems = [
        f"--{name} was {before.shared.get(name, 'not set')} when the sweep began and is {shared.get(name, 'not set')} "
        "now. Use the old value, or another --output_dir."
        for name in names
    ]
    if settings.trials and settings.tried and dict(settings.tried) != dict(before.tried):
        problems.append("--try differs from what it was when the sweep began. Leave it out, or use the old value.")
    if problems:
        raise BadSettings(problems)


def _planned(settings: SweepSettings, console: Console) -> Sweep:
    """A new sweep, with the time a trial takes and the values to try if the user named none."""
    tried = dict(settings.tried)
    usual = ("learning_rate", *USUAL_RANGES)
    if settings.trials and not tried and all(name in settings.shared for name in usual):
        raise BadSettings(
            [
                f"--trials: {', '.join(usual)} are all fixed, so nothing is left to try. Leave one of them out, or "
                "name what to try: --try NAME=A,B."
            ]
        )
    if settings.train.data.streaming:  # plan would read all records first
        if not tried:
            raise BadSettings(["With --streaming the learning rates to try must be named: --try learning_rate=A,B."])
        return Sweep(status="running", shared=settings.shared, tried=tried)
    console.say("Reading the records, and measuring how long a trial takes …")
    began = time.monotonic()
    forecast = _forecast(settings.shared)
    starting = time.monotonic() - began  # each trial also starts Python, imports the libraries and reads the records
    held_out = int(forecast["records_held_out"])
    if not held_out and not settings.train.data.eval_path:
        raise BadSettings(
            [
                "A sweep compares trials by the loss of held-out records, and there are too few records to hold some "
                "out automatically. Pass --eval_size N, or --eval_path FILE."
            ]
        )
    if not tried:
        tried = _usual(settings, float(forecast["learning_rate"]))
    return Sweep(
        status="running",
        shared=settings.shared,
        tried=tried,
        seconds_expected=round(starting + float(forecast["seconds"]), 1),
        records_held_out=held_out or None,
    )


def _usual(settings: SweepSettings, rate: float) -> dict[str, tuple[str, ...]]:
    """Values to try if the user named none: three learning rates, the usual one first; with --trials also ranges.

    With --trials, settings that the user fixed are not tried.
    rate  the learning rate that a run would use
    """
    if not settings.trials:
        return {"learning_rate": tuple(f"{value:.2g}" for value in (rate, rate / RATE_FACTOR, rate * RATE_FACTOR))}
    ranges = {"learning_rate": (f"{rate / RATE_REACH:.2g}:{rate * RATE_REACH:.2g}",), **USUAL_RANGES}
    return {name: values for name, values in ranges.items() if name not in settings.shared}


def _forecast(shared: Mapping[str, object]) -> Mapping[str, float]:
    """Run `atomtune plan` with these settings in its own process, so that this one imports no torch and uses no GPU.

    It encodes the records, once for all trials. Raises the error that the run would raise.
    """
    # Not in the sweep's folder, where a killed command would leave it, and no sweep could begin.
    with scratch_folder("atomtune-plan-") as scratch:
        file = scratch / "plan.yaml"
        write_settings(file, shared, comment="The settings that all trials share.")
        done = subprocess.run(
            [sys.executable, "-m", "atomtune", "plan", str(file), "--json"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            preexec_fn=end_with_parent,  # safe: see there
        )
    if done.returncode == ExitCode.DONE:
        return json.loads(done.stdout.splitlines()[-1])
    reason = done.stderr.rpartition("atomtune plan: ")[2].strip()
    if done.returncode == ExitCode.USER_MISTAKE:
        raise UserError(reason)
    if done.returncode == ExitCode.STOPPED:
        raise Stopped("stopped by a signal before the first trial.")
    if done.returncode == ExitCode.RUN_FAILED or done.returncode < 0:
        raise RunFailed(reason or "Planning a trial was killed; most likely there was too little memory.")
    raise AtomtuneError(reason)


def _search(settings: SweepSettings, sweep: Sweep) -> Search:
    if not settings.trials:
        return Grid(sweep.tried)
    kinds = {**library_types(), **types_of(TRAIN_GROUPS)}
    return Sampled(
        sweep.tried,
        trials=settings.trials,
        seed=int(settings.train.trainer.get("seed", 42)),
        first=_first(settings, sweep),
        kinds=kinds,
    )


def _first(settings: SweepSettings, sweep: Sweep) -> dict[str, str]:
    """Settings of the first trial: the middle of each range, and the default where a list of values holds it.

    Without --try the middle of the learning rates is the derived one.
    """
    first = {}
    for name, values in sweep.tried.items():
        default = number_or_word(str(getattr(settings.train.lora, name, "")))
        as_default = [value for value in values if number_or_word(value) == default]
        if is_range(values[0]):
            first[name] = middle_of(values[0])
        elif as_default:
            first[name] = as_default[0]
    return first


def _say_beginning(sweep: Sweep, search: Search, folder: Path, console: Console) -> None:
    """Print the values to try, the number of trials, their folder and the time they take."""
    for name, values in sweep.tried.items():
        console.say(f"  {name}: {', '.join(values)}")
    done = sum(trial.status in DONE for trial in sweep.trials)
    # Each part is translated alone: the catalogue does not hold the joined text.
    text = translated(f"{search.total} trials")
    if done:
        text += translated(f", {done} of them done before")
    text += translated(f", in {folder}")
    if sweep.seconds_expected:
        left = (search.total - done) * sweep.seconds_expected
        text += translated(
            f": about {rough_duration(sweep.seconds_expected)} each and {rough_duration(left)} in all; evaluation and "
            "saving are extra"
        )
    console.say(translated(f"{text}. Ctrl-C keeps what is done; --resume continues.\n"))


def _run_trials(sweep: Sweep, search: Search, folder: Path, console: Console) -> Sweep:
    """Run the trials that have no result yet, then those that the search chooses, one after another."""
    attempted: set[int] = set()
    while (trial := _next(sweep, search, attempted)) is not None:
        attempted.add(trial.number)
        _write_trial(sweep, trial, folder)
        sweep = sweep.with_trial(replace(trial, status="running"))
        write_sweep(folder, sweep)
        with _shown(trial, search, console, behind=search.watching(trial, sweep.trials)) as watch:
            trial = run_trial(trial, folder, watch=watch)
        sweep = sweep.with_trial(trial)
        if sweep.records_held_out is None:
            sweep = replace(sweep, records_held_out=_held_out_in(folder / trial.name))
        write_sweep(folder, sweep)
        _say_trial(sweep, trial, search, console, attempted=attempted)
    return sweep


def _next(sweep: Sweep, search: Search, attempted: set[int]) -> Trial | None:
    for trial in sweep.trials:
        if trial.status not in DONE and trial.number not in attempted:
            return trial
    settings = search.next(sweep.trials)
    return None if settings is None else Trial(len(sweep.trials) + 1, settings)


def _write_trial(sweep: Sweep, trial: Trial, folder: Path) -> None:
    """Write the trial's settings as a file; `atomtune train FILE` repeats this run."""
    # The last checkpoint and the best one are enough to resume and to choose; with more, a sweep would fill the disk.
    values = {"save_total_limit": "1", **sweep.shared, **trial.settings, "output_dir": str(folder / trial.name)}
    write_settings(folder / f"{trial.name}.yaml", values, comment=f"{trial.name} of a sweep: {trial.words()}")


def _held_out_in(folder: Path) -> int | None:
    """How many records a trial was evaluated on: those of --eval_path, or those held out; None if it did not begin."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        record = read_json_object(folder / RUN_RECORD)
        evaluation = record.get("evaluation")
        return int(evaluation["records_used"]) if evaluation else len(record["records_held_out"])
    return None


@contextlib.contextmanager
def _shown(trial: Trial, search: Search, console: Console, *, behind: Watch) -> Iterator[Watch]:
    """Show a progress bar for the trial; the function that it yields updates it."""
    name = translated(f"trial {trial.number} of {search.total}: {trial.words()}")
    if not console.is_terminal:
        console.say(name)
    with progress_bar(console, "{task.fields[loss]}") as bar:
        task = bar.add_task(name, total=None, loss=translated("starting"))

        def watch(progress: Progress) -> bool:
            loss = "" if progress.last_loss is None else translated(f"held-out loss {progress.last_loss:.3f}")
            if progress.steps_planned:
                bar.update(task, completed=progress.steps, total=progress.steps_planned, loss=loss)
            return behind(progress)

        yield watch


def _say_trial(sweep: Sweep, trial: Trial, search: Search, console: Console, *, attempted: set[int]) -> None:
    """Print the trial's result, and the remaining time estimated from the trials so far."""
    match trial.status:
        case "finished":
            text = translated(f"held-out loss {trial.eval_loss:.4f} at step {trial.best_step}")
            if sweep.best == trial:
                text += translated(", the best so far")
        case "pruned":
            text = "stopped early: clearly behind the others"
        case "stopped":
            text = "stopped from outside; --resume continues it"
        case _:
            text = f"failed: {trial.reason}"
    seconds = [other.seconds for other in sweep.trials if other.seconds]
    left = max(search.total - sum(other.status in DONE or other.number in attempted for other in sweep.trials), 0)
    remaining = f"; about {rough_duration(left * sum(seconds) / len(seconds))} left" if left and seconds else ""
    text, remaining = translated(text), translated(remaining)
    console.say(f"{trial.name}  {trial.words()}  {text} ({duration(trial.seconds)}{remaining})")


def _stopped(folder: Path) -> Sweep:
    """The sweep as recorded, with the running trial marked as stopped."""
    sweep = read_sweep_record(folder)
    assert sweep is not None
    for trial in sweep.trials:
        if trial.status == "running":
            sweep = sweep.with_trial(replace(trial, status="stopped"))
    sweep = replace(sweep, status="stopped")
    write_sweep(folder, sweep)
    return sweep


def _refuse_nothing_finished(sweep: Sweep) -> None:
    if sweep.best is None:
        reasons = [f"  {trial.name} ({trial.words()}): {trial.reason or trial.status}" for trial in sweep.trials]
        raise RunFailed("\n".join(["No trial finished:", *reasons, "Each trial's full output is in trial-N.log."]))


def _write_best(sweep: Sweep, folder: Path) -> None:
    """Write run.yaml: the shared settings and those of the best trial."""
    assert sweep.best is not None
    comment = f"The best settings of {len(sweep.trials)} trials, those of {sweep.best.name}: {sweep.best.words()}"
    write_settings(folder / BEST, {**sweep.shared, **sweep.best.settings}, comment=comment)
