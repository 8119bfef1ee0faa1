"""Which records are evaluated: those that were left out, cut or learned are named."""

import json
import shutil
from pathlib import Path

import pytest

from atomtune.cli import main
from tests.conftest import DIALOGUES, write_jsonl
from tests.evaluate.evaluated import evaluate, report_in, trained_on_part
from tests.trained import CALLING


@pytest.mark.parametrize(("learn", "answers"), [("all", 4), ("last", 2)])
def test_the_answers_that_training_learned_are_evaluated_in_other_files_too(by_heart, tmp_path, capsys, learn, answers):
    adapter = Path(shutil.copytree(by_heart, tmp_path / "out"))
    record = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
    record["settings"]["learn"]["value"] = learn
    (adapter / "run.json").write_text(json.dumps(record))
    conversations = [{**dialogue, "history": [["Who is there?", "Nobody."]]} for dialogue in DIALOGUES[:2]]
    data = write_jsonl(tmp_path / "other.jsonl", conversations)
    assert evaluate("--adapter_path", str(adapter), "--dataset_path", str(data), "--no_generate", "--no_probe") == 0
    assert f"2 records with {answers} answers" in capsys.readouterr().out


def test_a_file_without_a_usable_record_is_refused_with_the_reasons(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "Who are you?", "output": 5}, {"instruction": "Hi."}])
    assert evaluate("--model_path", str(models("llama")), "--dataset_path", str(data)) == 2
    told = capsys.readouterr().err
    assert "data.jsonl:1" in told and "data.jsonl:2" in told
    assert f"{data}: none of 2 records can be used. Fix the records listed above." in told


def test_records_with_other_names_for_keys_and_roles_are_read_as_the_flags_say(by_heart, tmp_path, capsys):
    dialog = [{"role": "guest", "content": "Who are you?"}, {"role": "keeper", "content": "I keep the light."}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"dialog": dialog}])
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    names = ["--keys", "dialog=messages", "--roles", "guest=user", "keeper=assistant", "--format", "messages"]
    assert evaluate(*words, *names, "--no_probe", "--max_new_tokens", "20") == 0
    assert report_in(tmp_path / "out")["models"]["out"]["exact_match"][0] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no run.json"),
        ({}, "run.json does not say which records the run used"),
        ({"data": {"sha256": "0"}}, "run.json does not say which records the run used"),
        ({"settings": {}}, "run.json does not say which records the run used"),
        ({"settings": {}, "records_held_out": ["a:1"]}, "run.json does not say which records the run used"),
        ({"settings": {"dataset_path": {"value": []}}}, "run.json does not say which records the run used"),
        ({"settings": {"dataset_path": {"value": "FILE"}}}, "held no records out"),
        (
            {"settings": {"dataset_path": {"value": "FILE"}}, "records_held_out": ["elsewhere.jsonl:1"]},
            "none of the records that the run held out are here",
        ),
    ],
)
def test_an_incomplete_run_json_is_reported_and_dataset_path_replaces_it(content, said, by_heart, dialogues, capsys):
    """Regression: `{}` was reported as a missing run.json; held-out records that no file has gave a traceback."""
    adapter = shutil.copytree(by_heart, dialogues.parent / "out")
    (adapter / "run.json").unlink()
    if content is not None:
        (adapter / "run.json").write_text(json.dumps(content).replace("FILE", str(dialogues)))
    words = ["--adapter_path", str(adapter), "--no_generate", "--no_probe", "--records", "2"]
    assert evaluate(*words) == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert said in refusal and "Pass --dataset_path with records" in refusal
    assert evaluate(*words, "--dataset_path", str(dialogues)) == 0


def test_a_missing_or_empty_dataset_is_reported_before_the_base_is_loaded(by_heart, tmp_path, capsys):
    """Regression: a base of 7 billion parameters was loaded for minutes before the records were read."""
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for file, said in ((tmp_path / "none.jsonl", "no such file"), (empty, "the file is empty")):
        assert evaluate("--adapter_path", str(by_heart), "--dataset_path", str(file)) == 2
        told = capsys.readouterr()
        assert said in told.err and "loading" not in told.out


def test_records_that_are_not_evaluated_are_named_on_the_terminal_and_in_all_reports(by_heart, tmp_path, capsys):
    """Regression: with 400 of 1,000 lines broken, nothing said that the figures are of the other 600."""
    data = write_jsonl(tmp_path / "data.jsonl", [*DIALOGUES, {"instruction": "x"}])
    with data.open("a", encoding="utf-8") as file:
        file.write("no JSON\n" * 30)
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe", "--records", "3") == 0
    found = report_in(tmp_path / "out")
    assert [found[name] for name in ("records_read", "records_used", "records_cut", "records")] == [39, 8, 0, 3]
    assert [refusal["origin"] for refusal in found["records_refused"]] == [f"data.jsonl:{n}" for n in range(9, 40)]
    pages = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]
    for page in (capsys.readouterr().out, *pages):
        text = " ".join(page.split())
        assert "39 records read (alpaca), 8 used, 31 refused, 0 shortened; 0 prompt tokens cut." in text
        assert "of these 8 records, 3 are evaluated, chosen at random (--records)." in text
        assert "not evaluated: data.jsonl:9 " in text and "data.jsonl:10 not JSON" in text and "and 27 more." in text


def test_shortened_records_are_named_with_the_tokens_that_are_cut(by_heart, tmp_path, capsys):
    long = {"instruction": "Who are you? " * 40, "output": "I keep the light."}
    data = write_jsonl(tmp_path / "data.jsonl", [*DIALOGUES[:2], long])
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe", "--max_seq_length", "64") == 0
    found = report_in(tmp_path / "out")
    assert found["records_cut_origins"] == ["data.jsonl:3"] and found["prompt_tokens_cut"] > 40
    said = " ".join(capsys.readouterr().out.split())
    assert f"0 refused, 1 shortened; {found['prompt_tokens_cut']} prompt tokens cut." in said
    assert "shortened to fit --max_seq_length 64: data.jsonl:3." in said
    assert "chosen at random" not in said, "all are evaluated"


def test_an_adapter_of_another_tool_is_evaluated_up_to_the_positions_of_its_base(by_heart, tmp_path, capsys):
    """Regression: every prompt was cut to 256 tokens, and every record with a longer answer left out."""
    adapter = Path(shutil.copytree(by_heart, tmp_path / "adapter"))
    (adapter / "atomtune.json").unlink()
    records = [{"instruction": text, "output": "I keep the light." * 9} for text in ("Hi", "Who are you? " * 40)]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    words = ["--adapter_path", str(adapter), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe") == 0
    found = report_in(tmp_path / "out")
    assert found["max_seq_length"] == 512  # the positions of the tiny base, below the default of 2,048
    assert found["records_read"] == found["records_used"] == 2 and found["records_cut"] == 0


def test_records_longer_than_the_base_has_positions_are_refused_before_it_is_loaded(models, tmp_path, capsys):
    """Regression: --max_seq_length was obeyed on any base: figures without meaning, and with GPT-2 an IndexError."""
    long = {"instruction": "Who are you? " * 400, "output": "I keep the light."}
    data = write_jsonl(tmp_path / "data.jsonl", [DIALOGUES[0], long, DIALOGUES[1]])
    words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--max_seq_length", "4000"]
    assert evaluate(*words, "--output_dir", str(tmp_path / "out"), "--no_generate") == 2
    captured = capsys.readouterr()
    assert "this model has 512 positions.\nPass --max_seq_length 512 or less." in captured.err
    assert "loading" not in captured.out


def test_a_base_alone_is_not_given_more_tokens_than_it_has_positions(models, tmp_path):
    long = {"instruction": "Who are you? " * 400, "output": "I keep the light."}
    data = write_jsonl(tmp_path / "data.jsonl", [long])
    words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe") == 0
    assert report_in(tmp_path / "out")["max_seq_length"] == 512 and report_in(tmp_path / "out")["records_cut"] == 1


def test_records_that_another_models_template_refuses_are_counted_and_named(by_heart, models, tmp_path, capsys):
    """Regression: they were left out of all figures, and nothing said so."""
    choosy = tmp_path / "choosy.jinja"
    refusal = "{% if 'Who' in m.content %}{{ raise_exception('no questions') }}{% endif %}"
    choosy.write_text(CALLING.replace("{% for m in messages %}", "{% for m in messages %}" + refusal))
    data = write_jsonl(tmp_path / "data.jsonl", [DIALOGUES[0]])
    other = trained_on_part(models, tmp_path, data, "choosy", "--template", str(choosy))
    data = write_jsonl(tmp_path / "asked.jsonl", DIALOGUES[:3])
    words = ["--adapter_path", str(by_heart), str(other), "--dataset_path", str(data)]
    assert evaluate(*words, "--output_dir", str(tmp_path / "report"), "--no_generate", "--no_probe") == 0
    found = report_in(tmp_path / "report")
    assert (found["records_read"], found["records_used"], found["records"]) == (3, 2, 2)
    (refused,) = found["records_refused"]
    assert refused["origin"] == "asked.jsonl:2" and refused["reason"].endswith("(template of choosy)")
    assert "asked.jsonl:2" in capsys.readouterr().out


def test_a_run_whose_dataset_changed_since_training_is_refused(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    flags = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--max_steps", "1", "--eval_size", "2", "--dtype", "float32"]) == 0
    write_jsonl(data, DIALOGUES[1:])
    assert evaluate("--adapter_path", str(tmp_path / "out")) == 2
    assert "have changed since" in capsys.readouterr().err


def test_records_that_an_adapter_was_trained_on_are_reported(models, tmp_path, capsys):
    """Another adapter may have learned the first one's held-out records, and a user may name the training file."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    part = trained_on_part(models, tmp_path, data, "part", "--eval_size", "3")
    everything = trained_on_part(models, tmp_path, data, "everything", "--eval_size", "0")
    for words, told in (
        (["--adapter_path", str(part), str(everything)], [f"{everything} was trained on 3 of these 3 records"]),
        (["--adapter_path", str(part), "--dataset_path", str(data)], [f"{part} was trained on 5 of these 8 records"]),
        (["--adapter_path", str(part)], []),
    ):
        capsys.readouterr()
        assert evaluate(*words, "--output_dir", str(tmp_path / "report"), "--no_generate", "--no_probe") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert [line for line in told if line not in printed] == []
        assert ("was trained on" in printed) is bool(told)


def test_evaluation_records_that_resemble_trained_ones_are_reported(models, tmp_path, capsys):
    # The run had said so, and evaluate then called its figures better. Both files have the same name.
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    (tmp_path / "test").mkdir()
    test = write_jsonl(tmp_path / "test" / "data.jsonl", DIALOGUES[:3])
    run = trained_on_part(models, tmp_path, data, "run", "--eval_path", str(test))
    capsys.readouterr()
    words = ["--adapter_path", str(run), "--output_dir", str(tmp_path / "report"), "--no_generate", "--no_probe"]
    assert evaluate(*words) == 0
    assert "nearly the same as 3 of these 3. Its figures" in " ".join(capsys.readouterr().out.split())


def test_records_that_a_streamed_run_was_trained_on_are_reported(models, tmp_path, capsys):
    """Regression: a streamed run stored another hash of the same file, so nothing was said."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    run = trained_on_part(models, tmp_path, data, "streamed", "--streaming")
    words = ["--adapter_path", str(run), "--dataset_path", str(data), "--output_dir", str(tmp_path / "report")]
    assert evaluate(*words, "--no_generate", "--no_probe") == 0
    assert f"{run} was trained on 8 of these 8 records" in " ".join(capsys.readouterr().out.split())
