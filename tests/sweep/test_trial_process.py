"""Trial process: a trial's exit code and its last output decide how its end is recorded."""

import json

import pytest

from atomtune.sweep.trial_process import result_of
from atomtune.sweep.trials import Trial

HISTORY = [{"step": 0, "loss": 3.0}, {"step": 5, "loss": 1.5}, {"step": 10, "loss": 1.8}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trial-1").mkdir()
    record = {"eval_history": HISTORY, "steps": 10, "eval_loss": 1.5, "outcome": {"kept_step": 5}}
    (tmp_path / "trial-1" / "run.json").write_text(json.dumps(record))
    return tmp_path


TRIAL = Trial(1, {"learning_rate": "1e-4"})


def test_a_finished_trial_has_the_loss_of_the_adapter_it_kept(folder):
    result = result_of(TRIAL, folder, code=0, pruned=False, said="")
    assert (result.status, result.eval_loss, result.best_step, result.loss_before) == ("finished", 1.5, 5, 3.0)
    assert result.eval_history == ((0, 3.0), (5, 1.5), (10, 1.8))


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
