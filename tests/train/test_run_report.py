"""The report of a run: the smoothed curve, and a picture for any history."""

import json
import warnings

import pytest
from matplotlib.figure import Figure
from transformers import TrainerControl, TrainerState

from atomtune.pages import picture
from atomtune.train.progress import RecordedProgress
from atomtune.train.run_report import RunRecord, draw_held_out, draw_loss, read_record, smoothed


def test_smoothing_keeps_a_flat_curve_and_halves_noise():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    noisy = [1.0 + (-1) ** n for n in range(200)]
    assert max(abs(value - 1) for value in smoothed(noisy)) < 0.1
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]  # a short curve is not smoothed


def test_smoothing_does_not_lag_behind_the_curve():
    falling = [10.0 - n / 20 for n in range(200)]
    assert smoothed(falling)[10:-10] == pytest.approx(falling[10:-10])
    assert smoothed(falling)[-1] == pytest.approx(falling[-1], abs=0.3)  # the last mean has only points before it


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "train_runtime": 1.0}],
    ],
)
def test_any_history_is_plotted_without_warnings(history, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_loss(history, tmp_path / "loss.png", title="输出: 甄嬛.jsonl")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_dollar_signs_in_a_plot_title_are_not_parsed_as_a_formula(tmp_path):
    # matplotlib reads a formula between them, which ended the run after its first evaluation.
    draw_loss([{"step": 1, "loss": 2.0}], tmp_path / "loss.png", title="costs$_$: a$^$.jsonl")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("points", "legend"),
    [
        ([(0, 3.0), (50, 1.25), (100, 1.5)], ["held out: last 1.500", "best: 1.250 at step 50"]),
        ([(0, 3.0), (50, 1.5), (100, 1.25)], ["held out", "best and last: 1.250 at step 100"]),
        ([(0, 3.0)], ["held out", "best and last: 3.000 at step 0"]),
    ],
)
def test_the_legend_explains_the_star_and_repeats_no_number(points, legend):
    axes = Figure().subplots()
    draw_held_out(axes, points)
    assert [text.get_text() for text in axes.legend().get_texts()] == legend


def test_the_step_axis_has_only_whole_number_ticks(tmp_path):
    with picture(tmp_path / "loss.png", loss="loss") as axes:
        axes.plot([0, 20], [3.0, 2.0], label="x")
    assert all(tick == int(tick) for tick in axes.get_xticks())  # earlier it had ticks at 2.5, 7.5, …


def test_run_json_is_updated_whenever_a_checkpoint_is_saved(tmp_path):
    record = RunRecord(tmp_path)
    progress = RecordedProgress(record)
    state = TrainerState(global_step=1, max_steps=9)
    progress.on_step_end(None, state, TrainerControl())
    state.global_step, state.log_history = 2, [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.25}]
    progress.on_step_end(None, state, TrainerControl())
    assert read_record(tmp_path)["steps"] == 1  # written at most every few seconds
    progress.on_save(None, state, TrainerControl())
    saved = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (saved["status"], saved["steps"], saved["steps_planned"]) == ("running", 2, 9)
    assert saved["loss_history"] == [{"step": 1, "loss": 2.5}]
    assert saved["eval_history"] == [{"step": 2, "loss": 2.25}]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "3"])
def test_an_invalid_run_json_is_read_as_empty(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert read_record(tmp_path) == {}
