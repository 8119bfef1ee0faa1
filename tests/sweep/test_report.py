"""Report: what a sweep says about its trials, in the words of the user's language."""

import re
import shlex
from pathlib import Path

import pytest

from atomtune.choices import NOISE
from atomtune.language import spoken, translated
from atomtune.sweep.report import commands, draw, page, rows, sentences
from atomtune.sweep.trials import Sweep, Trial

TRIALS = [
    Trial(1, {"learning_rate": "0.001"}, status="finished", eval_loss=2.5, best_step=45),
    Trial(2, {"learning_rate": "0.003"}, status="finished", eval_loss=2.4, best_step=45),
]


def test_a_chinese_sentence_holds_no_english_word():
    sweep = Sweep(status="finished", shared={}, tried={"learning_rate": ("0.001", "0.003")})
    for trial in TRIALS:
        sweep = sweep.with_trial(trial)
    with spoken("zh"):
        said = [translated(sentence) for sentence in sentences(sweep)]
    words = set(re.findall("[A-Za-z_]{2,}", " ".join(said)))
    assert words == {"trial", "learning_rate"}, said  # names of a folder and of a setting


def test_each_figure_is_labelled_for_pages_too_narrow_for_column_headings():
    """On a phone the headings are hidden. Regression: a trial was only “0.003, 2.4, 45, 37 s”."""
    sweep = Sweep(status="finished", shared={"max_steps": "45"}, tried={"learning_rate": ("0.001", "0.003")})
    for trial in TRIALS:
        sweep = sweep.with_trial(trial)
    for language, names in (
        ("en", ["trial", "learning_rate", "held-out loss", "at step", "time", "status"]),
        ("zh", ["试验", "learning_rate", "留出集损失", "在第几步", "用时", "状态"]),
    ):
        with spoken(language):
            html = page(sweep, title="sweep", image="", commands=[])
        assert re.findall('<td data-model="(.*?)">', html) == names * 2


def test_trials_from_before_a_setting_was_tried_do_not_stop_the_report():
    # Regression: resumed with one more --try, the best trial had a setting that the earlier ones lack: KeyError.
    sweep = Sweep(status="finished", shared={}, tried={"lora_rank": ("8", "16")})
    for trial in [
        *TRIALS,
        *(
            Trial(2 + n, {"lora_rank": rank}, status="finished", eval_loss=loss, best_step=45)
            for n, (rank, loss) in enumerate([("8", 2.3), ("16", 2.2)], start=1)
        ),
    ]:
        sweep = sweep.with_trial(trial)
    assert "Its lora_rank is the highest of those tried: a higher one may be better still." in list(sentences(sweep))


def swept(*trials: Trial) -> Sweep:
    return Sweep(status="finished", shared={}, tried={}, trials=trials, records_held_out=50)


def finished(number: int, loss: float, rate: str = "0.001") -> Trial:
    return Trial(number, {"learning_rate": rate}, status="finished", eval_loss=loss, best_step=45)


def test_trials_within_the_noise_are_named_and_a_clear_gap_is_measured_to_the_next_best():
    close = sentences(swept(finished(1, 3.0), finished(2, 2.0 * (1 + 0.9 * NOISE)), finished(3, 2.0)))
    (noise,) = [line for line in close if "too close to tell apart" in line]
    assert "50 held-out records" in noise and "trial-2 (" in noise and "trial-1" not in noise
    clear = sentences(swept(finished(1, 3.0), finished(2, 2.2), finished(3, 2.0)))
    assert "The next, trial-2, is 10.0% behind: more than the 2% that counts as noise." in clear


@pytest.mark.parametrize(
    ("best", "end"),
    [
        ("0.0001", "lowest of those tried: a lower"),
        ("0.001", None),
        ("0.03", "highest of those tried: a higher"),
    ],
)
def test_a_best_value_at_an_end_of_those_tried_is_named(best, end):
    trials = [finished(n, 2.0 if rate == best else 3.0, rate) for n, rate in enumerate(("0.001", "0.0001", "0.03"), 1)]
    named = [line for line in sentences(swept(*trials)) if "of those tried" in line]
    assert named == ([f"Its learning_rate is the {end} one may be better still."] if end else [])
    assert not [line for line in sentences(swept(finished(1, 2.0, best))) if "of those tried" in line]


@pytest.mark.parametrize("status", ["pruned", "failed"])
def test_a_value_whose_trial_did_not_finish_was_tried_too(status):
    # Regression: "the highest of those tried: a higher one may be better still", though a higher one was far behind.
    further = Trial(3, {"learning_rate": "0.03"}, status=status, eval_loss=9.0, reason="the loss is not finite")
    said = sentences(swept(finished(1, 3.0, "0.001"), finished(2, 2.0, "0.003"), further))
    assert not [line for line in said if "of those tried" in line]
    reports = {
        "pruned": "Stopped early, clearly behind: trial-3.",
        "failed": "trial-3 failed: the loss is not finite.",
    }
    assert [line for line in reports.values() if line in said] == [reports[status]]


def test_the_table_and_the_picture_hold_every_trial_and_the_best_comes_first(tmp_path):
    without_evaluation = Trial(1, {"learning_rate": "1e30"}, status="failed", reason="out of memory")
    sweep = swept(without_evaluation, finished(2, 3.0), finished(3, 2.0))
    assert [row[0] for row in rows(sweep)] == ["trial-3", "trial-2", "trial-1"]
    draw(sweep, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_next_commands_quote_a_folder_with_a_space():
    for command in commands(swept(finished(1, 2.0)), Path("my runs/sweep")):
        assert [word for word in shlex.split(command) if word.startswith("my runs/sweep")]
