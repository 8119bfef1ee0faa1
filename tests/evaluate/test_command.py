"""`atomtune evaluate` from command line to report, on tiny models."""

import json
import re
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from pytest import approx
from transformers import AutoModelForCausalLM

from atomtune.cli import main
from atomtune.evaluate import command as command_of_evaluate
from atomtune.evaluate import evaluation
from atomtune.evaluate import models as models_of_evaluate
from atomtune.evaluate.metrics import METRICS, NATS
from tests.conftest import DIALOGUES, write_jsonl
from tests.evaluate.evaluated import evaluate, report_in
from tests.trained import CALLING, train_by_heart


@pytest.fixture(scope="module")
def report(by_heart, tmp_path_factory):
    """The folder of an evaluation on the records that the adapter learned by heart."""
    folder = tmp_path_factory.mktemp("report")
    data = write_jsonl(folder / "same.jsonl", DIALOGUES)
    out = folder / "out"
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(out)]
    assert evaluate(*words, "--max_new_tokens", "60", "--per_device_eval_batch_size", "3") == 0
    return out


def test_the_last_lines_suggest_chat_and_certify_with_the_adapter(by_heart, dialogues, tmp_path, capsys):
    # The chat was with the base in another number format than the one that was evaluated.
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(dialogues), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe", "--records", "2", "--stored_base") == 0
    *_, chat, certified = capsys.readouterr().out.splitlines()
    assert chat.endswith(f" chat --adapter_path {by_heart} --dtype float32 --stored_base --compare")
    assert certified.endswith(f" certify --adapter_path {by_heart}")  # an engine loads the base in its own way


def test_an_adapter_that_memorized_the_records_beats_the_base(report):
    figures = report_in(report)["models"]
    assert list(figures) == ["base", "out"]
    tuned, base = figures["out"], figures["base"]
    assert tuned["exact_match"][0] == 1 and base["exact_match"][0] == 0
    assert tuned["stop_rate"][0] == 1
    assert tuned["chrf"][0] == approx(100)
    assert tuned["token_accuracy"][0] > 0.95
    assert tuned["length_ratio"][0] == approx(1)
    assert tuned["nats_per_token"][0] < 0.2 < base["nats_per_token"][0]
    assert report_in(report)["against_base"]["out"]["nats_per_token"][2] < 0  # the whole interval


def test_base_figures_are_unaffected_by_an_adapter_initialized_with_pissa(models, by_heart, dialogues, tmp_path):
    base = models("llama")
    shutil.copytree(by_heart, tmp_path / "pissa")  # for its template; the adapter is overwritten
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "pissa")
    figures = {}
    for name, folders in (("alone", [by_heart]), ("beside", [by_heart, tmp_path / "pissa"])):
        words = ["--adapter_path", *map(str, folders), "--dataset_path", str(dialogues), "--records", "2"]
        assert evaluate(*words, "--output_dir", str(tmp_path / name), "--no_generate", "--no_probe") == 0
        nats = {model: values["nats_per_token"][0] for model, values in report_in(tmp_path / name)["models"].items()}
        figures[name] = nats
    assert figures["beside"]["base"] == figures["alone"]["base"]
    assert figures["beside"]["out"] == figures["alone"]["out"]
    assert figures["beside"]["pissa"] == approx(figures["alone"]["base"], rel=1e-5)  # not trained yet


def test_every_figure_lies_within_its_interval(report):
    for figures in report_in(report)["models"].values():
        assert figures.keys() >= {"nats_per_token", "perplexity", "probe_nats_per_token"}
        for value, low, high in figures.values():
            assert low <= value <= high


def test_the_loss_equals_the_eval_loss_of_the_training_run(models, tmp_path):
    """evaluate's nats per token equal the eval_loss that training reported for the same adapter and records."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    flags = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    more = ["--max_steps", "3", "--eval_size", "3", "--eval_strategy", "steps", "--eval_steps", "3"]
    assert main(["train", *flags, *more, "--learning_rate", "1e-2", "--dtype", "float32", "--lora_dropout", "0"]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert evaluate("--adapter_path", str(tmp_path / "out"), "--no_generate", "--no_probe") == 0
    found = report_in(tmp_path / "out" / "evaluation")
    assert found["records"] == len(run["records_held_out"]) == 3
    assert found["models"]["out"]["nats_per_token"][0] == approx(run["eval_loss"], rel=1e-5)  # float32
    assert "chrf" not in found["models"]["out"]


def test_the_loss_equals_the_eval_loss_of_a_run_on_a_quantized_base(trained_in_nf4, tmp_path, capsys):
    """The base is quantized as in training. Regression: its stored weights gave other figures than the run's own."""
    _, run = trained_in_nf4
    words = ["--adapter_path", str(run), "--no_generate", "--no_probe", "--output_dir", str(tmp_path)]
    of_run = json.loads((run / "run.json").read_text())["eval_loss"]
    assert evaluate(*words) == 0
    assert "the base is held in nf4, as it was in training" in capsys.readouterr().out
    assert report_in(tmp_path)["models"]["out"]["nats_per_token"][0] == approx(of_run, rel=1e-4)
    assert evaluate(*words, "--stored_base") == 0
    assert "is used as it is stored here (--stored_base)" in capsys.readouterr().out
    assert report_in(tmp_path)["models"]["out"]["nats_per_token"][0] != approx(of_run, rel=1e-4)
    assert evaluate(*words, "--stored_base", "--quantize", "int8") == 2
    assert "contradict each other" in capsys.readouterr().err


def test_a_quantized_base_is_loaded_in_the_dtype_of_training(trained_in_nf4, tmp_path, capsys):
    run = shutil.copytree(trained_in_nf4[1], tmp_path / "run")
    card = json.loads((run / "atomtune.json").read_text())
    (run / "atomtune.json").write_text(json.dumps({**card, "dtype": "float16"}))  # which is never chosen on a CPU
    words = ["--adapter_path", str(run), "--no_generate", "--no_probe", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *words, "--dtype", "auto"]) == 0
    assert " in float16 on cpu" in capsys.readouterr().out


def test_the_html_report_loads_nothing_and_escapes_the_records_text(by_heart, tmp_path):
    hostile = {"instruction": "<script>alert(1)</script>", "input": "", "output": '</p><img src=x onerror="alert(2)">'}
    data = write_jsonl(tmp_path / "hostile.jsonl", [hostile, *DIALOGUES[:2]])
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_probe", "--max_new_tokens", "20") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page and "<img" not in page
    assert not re.search(r'(src|href)="', page)
    assert "default-src 'none'" in page


def test_the_markdown_report_has_every_figure_and_the_records(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    used = [metric for metric in METRICS if metric.name in report_in(report)["models"]["out"]]
    assert NATS in used and all(metric.title in text for metric in used)
    assert "Better: " in text and "same.jsonl:" in text


@pytest.mark.slow
def test_several_adapters_of_different_templates_are_compared(by_heart, models, tmp_path):
    """Each answers with the template it was trained with; the one that learned these records is better."""
    other = train_by_heart(models("llama"), tmp_path, DIALOGUES[:4], steps=1)
    shutil.move(other, tmp_path / "barely")
    plain = tmp_path / "plain"
    flags = ["--model_path", str(models("llama")), "--dataset_path", str(tmp_path / "data.jsonl")]
    learning = ["--max_steps", "120", "--learning_rate", "1e-2", "--lora_rank", "16", "--lora_dropout", "0"]
    more = ["--dtype", "float32", "--template", "plain"]
    assert main(["train", *flags, "--output_dir", str(plain), *learning, *more]) == 0
    adapters = [str(by_heart), str(tmp_path / "barely"), str(plain)]
    data = write_jsonl(tmp_path / "asked.jsonl", DIALOGUES[:4])
    words = ["--adapter_path", *adapters, "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_probe", "--max_new_tokens", "40") == 0
    figures = report_in(tmp_path / "out")["models"]
    assert list(figures) == ["base", "out", "barely", "plain"]
    assert figures["out"]["exact_match"][0] == figures["plain"]["exact_match"][0] == 1
    assert figures["barely"]["exact_match"][0] < 1
    pages = [(tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]
    for tuned in ("out", "barely", "plain"):
        assert all(f"Most improved by {tuned}" in page for page in pages)


def test_an_interrupted_evaluation_reports_the_records_all_models_finished(by_heart, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    calls, real = [], evaluation.score_targets

    def interrupted(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 4:  # the tuned model's second batch
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(evaluation, "score_targets", interrupted)
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--per_device_eval_batch_size", "3", "--max_new_tokens", "8") == 75
    told = capsys.readouterr()
    assert "for these records. Ctrl-C ends it early and keeps" in told.out
    assert "3 records that all models have answered, without the forgetting probe." in told.err
    found = report_in(tmp_path / "out")
    assert found["records"] == 3 and found["stopped_early"] is True
    assert "stopped early" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture
def stopped_in(by_heart, tmp_path, monkeypatch, capsys):
    """Evaluate two records, with Ctrl-C in this function of a module; returns the message. The reports go to `out`."""

    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    def run(module: object, name: str) -> str:
        monkeypatch.setattr(module, name, interrupt)
        data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:2])
        words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
        assert evaluate(*words, "--no_generate") == 75
        return capsys.readouterr().err

    return run


def test_a_stop_during_the_forgetting_probe_keeps_the_report(stopped_in, tmp_path):
    told = stopped_in(command_of_evaluate, "probe_scores")
    assert "2 records that all models have answered, without the forgetting probe." in told
    assert report_in(tmp_path / "out")["records"] == 2


def test_a_stop_before_the_first_records_are_done_writes_nothing(stopped_in, tmp_path):
    told = stopped_in(evaluation, "score_targets")
    assert "stopped before the first records were done; nothing is written." in told
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_time_estimate_is_printed_after_one_models_first_batch(by_heart, dialogues, tmp_path, monkeypatch, capsys):
    """Regression: the estimate came only after all models' first batches, and never if one batch held all records."""
    said, real = [], evaluation.score_targets

    def listening(*arguments: object, **more: object) -> object:
        said.append(capsys.readouterr().out)
        return real(*arguments, **more)

    monkeypatch.setattr(evaluation, "score_targets", listening)
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(dialogues), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--records", "2", "--no_generate", "--no_probe") == 0
    assert len(said) == 2 and re.fullmatch(r"About \d+ seconds? for these records\.", said[1].strip())


def test_a_base_alone_is_evaluated(models, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:3])
    words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--max_new_tokens", "8") == 0
    assert list(report_in(tmp_path / "out")["models"]) == ["base"]


def test_a_base_alone_is_evaluated_in_the_requested_thinking_mode(models, tmp_path):
    # Without thinking, the empty block of thoughts is part of the prompt; with thinking, it is part of the answer.
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES[:3])
    nats = {}
    for thinks in ("true", "false"):
        out = tmp_path / thinks
        words = ["--model_path", str(models("qwen3")), "--dataset_path", str(data), "--output_dir", str(out)]
        words += ["--template", "qwen3", "--chat_template_kwargs", f'{{"enable_thinking": {thinks}}}']
        assert evaluate(*words, "--no_generate", "--no_probe") == 0
        nats[thinks] = report_in(out)["models"]["base"]["nats_per_token"][0]
    assert nats["true"] != nats["false"]


def test_tool_calls_are_counted_where_the_reference_has_one(models, tmp_path, capsys):
    def record(answer: dict) -> dict:
        turns = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", **answer}]
        schema = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}
        return {"messages": turns, "tools": [{"type": "function", "function": schema}]}

    call = {"name": "weather", "arguments": {"city": "x"}}
    calling = record({"content": "", "tool_calls": [{"type": "function", "function": call}]})
    data = write_jsonl(tmp_path / "data.jsonl", [calling, record({"content": "5"})])
    base = Path(shutil.copytree(models("qwen3"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    # The list of tools is longer than the tiny base has positions.
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    words = ["--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--template", "qwen3", "--max_new_tokens", "8") == 0
    figures = report_in(tmp_path / "out")["models"]["base"]
    assert figures["call_parse_rate"][0] == 0  # an untrained model writes no calls
    assert "does not know the format" not in capsys.readouterr().out
    # Calls in an unknown form give no figure, and a notice says so.
    odd = tmp_path / "odd.jinja"
    odd.write_text(CALLING.replace('{"name": "{{ c.function.name }}", "arguments": ', "CALL {{ c.function.name }} "))
    assert evaluate(*words, "--template", str(odd), "--max_new_tokens", "8") == 0
    assert "does not know the format of the tool calls in 1 record," in capsys.readouterr().out
    assert "call_parse_rate" not in report_in(tmp_path / "out")["models"]["base"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--adapter_path is missing"),
        (["--adapter_path", "ADAPTER"], "held no records out"),
        (["--adapter_path", "nowhere", "--dataset_path", "x.jsonl"], "no such folder"),
        (["--adapter_path", "ADAPTER", "--output_dir", "/dev/null"], "--output_dir /dev/null cannot be written: "),
        # Regression: two of the same name mixed their figures, and the intervals ended in a traceback.
        (["--adapter_path", "ADAPTER", "ADAPTER", "--dataset_path", "RUN"], "more than once. Name each adapter once."),
        # Regression: these were ignored, so the figures were not of what the user asked for.
        (["--adapter_path", "ADAPTER", "--template", "chatml"], "--template and --chat_template_kwargs are for a base"),
        (["--adapter_path", "ADAPTER", "--chat_template_kwargs", "{}"], "are for a base without"),
        (["--adapter_path", "ADAPTER", "--keys", "instruction=q"], "are used with --dataset_path only"),
    ],
)
def test_impossible_evaluations_are_refused_with_the_reason(words, said, by_heart, dialogues, capsys):
    names = {"ADAPTER": str(by_heart), "RUN": str(dialogues)}
    assert evaluate(*(names.get(word, word) for word in words)) == 2
    assert said in capsys.readouterr().err


def test_a_whole_model_passed_as_adapter_is_refused_with_the_right_flag(models, dialogues, capsys):
    """Regression: the message said only that it is no run's output folder, not how a whole model is evaluated."""
    base = models("llama")
    assert evaluate("--adapter_path", str(base), "--dataset_path", str(dialogues)) == 2
    assert (
        f"--adapter_path {base} is a whole model, not an adapter. Pass it with --model_path." in capsys.readouterr().err
    )


def test_a_truncated_adapter_is_reported_before_the_base_is_loaded(by_heart, dialogues, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models_of_evaluate, "load_base", lambda spec: pytest.fail("the base was loaded"))
    torn = Path(shutil.copytree(by_heart, tmp_path / "torn"))
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert evaluate("--adapter_path", str(torn), "--dataset_path", str(dialogues)) == 2
    assert f"{weights}: its weights cannot be read" in capsys.readouterr().err


def test_one_record_has_no_interval(by_heart, tmp_path, capsys):
    """Regression: its interval was 12.73–12.73, as if all other records had exactly that loss."""
    data = write_jsonl(tmp_path / "one.jsonl", DIALOGUES[:1])
    words = ["--adapter_path", str(by_heart), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--no_probe") == 0
    assert "1 record: no interval can be given" in capsys.readouterr().out
    loss, low, high = report_in(tmp_path / "out")["models"]["base"]["nats_per_token"]
    assert loss > 0 and low is None and high is None
    for name in ("report.html", "report.md"):
        page = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "1 record of" in page and "1 records" not in page and f"{loss:.2f}" in page
        assert not re.search(r"\binf\b|\bnan\b", page)


def test_an_early_stop_leaves_a_sample_of_all_record_lengths(models, tmp_path, monkeypatch):
    """Regression: records came sorted by length, so an evaluation that was stopped early had only the longest."""
    records = [{"instruction": "x" * 3 * number, "output": "y"} for number in range(1, 41)]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    seen, real = [], evaluation.score_targets

    def watched(model, examples, collator):
        seen.append([len(record[0].ids) for record in examples])
        return real(model, examples, collator)

    monkeypatch.setattr(evaluation, "score_targets", watched)
    words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert evaluate(*words, "--no_generate", "--per_device_eval_batch_size", "2") == 0
    lengths = sorted((length for batch in seen for length in batch), reverse=True)
    assert max(seen[0]) == lengths[0], "the longest first: the memory that is needed shows at once"
    assert all(max(batch) - min(batch) <= 4 for batch in seen), "batches of like length"
    half = [length for batch in seen[: len(seen) // 2] for length in batch]
    assert min(half) < lengths[-8], "the first half has some of the shortest fifth"
