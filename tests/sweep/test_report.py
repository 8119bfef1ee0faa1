"""Report: what a sweep says about its trials, in the words of the user's language."""

import re

from atomtune.language import spoken, translated
from atomtune.sweep.report import page, sentences
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
