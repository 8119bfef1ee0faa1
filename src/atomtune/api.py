"""API: the commands as functions for notebooks and programs: they return values and raise errors, but never exit.

    from atomtune import evaluate, inspect, load, sweep, train

    run = train("Qwen/Qwen3-0.6B", "train.jsonl", output_dir="out")
    print(run.train_loss)
    print(run.load().chat("Who are you?"))

A setting has the same name, default and checks as the command's flag. Nothing is printed unless `verbose` is true;
the command's notices are in the result's `notices`. Errors are those of atomtune.errors: BadSettings, BadData,
BadModel, RunFailed, CheckFailed, Stopped. The program's random numbers, and what libraries print, stay as they were.
"""

import inspect as signatures
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from atomtune.console import Console
from atomtune.errors import BadSettings
from atomtune.settings.command_settings import LoadSettings
from atomtune.settings.expect import default_of, field_infos
from atomtune.settings.flags import types_of
from atomtune.settings.read import GROUPS, read, read_settings

if TYPE_CHECKING:
    from atomtune.serve.tuned_model import TunedModel
    from atomtune.sweep.trials import Trial

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
P = ParamSpec("P")
R = TypeVar("R")
#: Held by the run that this process is training.
_TRAINING = threading.Lock()


@dataclass(frozen=True)
class Run:
    """A finished training run.

    folder   has the adapter, its checkpoints and run.json
    figures  the content of run.json: counts of records and tokens, losses, speed, settings and where each was set
    notices  those that the command would have printed; the ones in run.json came after its settings were read
    """

    folder: Path
    figures: Mapping[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def train_loss(self) -> float:
        """Mean training loss, in nats per learned token."""
        return float(self.figures["train_loss"])

    @property
    def eval_loss(self) -> float | None:
        """Loss of the held-out records, in nats per target; None if none were held out.

        It is that of the kept adapter; if that step was not evaluated, of the last evaluation: figures["eval_step"].
        """
        return self.figures.get("eval_loss")

    def load(self, **settings: Any) -> "TunedModel":
        """The trained adapter on its base; settings as in `atomtune.load`."""
        return load(self.folder, **settings)


@dataclass(frozen=True)
class Inspection:
    """What is learned from the records, and problems found in them.

    figures   the data keys of run.json: records_read, records_used, records_refused, prompt_tokens, target_tokens, …
    findings  how many records each check of `inspect --fail_on` found
    tokens    tokens that each layout computes for some sampled batches: padded, packed, tree; empty without records
    """

    figures: Mapping[str, Any]
    findings: Mapping[str, int]
    tokens: Mapping[str, int]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Results of the base and the tuned models on the same records.

    models        model → metric → (value, low, high), the value with its 95 % interval
    against_base  the same for the difference from the base
    lm_eval       model → task and metric of lm-eval → value and standard_error
    sentences     what the figures say about each tuned model
    """

    models: Mapping[str, Mapping[str, Sequence[float]]]
    against_base: Mapping[str, Mapping[str, Sequence[float]]]
    lm_eval: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    sentences: tuple[str, ...]
    records: int
    answers: int
    stopped_early: bool
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep.

    folder   has a folder for each trial, sweep.json, sweep.html, and run.yaml with the best settings
    trials   finished ones first, by held-out loss, then all others; each has settings, eval_loss, status, reason
    command  command line that trains with the best settings
    """

    folder: Path
    trials: tuple["Trial", ...]
    sentences: tuple[str, ...]
    command: str
    notices: tuple[str, ...] = ()

    @property
    def best(self) -> "Trial":
        """The trial with the lowest held-out loss."""
        return self.trials[0]

    def load(self, **settings: Any) -> "TunedModel":
        """The best trial's adapter on its base; settings as in `atomtune.load`."""
        return load(self.folder / self.best.name, **settings)


def _keeps_program_state(function: Callable[P, R]) -> Callable[P, R]:
    """The function within program_state_kept(), which imports torch only when the function is called."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        from atomtune.program_state import program_state_kept

        with program_state_kept():
            return function(*args, **kwargs)

    return called


def _one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which is refused while another thread is in it: two runs would draw from one random generator."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _TRAINING.acquire(blocking=False):
            raise BadSettings(
                [
                    "another run is being trained in this process, and the two would take each other's random numbers. "
                    "Wait for its end, or start this one in a process of its own."
                ]
            )
        try:
            return function(*args, **kwargs)
        finally:
            _TRAINING.release()

    return called


@_one_at_a_time  # first, as keeping the program's state sets random numbers back
@_keeps_program_state
def train(
    model_path: str | os.PathLike[str] | None = None,
    dataset_path: Paths | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Run:
    """Train a LoRA adapter on records; without a model and records, the built-in demo.

    config="run.yaml" reads a file of settings first. Ctrl-C ends the run after the current step, with a checkpoint,
    and raises Stopped; resume=True continues such a run.
    All settings: help(atomtune.train), or `atomtune train --help all`.
    Raises BadSettings, BadData or BadModel before training, RunFailed during training.
    """
    paths = {"model_path": model_path, "dataset_path": dataset_path, "output_dir": output_dir}
    console = Console(speaks=verbose)
    parsed = read("train", {**paths, **settings}, notice=console.notice)
    from atomtune.model.memory import free_memory
    from atomtune.train.ranks import wait_for_the_first
    from atomtune.train.run import train_into_folder
    from atomtune.train.run_report import read_record

    folder = train_into_folder(parsed, speaks=verbose)
    wait_for_the_first()  # it still writes run.json, which all processes read
    free_memory()  # for the tuned model, which a notebook loads next
    figures = read_record(folder)
    return Run(folder, figures, (*console.notices, *figures.get("notices", ())))


@_keeps_program_state
def sweep(
    model_path: str | os.PathLike[str] | None = None,
    dataset_path: Paths | None = None,
    *,
    try_: Mapping[str, Sequence[Any]] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Sweep:
    """Try settings of train and compare them on held-out records: sweep(…, try_={"learning_rate": [1e-4, 3e-4]}).

    Each trial is a run in its own process and folder. Without try_, three learning rates are tried. resume=True
    continues a stopped sweep. All settings: those of train, and trials.
    Raises a UserError, mostly BadSettings, before the first trial, RunFailed if all trials failed, Stopped.
    """
    paths = {"model_path": model_path, "dataset_path": dataset_path, "output_dir": output_dir, "try_": try_}
    console = Console(speaks=verbose)
    parsed = read("sweep", {**paths, **settings}, notice=console.notice)
    from atomtune.sweep.command import sweep_into_folder
    from atomtune.sweep.report import command_of_best, sentences

    folder, result = sweep_into_folder(parsed, console)
    ranked = result.ranked()
    trials = (*ranked, *(trial for trial in result.trials if trial not in ranked))
    command = command_of_best(result, folder)
    return Sweep(folder, trials, tuple(sentences(result)), command, tuple(console.notices))


@_keeps_program_state
def load(
    adapter_path: str | os.PathLike[str],
    *,
    system: str | None = None,
    other_base: bool = False,
    verbose: bool = False,
    **settings: Any,
) -> "TunedModel":
    """Load a run's adapter on its base, or a merged model, ready to answer: load("out").chat("Hello").

    system      a system text, used in place of the instruction that the training records share
    other_base  accept a base with other weights than those that the adapter was trained on
    Other settings: model_path, dtype, quantize, stored_base, device_map, trust_remote_code.
    Raises BadSettings or BadModel.
    """
    console = Console(speaks=verbose)
    values = {"adapter_path": adapter_path, "system": system, "other_base": other_base, **settings}
    parsed = read_settings(LoadSettings, values, command="load", notice=console.notice)
    from atomtune.serve.tuned_model import load_tuned

    return load_tuned(parsed, console)


@_keeps_program_state
def inspect(
    dataset_path: Paths, model_path: str | os.PathLike[str], *, verbose: bool = False, **settings: Any
) -> Inspection:
    """Read records as a run would, with a model's tokenizer; return what is learned and which problems there are.

    html writes the report as a page; verbose prints it, with samples. Raises BadSettings, BadData for a file that
    cannot be read, and CheckFailed if more is found than fail_on allows.
    """
    console = Console(speaks=verbose)
    values = {"dataset_path": dataset_path, "model_path": model_path, **settings}
    parsed = read("inspect", values, notice=console.notice)
    from atomtune.inspect.command import examine, tell

    report = examine(parsed, console)
    tell(report, parsed, console)
    tokens = {}
    if report.saving is not None:
        tokens = {name: getattr(report.saving.tokens, name) for name in ("padded", "packed", "tree")}
    findings = {str(check): finding.count for check, finding in report.findings.items()}
    return Inspection(report.ledger.to_run_json(), findings, tokens, (*console.notices, *report.notes))


@_keeps_program_state
def evaluate(adapter_path: Paths = (), *, verbose: bool = False, **settings: Any) -> Evaluation:
    """Compare base and tuned models on records that were not trained on: dataset_path, else the run's held-out records.

    With output_dir, report.html, report.md and report.json are written there; otherwise nothing is written.
    Raises BadSettings, BadData or BadModel.
    """
    console = Console(speaks=verbose)
    parsed = read("evaluate", {"adapter_path": adapter_path or None, **settings}, notice=console.notice)
    from atomtune.evaluate.command import measure
    from atomtune.evaluate.report_files import refuse_unwritable, write_reports
    from atomtune.evaluate.terminal import say_report

    if parsed.output_dir:
        refuse_unwritable(Path(parsed.output_dir))
    report = measure(parsed, console)
    say_report(report, console)
    if parsed.output_dir:
        write_reports(report, Path(parsed.output_dir))
    values = report.to_json()
    return Evaluation(
        models=values["models"],
        against_base=values["against_base"],
        lm_eval=values["lm_eval"],
        sentences=tuple(report.sentences()),
        records=report.records,
        answers=report.answers,
        stopped_early=report.stopped_early,
        notices=tuple(console.notices),
    )


def _with_settings(function: Callable[..., Any], groups: Sequence[type[Any]]) -> None:
    """Add all settings to the function's signature, with types and defaults, for help() and the Tab key."""
    signature = signatures.signature(function)
    parameters = dict(signature.parameters)
    rest = parameters.pop("settings")
    types = types_of(groups)
    for name, info in field_infos(groups).items():
        if name not in parameters:
            # The function itself checks that a required setting is there.
            parameters[name] = signatures.Parameter(
                name, signatures.Parameter.KEYWORD_ONLY, default=default_of(info), annotation=types[name]
            )
    if function in (train, sweep):  # these also take any setting of transformers.TrainingArguments
        parameters["settings"] = rest
    function.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]


_with_settings(train, GROUPS["train"])
_with_settings(sweep, GROUPS["sweep"])
_with_settings(load, (LoadSettings,))
_with_settings(inspect, GROUPS["inspect"])
_with_settings(evaluate, GROUPS["evaluate"])
