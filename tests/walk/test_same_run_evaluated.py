"""Evaluation measures a run and never changes it: neither its weights, nor the result of a stop and a resume.

Exact, on a CPU with one thread. The fast tests cover each choice in a few combinations, and divide the places of a stop
and the checkpoints among them. `make soak` covers all combinations, stops each in every step and every batch of every
evaluation, and resumes from every checkpoint.
"""

import functools
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.train import trainer as trainer_module
from atomtune.train.checkpoint.atomic import checkpoints
from tests.conftest import write_jsonl

EVERY = bool(os.environ.get("ATOMTUNE_SOAK"))

EVALUATIONS = {
    "unevaluated": [],
    "by steps": ["--eval_strategy", "steps", "--eval_steps", "3"],
    "by epoch": ["--eval_strategy", "epoch"],
    "at the start": ["--eval_strategy", "steps", "--eval_steps", "4", "--eval_on_start", "true"],
    "plateau": ["--eval_strategy", "epoch", "--lr_scheduler_type", "reduce_lr_on_plateau"],
}
SAVES = {
    "every step": ["--save_strategy", "steps", "--save_steps", "1"],
    "by epoch": ["--save_strategy", "epoch"],
    "the best": ["--save_strategy", "best", "--metric_for_best_model", "eval_loss"],
    # With greater_is_better the worst loss counts as the best, so that it is not the last one.
    "load the best": [
        *("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"),
    ],
    # With this rate the loss does not fall, so the second evaluation ends the run; the weights' last bits still change.
    "stops early": [
        *(
            "--save_strategy",
            "steps",
            "--save_steps",
            "1",
            "--early_stopping_patience",
            "1",
            "--learning_rate",
            "1e-12",
        ),
    ],
}
BATCHES = {"plain": [], "accumulated": ["--gradient_accumulation_steps", "3"]}
SOURCES = {"stored": [], "mixed": ["--mix", "1.5,0.5"], "streamed": ["--streaming", "true", "--shuffle_buffer", "7"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two files to train on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("records")
    records = [{"instruction": f"Say number {n}", "output": f"Number {n} it is, and {n * 7}."} for n in range(33)]
    return (
        write_jsonl(folder / "one.jsonl", records[:16]),
        write_jsonl(folder / "two.jsonl", records[16:24]),
        write_jsonl(folder / "held.jsonl", records[24:]),
    )


@pytest.fixture(scope="module")
def undisturbed(models, files, tmp_path_factory) -> Callable[[tuple[str, ...]], Path]:
    """`undisturbed(way)` is the folder of the undisturbed run; each way runs once."""

    @functools.cache
    def folder(way: tuple[str, ...]) -> Path:
        whole = tmp_path_factory.mktemp("whole") / "whole"
        assert main(command(models("llama"), files, whole, *flags_of(*way))) == 0
        return whole

    return folder


def command(base: Path, files: tuple[Path, Path, Path], out: Path, *more: str) -> list[str]:
    one, two, held = files
    return [
        *("train", "--model_path", str(base), "--dataset_path", str(one), str(two), "--eval_path", str(held)),
        *("--output_dir", str(out), "--dtype", "float32", "--lora_dropout", "0.2", "--learning_rate", "5e-3"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3", "--logging_steps", "1"),
        *("--save_total_limit", "100", *more),
    ]


def flags_of(evaluation: str, save: str, batch: str, source: str) -> list[str]:
    """Flags of a run of two epochs with six batches each; a stream has no end, so its length is given in steps."""
    length = ["--max_steps", "12" if batch == "plain" else "5"] if source == "streamed" else ["--num_train_epochs", "2"]
    saved = SAVES[save]
    if save == "load the best":  # the library requires saves at evaluations
        by_epoch = "epoch" in EVALUATIONS[evaluation]
        saved = [*saved, *(("--save_strategy", "epoch") if by_epoch else ("--save_strategy", "steps", "--save_steps"))]
        saved = saved if by_epoch else [*saved, EVALUATIONS[evaluation][3]]
    if save == "stops early":  # the planned end comes much later
        length = ["--max_steps" if source == "streamed" else "--num_train_epochs", "20"]
    return [*EVALUATIONS[evaluation], *saved, *BATCHES[batch], *SOURCES[source], *length]


def can_be(evaluation: str, save: str, batch: str, source: str) -> bool:
    unmeasured = evaluation == "unevaluated" and save in ("the best", "load the best", "stops early")
    in_epochs = evaluation in ("by epoch", "plateau") or save == "by epoch"
    return not unmeasured and not (source == "streamed" and in_epochs)


WAYS = [way for way in itertools.product(EVALUATIONS, SAVES, BATCHES, SOURCES) if can_be(*way)]
#: Each choice at least once; the first combination is the one that first failed. `make soak` runs them all.
FEW = [
    ("by epoch", "every step", "plain", "stored"),
    ("by epoch", "load the best", "accumulated", "mixed"),
    ("by steps", "the best", "plain", "mixed"),
    ("at the start", "by epoch", "accumulated", "stored"),
    ("plateau", "every step", "plain", "stored"),
    ("by steps", "stops early", "accumulated", "streamed"),
]
#: `make test` runs one of them, `make test-slow` the others.
SOME = [way if number == 0 else pytest.param(way, marks=pytest.mark.slow) for number, way in enumerate(FEW)]


def history(out: Path) -> list[dict]:
    """All logged figures of a run, except times."""
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    last = json.loads((checkpoints(out)[0] / "trainer_state.json").read_text())
    clock = ("eval_runtime", "train_runtime")
    # The last evaluation may have been made after that checkpoint, by the resumed run; then only run.json has it.
    steps = [entry for entry in last["log_history"] if "eval_loss" not in entry]
    logs = [{name: value for name, value in entry.items() if name not in clock} for entry in steps]
    figures = ("steps", "train_loss", "eval_loss", "eval_history", "outcome", "samples", "tokens_computed")
    return [*logs, {name: record.get(name) for name in figures}]


def signals_at(monkeypatch, call: int, *, inside_evaluation: bool) -> list[int]:
    """Send SIGTERM to this process in the given micro-batch, or evaluation batch; the list counts the calls so far."""
    real, calls = trainer_module.target_nats, []

    def target_nats(model, batch, **kwargs):
        if model.training is not inside_evaluation:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch, **kwargs)

    monkeypatch.setattr(trainer_module, "target_nats", target_nats)
    return calls


def stopped_and_resumed(run: Callable[..., int], monkeypatch, out: Path, call: int, *, inside_evaluation: bool) -> bool:
    """Stop a run at the given call and resume it to its end; False if the run has fewer calls."""
    with monkeypatch.context() as patch:
        calls = signals_at(patch, call, inside_evaluation=inside_evaluation)
        code = run(out)
    if len(calls) < call:
        return False
    if code == 0:  # the signal came in the last step, so nothing was left to stop
        return True
    assert code == 75
    assert run(out, "--resume") == 0
    return True


@pytest.mark.parametrize("way", WAYS if EVERY else SOME, ids=", ".join)
def test_a_run_stopped_anywhere_resumes_to_the_undisturbed_result(  # noqa: PLR0917  # pytest's fixtures
    models, files, undisturbed, tmp_path, monkeypatch, way
):
    base, whole, flags = models("llama"), undisturbed(way), flags_of(*way)

    def run(out: Path, *more: str) -> int:
        return main(command(base, files, out, *flags, *more))

    expected = (whole / "adapter_model.safetensors").read_bytes(), history(whole)
    if "stops early" in way:
        assert expected[1][-1]["steps"] < json.loads((whole / "run.json").read_text())["steps_planned"]
    # Each evaluation has three batches, also the one before the first step.
    early, late = (2,), (7,)
    few = (early, late) if WAYS.index(way) % 2 else (late, early)
    for inside_evaluation in (False, True):
        for call in range(1, 1000) if EVERY else few[inside_evaluation]:
            out = tmp_path / f"{inside_evaluation}-{call}"
            if not stopped_and_resumed(run, monkeypatch, out, call, inside_evaluation=inside_evaluation):
                break
            assert ((out / "adapter_model.safetensors").read_bytes(), history(out)) == expected, out.name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS if EVERY else SOME, ids=", ".join)
def test_resuming_from_every_checkpoint_gives_the_undisturbed_result(models, files, undisturbed, tmp_path, way):
    # As a kill between that save and the next leaves the folder.
    base, whole, flags = models("llama"), undisturbed(way), flags_of(*way)
    expected = (whole / "adapter_model.safetensors").read_bytes(), history(whole)
    found = checkpoints(whole)[::-1]
    for number in range(len(found)) if EVERY else sorted({len(found) // 2 - 1, len(found) - 1}):
        out = tmp_path / found[number].name
        shutil.copytree(whole, out)
        for later in found[number + 1 :]:
            shutil.rmtree(out / later.name)
        (out / "adapter_model.safetensors").unlink()
        (out / "run.json").write_text(json.dumps({"status": "running"}))
        assert main(command(base, files, out, *flags, "--resume")) == 0
        assert ((out / "adapter_model.safetensors").read_bytes(), history(out)) == expected, out.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "evaluation", ["by steps", *(pytest.param(when, marks=pytest.mark.slow) for when in ("by epoch", "at the start"))]
)
@pytest.mark.parametrize(
    "source", ["stored", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SOURCES if kind != "stored")]
)
def test_evaluation_does_not_change_the_trained_adapter(models, files, tmp_path, evaluation, source):
    if not can_be(evaluation, "every step", "plain", source):
        pytest.skip("a stream has no epochs")
    adapters = []
    for number, way in enumerate(("unevaluated", evaluation)):
        out = tmp_path / str(number)
        flags = flags_of(way, "every step", "plain", source)
        if way == "unevaluated":
            flags += ["--eval_strategy", "no"]
        assert main(command(models("llama"), files, out, *flags)) == 0
        adapters.append((out / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
