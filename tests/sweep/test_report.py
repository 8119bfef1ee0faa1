"""What a sweep says of its trials, in every language in that language's words."""

import re

from atomtune.language import spoken, translated
from atomtune.sweep.report import sentences
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
