"""lm-eval tasks: base and adapter are scored with the ids of training, and problems are reported at once."""

import json

import pytest

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl
from tests.trained import train_by_heart

pytestmark = pytest.mark.extra

#: A multiple-choice task whose data is a file.
TASK = """task: lighthouse
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
"""
#: Questions without choices. All answers have the same length, so length does not give the right one away.
PAIRS = [(f"What is in box {n}?", f"It is {thing}.") for n, thing in enumerate(("salt", "rice", "wine", "corn"), 1)]
#: An instruction that all records share and that no lm-eval task contains.
GUARD = "You guard four boxes."


def task_folder(folder, pairs):
    """A folder with the task: each question with all answers as choices."""
    answers = [answer for _, answer in pairs]
    questions = [
        {"question": question, "choices": answers, "right": number} for number, (question, _) in enumerate(pairs)
    ]
    folder.mkdir()
    (folder / "lighthouse.yaml").write_text(TASK.format(data=write_jsonl(folder / "questions.jsonl", questions)))
    return folder


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs the extra lm-eval")


@pytest.fixture(scope="module")
def guard(models, tmp_path_factory):
    """An adapter that learned by heart, after the shared instruction, what is in which box."""
    records = [{"instruction": GUARD, "input": question, "output": answer} for question, answer in PAIRS]
    return train_by_heart(models("llama"), tmp_path_factory.mktemp("guard"), records)


def test_a_missing_lm_eval_package_is_reported_with_the_install_command(by_heart, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["evaluate", "--adapter_path", str(by_heart), "--dataset_path", "x", "--lm_eval_tasks", "piqa"]) == 2
    error = capsys.readouterr().err
    assert "--lm_eval_tasks needs lm_eval, not installed here" in error and "pip install" in error


def test_a_custom_lm_eval_task_shows_what_the_adapter_learned(lm_eval, guard, tmp_path, capsys):
    """The adapter knows every answer, the base guesses one of four."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:2])
    flags = ["--dataset_path", str(data), "--no_generate", "--no_probe", "--output_dir", str(tmp_path / "report")]
    folder = task_folder(tmp_path / "tasks", PAIRS)
    assert main(["evaluate", "--adapter_path", str(guard), *flags, "--lm_eval_tasks", str(folder)]) == 0
    scores = json.loads((tmp_path / "report" / "report.json").read_text())["lm_eval"]
    base, tuned = (scores[model]["lighthouse acc"] for model in ("base", "out"))
    assert tuned == {"value": 1.0, "standard_error": 0.0}
    # lm-eval's standard error of a mean: sqrt(p (1 - p) / (n - 1))
    assert base["value"] <= 0.5
    assert base["standard_error"] == pytest.approx((base["value"] * (1 - base["value"]) / 3) ** 0.5)
    assert "lm-eval lighthouse acc" in capsys.readouterr().out
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "lighthouse acc" in text and "1.000 ± 0.000" in text


def test_a_stop_during_the_tasks_keeps_the_report_and_says_what_is_missing(
    lm_eval, by_heart, tmp_path, capsys, monkeypatch
):
    # Regression: the message named the records and the forgetting probe, and not the scores.
    from atomtune.evaluate import lm_eval_tasks

    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval_tasks, "simple_evaluate", stopped)
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:2])
    words = ["evaluate", "--adapter_path", str(by_heart), "--dataset_path", str(data), "--no_generate", "--no_probe"]
    words += ["--output_dir", str(tmp_path / "report"), "--lm_eval_tasks", str(task_folder(tmp_path / "tasks", PAIRS))]
    assert main(words) == 75
    assert "2 records that all models have answered, without all scores of lm-eval." in capsys.readouterr().err
    assert json.loads((tmp_path / "report" / "report.json").read_text())["records"] == 2


@pytest.mark.parametrize(("family", "name"), [("llama", "atom"), ("llama", "vicuna"), ("qwen3", "qwen3")])
def test_prompt_and_answer_get_the_same_token_ids_as_in_training(lm_eval, models, family, name, tmp_path):
    from transformers import AutoModelForCausalLM

    from atomtune.data.encoded_source import Rules
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.evaluate.lm_eval_tasks import ChatModel
    from atomtune.evaluate.models import Subject
    from atomtune.evaluate.questions import read_records
    from atomtune.model.load import load_tokenizer

    folder = str(models(family))
    template = load_template(name, load_tokenizer(folder))
    records = [{"instruction": GUARD, "input": question, "output": answer} for question, answer in PAIRS]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    trained, _ = read_records([str(data)], template, Rules(max_tokens=256))
    subject = Subject("tuned", "default", template, GUARD)
    model = ChatModel(AutoModelForCausalLM.from_pretrained(folder), subject, batch_size=1)
    for record, (question, answer) in zip(trained.values(), PAIRS, strict=True):
        prompt = model.apply_chat_template([{"role": "user", "content": question}])
        prompt_ids, answer_ids = model._encode_pair(prompt, answer)
        (example,) = record.examples
        assert [*prompt_ids, *answer_ids] == list(example.ids[: len(prompt_ids) + len(answer_ids)])
        assert len(example.ids) - len(prompt_ids) - len(answer_ids) == 1, "the stop token alone is left"


def test_an_invalid_lm_eval_task_is_reported_before_a_model_is_loaded(lm_eval, by_heart, tmp_path, capsys):
    words = ["evaluate", "--adapter_path", str(by_heart), "--dataset_path", "x", "--lm_eval_tasks"]
    (tmp_path / "empty").mkdir()
    assert main([*words, str(tmp_path / "empty")]) == 2
    assert "no task in this folder" in capsys.readouterr().err
    folder = task_folder(tmp_path / "tasks", PAIRS)
    (folder / "questions.jsonl").unlink()
    assert main([*words, str(folder)]) == 2
    output = capsys.readouterr()
    assert "lighthouse: it cannot be loaded" in output.err and "loading" not in output.out
    assert main([*words, "hellasvag"]) == 2
    assert "Did you mean hellaswag" in capsys.readouterr().err
