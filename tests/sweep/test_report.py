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
