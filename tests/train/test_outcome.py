"""The sentence at the end follows from the losses and names the setting to change."""

from dataclasses import replace

import pytest

from atomtune.train.outcome import outcome
from atomtune.train.samples import Sample, all_as_before


def told(held_out: list[float | None], training: list[float], *, kept_step: int | None = None, in_steps: bool = False):
    """The outcome for held-out losses at steps 0, 10, 20, … (None: not evaluated) and training losses from step 10."""
    history = [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(held_out) if loss is not None]
    history += [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(training)]
    steps = 10 * (len(held_out) - 1)
    kept_step = steps if kept_step is None else kept_step
    has_held_out = bool(held_out)
    return outcome(history, steps=steps, epochs=4, kept_step=kept_step, in_steps=in_steps, has_held_out=has_held_out)


FALLING = [3.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("held_out", "training", "verdict", "setting"),
    [
        ([3.0, 2.0, 1.5, 1.2, 1.0], FALLING, "too short", "--num_train_epochs 6"),
        ([3.0, 1.2, 1.02, 1.01, 1.0], FALLING, "level", "suits"),
        ([2.069, 0.0842, 0.0963, 0.0773, 0.0779], FALLING, "level", "suits"),  # up once, and level at the end
        ([3.0, 1.5, 1.2, 1.0, 0.98, 0.97], FALLING, "level", "suits"),  # little is gained after three fifths
        ([3.0, 1.5, 1.0, 1.2, 1.5], FALLING, "too long", "--num_train_epochs 2"),
        ([3.0, 2.95, 2.99, 3.0, 3.0], FALLING, "not learned", "--learning_rate"),
        ([3.0, 4.0, 5.0, 6.0, 7.0], [3.0, 4.0, 5.0], "diverged", "lower --learning_rate"),
        ([3.0, 4.0, 5.0, 6.0, 7.0], FALLING, "diverged", "lower --learning_rate"),
        ([3.0, 1.5, 1.4, 6.0, 7.0], [3.0, 1.4, 6.0, 7.2], "diverged", "Past step 20 the loss rose"),
        ([3.0, 2.9, 3.5, 4.0, 4.5], [3.0, 3.1, 3.6, 4.2], "diverged", "Past step 10 the loss rose"),
        ([], FALLING, "untold", "--eval_size"),
    ],
)
def test_the_verdict_follows_from_the_losses(held_out, training, verdict, setting):
    found = told(held_out, training)
    assert found.verdict == verdict
    assert setting in " ".join(found.sentences())


@pytest.mark.parametrize("last", [2.8, 3.0, 3.2])
def test_the_loss_of_the_last_few_batches_does_not_decide_whether_the_loss_rose(last):
    # By chance it was 7 % above or below that of the first batch, and the advice was a lower or a higher rate.
    found = told([3.0, 2.95, 2.99, 3.0, 3.0], [3.0, 2.9, 3.1, last])
    assert found.verdict == "not learned"


def test_a_run_of_only_a_few_steps_is_judged_too_short():
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate([3.0, 2.6, 2.55])]
    found = outcome(history, steps=2, epochs=1, kept_step=2, in_steps=False, has_held_out=True)
    assert found.verdict == "too short" and "suits" not in " ".join(found.sentences())


@pytest.mark.parametrize(
    ("held_out", "setting"),
    [
        ([3.0, 2.0, 1.5, 1.2, 1.0], "--max_steps 60"),
        ([3.0, 1.5, 1.0, 1.2, 1.5], "--max_steps 20"),
        ([3.0, 2.95, 2.99, 3.0, 3.0], "--max_steps"),
    ],
)
def test_with_max_steps_set_the_advice_is_to_change_max_steps(held_out, setting):
    # With --max_steps, a higher --num_train_epochs changes nothing.
    text = " ".join(told(held_out, FALLING, in_steps=True).sentences())
    assert setting in text and "--num_train_epochs" not in text


def test_the_best_step_and_the_one_that_is_kept_are_named():
    kept = told([3.0, 1.5, 1.0, 1.2, 1.5], FALLING, kept_step=20)
    assert (kept.best, kept.best_step, kept.last, kept.before) == (1.0, 20, 1.5, 3.0)
    text = " ".join(kept.sentences())
    assert "3.000 before training → 1.000 at step 20" in text and "1.500 at the end" in text
    assert "at step 20, the best, which is kept" in text
    last = " ".join(told([3.0, 1.5, 1.0, 1.2, 1.5], FALLING).sentences())
    assert "at step 20, the best; 1.500 at the end" in last and "of step 40 of 40, not of the best one" in last


def test_the_last_evaluation_of_a_run_that_goes_on_without_any_is_not_called_its_end():
    # A run resumed with --eval_strategy no said "1.500 at step 10, the best; 1.500 at the end".
    first, second, *_ = told([3.0, 1.5, None, None], FALLING).sentences()
    assert first.endswith("→ 1.500 at step 10, the best.") and "of step 30 of 30, not of the best one" in second
    # It still said "1.800 at the end" if an evaluation came between.
    rose = told([3.0, 1.5, 1.8, None], FALLING)
    assert rose.sentences()[0].endswith("at step 10, the best; 1.800 at step 20, the last evaluation.")
    assert (rose.last, rose.last_step) == (1.8, 20)


def test_a_run_that_was_hardly_evaluated_is_not_said_to_fall_until_its_end():
    # A run resumed for three times its length with --eval_strategy no was still "falling at the end".
    found = told([3.0, 2.0, 1.5, *[None] * 4], FALLING)
    assert found.verdict == "untold" and "not evaluated after step 20, so how it went on" in found.sentences()[-1]
    assert told([3.0, 2.0, 1.5, None], FALLING).verdict == "too short"


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        ([3.0, 2.0, 1.5, 1.2, 1.0], "only begun to learn"),
        ([3.0, 1.2, 1.02, 1.01, 1.0], "higher --learning_rate"),
    ],
)
def test_a_run_that_changed_no_answer_is_not_reported_as_successful(held_out, says):
    answers = [Sample("Who?", "Arr!", before="A cat.", after="A cat.")] * 3
    result = replace(told(held_out, FALLING), answers=3, as_before=all_as_before(answers))
    text = " ".join(result.sentences())
    assert says in text and "It worked" not in text
    assert not all_as_before([*answers, Sample("Who?", "Arr!", before="A cat.", after="Arr!")])
    assert not all_as_before([Sample("Who?", "Arr!", before="Arr!", after="Arr!")]), "the base was right"
    assert not all_as_before([])


@pytest.mark.parametrize("held_out", [[3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 1.2, 1.02, 1.01, 1.0]])
def test_a_run_with_broken_answers_is_not_reported_as_successful(held_out):
    text = " ".join(replace(told(held_out, FALLING), answers=3, broken=2).sentences())
    assert "most answers shown are empty" in text and "(2 of 3)" in text and "It worked" not in text
    assert "It worked" in " ".join(replace(told(held_out, FALLING), answers=3, broken=1).sentences())


@pytest.mark.parametrize("held_out", [[3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 1.2, 1.02, 1.01, 1.0]])
def test_broken_answers_that_are_still_the_bases_do_not_lower_the_learning_rate(held_out):
    # An untuned base answers with nothing; half the rate would have kept it so.
    text = " ".join(replace(told(held_out, FALLING), answers=3, broken=3, as_before=True).sentences())
    assert "still the base's" in text and "half the --learning_rate" not in text


def test_a_loss_of_training_records_shows_only_that_a_run_failed():
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate([3.0, 1.0, 0.5])]
    lengths = {"steps": 2, "epochs": 1.0, "kept_step": 2, "in_steps": False}
    result = outcome(history, **lengths, has_held_out=True, are_trained=True)
    assert "Pass other records" in " ".join(result.sentences())
    rising = [{**entry, "eval_loss": 3.0 + entry["step"]} for entry in history]
    assert outcome(rising, **lengths, has_held_out=True, are_trained=True).verdict == "diverged"


@pytest.mark.parametrize(
    ("after", "endless", "is_broken"),
    [
        ("Arr, the sea!", False, False),
        ("", False, True),
        ("the sea the sea the sea the sea the sea the sea", False, True),
        ("哈哈哈哈", False, False),
        ("| a | b |\n|------------|------------|", False, False),
        ("def f():\n            return 10000000000", False, False),
        ("Arr, the sea, and a word more of it, and one …", True, True),
        ("Arr, the sea …", True, False),  # a reference of the same length had no end there either
        ("Arr, the sea, and a word more of it, and one …", False, False),  # the time was over
    ],
)
def test_empty_repetitive_and_endless_answers_count_as_broken(after, endless, is_broken):
    assert Sample("Who?", "Arr, the sea!", after=after, endless=endless).is_broken == is_broken
    loop = "ho ho ho ho ho ho"
    assert not Sample("Laugh", loop, after=loop).is_broken, "the reference does so too"


def test_without_held_out_records_the_outcome_refers_to_the_training_loss_and_the_shown_answers():
    assert told([], FALLING).sentences()[0] == "Training loss 3.000 → 0.500."
    assert "only the answers shown tell" in " ".join(replace(told([], FALLING), answers=3).sentences())


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        ([None, None, None, 1.0], "was not computed before training"),
        ([None, 1.0, 1.0, 1.0], "was not computed before training"),
        ([3.0, None, None, None], "were not evaluated after any step"),
        ([None, None, None, None], "were not evaluated after any step"),
    ],
)
def test_too_few_evaluations_allow_no_verdict(held_out, says):
    found = told(held_out, FALLING)
    text = " ".join(found.sentences())
    assert found.verdict == "untold" and says in text
    assert "It worked" not in text and "No records were held out" not in text


def test_evaluations_after_steps_alone_show_whether_the_loss_fell_between_them():
    assert told([None, 3.0, 2.0, 1.9], FALLING).verdict == "too short"
    assert told([None, 1.5, 1.0, 1.2, 1.5], FALLING).verdict == "too long"
    assert told([None, 1.0, 1.2, 1.5], FALLING).verdict == "too long", "it only rose"


def test_a_run_without_logged_losses_makes_no_claims():
    assert told([], []).sentences()[:-1] == []
    assert told([], []).to_run_json()["verdict"] == "untold"
