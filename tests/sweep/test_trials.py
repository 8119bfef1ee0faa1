"""Trials: a sweep's record is read as it was written, and a record of another form is refused by name."""

import json

import pytest

from atomtune.errors import BadSettings
from atomtune.sweep.trials import Status, Sweep, Trial, read_sweep_record, write_sweep

TRIAL = {
    "number": 1,
    "settings": {"lora_rank": "8"},
    "status": "finished",
    "eval_loss": 1.5,
    "best_step": 4,
    "loss_before": 2.0,
    "eval_history": [[4, 1.5]],
    "seconds": 3.0,
    "reason": None,
}
SWEEP = {
    "status": "stopped",
    "shared": {},
    "tried": {"lora_rank": ["8", "16"]},
    "trials": [TRIAL],
    "seconds_expected": 2.0,
    "records_held_out": 7,
    "best": "trial-1",
}


def test_a_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    sweep = read_sweep_record(tmp_path)
    assert sweep is not None and sweep.status == "running" and sweep.tried == {"lora_rank": ("8", "16")}
    assert sweep.trials == (Trial(**{**TRIAL, "eval_history": ((4, 1.5),)}),)
    write_sweep(tmp_path, sweep)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {**SWEEP, "status": "running"}


@pytest.mark.parametrize(
    "values",
    [
        {"tried": []},
        {"shared": 5},
        {"trials": [5]},
        {"trials": [{**TRIAL, "eval_loss": "low"}]},
        {"trials": [{**TRIAL, "status": "asleep"}]},
        {"trials": [{**TRIAL, "eval_history": [[4]]}]},
        {"records_held_out": "seven"},
    ],
    ids=str,
)
def test_a_malformed_sweep_record_is_refused_naming_the_field(tmp_path, values):
    (tmp_path / "sweep.json").write_text(json.dumps({**SWEEP, **values}))
    with pytest.raises(BadSettings, match=next(iter(values))):
        read_sweep_record(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_sweep_record_that_is_not_json_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadSettings, match="cannot be read"):
        read_sweep_record(tmp_path)


def test_a_loss_of_zero_is_the_lowest():
    trials = tuple(Trial(number, {}, "finished", loss) for number, loss in enumerate((0.5, 0.0), 1))
    assert Sweep("running", {}, {}, trials).best == trials[1]


def test_the_best_is_a_finished_trial_and_of_equal_ones_the_earlier():
    losses: list[tuple[Status, float]] = [("pruned", 0.1), ("stopped", 0.2), ("finished", 0.5), ("finished", 0.5)]
    trials = tuple(Trial(number, {}, status, loss) for number, (status, loss) in enumerate(losses, 1))
    sweep = Sweep("running", {}, {}, trials[::-1])
    assert [trial.number for trial in sweep.ranked()] == [3, 4]
    better = Trial(4, {}, "finished", 0.4)
    assert [trial.number for trial in sweep.with_trial(better).ranked()] == [4, 3]
