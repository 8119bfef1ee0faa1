"""Trial process: how a trial is started and stopped; its exit code and last output decide how its end is recorded."""

import json
import os
import sys
from pathlib import Path

import pytest

from atomtune.sweep import trial_process
from atomtune.sweep.trial_process import Progress, progress_of, result_of, run_trial
from atomtune.sweep.trials import Trial

HISTORY = [{"step": 0, "loss": 3.0}, {"step": 5, "loss": 1.5}, {"step": 10, "loss": 1.8}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trial-1").mkdir()
    record = {"eval_history": HISTORY, "steps": 10, "eval_loss": 1.5, "eval_step": 5}
    (tmp_path / "trial-1" / "run.json").write_text(json.dumps(record))
    return tmp_path


TRIAL = Trial(1, {"learning_rate": "1e-4"})


def test_a_finished_trial_has_the_loss_of_the_adapter_it_kept(folder):
    result = result_of(TRIAL, folder, code=0, pruned=False, said="")
    assert (result.status, result.eval_loss, result.best_step, result.loss_before) == ("finished", 1.5, 5, 3.0)
    assert result.eval_history == ((0, 3.0), (5, 1.5), (10, 1.8))


def test_a_finished_trial_has_the_figures_of_its_run_and_not_of_its_lowest_evaluation(folder):
    # With --load_best_model_at_end false, or another metric, a run keeps another step than that of the lowest loss.
    record = {"eval_history": HISTORY, "steps": 10, "eval_loss": 1.8, "eval_step": 10}
    (folder / "trial-1" / "run.json").write_text(json.dumps(record))
    failed_before = Trial(1, {}, status="failed", reason="out of memory")
    result = result_of(failed_before, folder, code=0, pruned=False, said="")
    assert (result.status, result.eval_loss, result.best_step, result.reason) == ("finished", 1.8, 10, None)
    (folder / "trial-1" / "run.json").write_text(json.dumps({**record, "eval_loss": None}))
    result = result_of(TRIAL, folder, code=0, pruned=False, said="")
    assert (result.status, result.reason) == ("failed", "it finished without a held-out loss")


def test_the_loss_before_training_is_not_what_a_stopped_trial_reached(folder):
    history = [{"step": 0, "loss": 1.0}, *HISTORY[1:]]
    (folder / "trial-1" / "run.json").write_text(json.dumps({"eval_history": history, "steps": 10}))
    result = result_of(TRIAL, folder, code=75, pruned=True, said="")
    assert (result.eval_loss, result.best_step, result.loss_before) == (1.5, 5, 1.0)


@pytest.mark.parametrize("content", ["", "[]", '{"steps": "many"}', '{"eval_history": [5]}', '{"eval_history": 5}'])
def test_a_run_json_of_another_form_means_no_progress(folder, content):
    (folder / "trial-1" / "run.json").write_text(content)
    assert progress_of(folder / "trial-1") == Progress()


@pytest.mark.parametrize(("pruned", "status"), [(True, "pruned"), (False, "stopped")])
def test_a_stop_is_recorded_as_pruned_by_us_or_stopped_from_outside(folder, pruned, status):
    result = result_of(TRIAL, folder, code=75, pruned=pruned, said="")
    assert (result.status, result.eval_loss, result.best_step) == (status, 1.5, 5)


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (3, "step 1\n\natomtune train: Out of memory.\nSmaller batches help.\n", "Out of memory."),
        (-9, "step 1\n", "killed by SIGKILL; most likely there was too little memory"),
        (-11, "", "killed by SIGSEGV"),
        (1, "Traceback\nKeyError: 3\n", "exit code 1: KeyError: 3"),
        (1, "Traceback\nKeyError: 3\n\natomtune train: this is a bug.\nReport it.", "exit code 1: KeyError: 3"),
        (5, "", "exit code 5"),
    ],
)
def test_a_failure_has_its_reason_in_one_line_and_no_loss(folder, code, said, reason):
    result = result_of(TRIAL, folder, code=code, pruned=False, said=said)
    assert (result.status, result.eval_loss, result.reason) == ("failed", None, reason)


#: Stands for Python with `-m atomtune train`: it writes how it was started and which signals it gets.
PROGRAM = """#!{python}
import json, os, pathlib, signal, sys, time
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
print(json.dumps([sys.argv[1:], sys.stdin.read(), os.environ["ATOMTUNE_LANGUAGE"], os.getsid(0) == os.getpid()]))
pathlib.Path("ready").touch()
deadline = time.monotonic() + {waits}
while not stops and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3 if stops else 0)  # saving a checkpoint
print(len(stops), "stops")
pathlib.Path("saved").touch()
sys.exit({code})
"""


@pytest.fixture
def program(folder, monkeypatch):
    """A function that replaces Python by PROGRAM, for trials in `folder`."""

    def take(*, waits: int, code: int) -> None:
        file = folder / "program"
        file.write_text(PROGRAM.format(python=sys.executable, waits=waits, code=code))
        file.chmod(0o755)
        monkeypatch.setattr(trial_process.sys, "executable", str(file))

    monkeypatch.setattr(trial_process, "LOOK_EVERY", 0.02)
    monkeypatch.setenv("ATOMTUNE_LANGUAGE", "zh")
    monkeypatch.chdir(folder)
    stdin, (read, write) = os.dup(0), os.pipe()
    os.write(write, b"typed")
    os.close(write)
    os.dup2(read, 0)
    yield take
    os.dup2(stdin, 0)
    os.close(read)


def test_a_trial_that_is_behind_is_asked_once_to_save_and_end(folder, program):
    # A second signal would end it at once, without its checkpoint.
    program(waits=60, code=75)
    (folder / "trial-1.log").write_text("an earlier attempt\n")
    before = Trial(1, {}, seconds=100.0)
    result = run_trial(before, folder, watch=lambda progress: progress.steps == 10 and Path("ready").exists())
    assert result.status == "pruned" and 100 < result.seconds < 200
    earlier, start, stops = (folder / "trial-1.log").read_text().splitlines()
    assert earlier == "an earlier attempt" and stops == "1 stops"
    # Ctrl-C reaches it only through us, it reads no keys, and its log is searched for English words.
    arguments = ["-m", "atomtune", "train", str(folder / "trial-1.yaml"), "--resume"]
    assert json.loads(start) == [arguments, "", "en", True]


def test_ctrl_c_waits_until_the_trial_has_saved(folder, program):
    program(waits=60, code=75)

    def interrupted(progress: Progress) -> bool:
        if Path("ready").exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_trial(TRIAL, folder, watch=interrupted)
    assert Path("saved").exists()


def test_an_earlier_attempts_error_is_not_given_as_the_reason(folder, program):
    program(waits=0, code=3)
    (folder / "trial-1.log").write_text("atomtune train: Out of memory.\n")
    assert run_trial(TRIAL, folder, watch=lambda progress: False).reason == "exit code 3: 0 stops"
