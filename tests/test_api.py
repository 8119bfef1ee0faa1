"""The commands as functions: the same figures as the commands; values are returned, errors raised, nothing printed."""

import inspect as signatures
import json
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import atomtune
from atomtune import evaluate, inspect, load, train
from atomtune.cli import main
from atomtune.errors import BadData, BadModel, BadSettings, CheckFailed, Stopped
from tests.conftest import DIALOGUES, write_jsonl

LEARNING = {"learning_rate": 1e-2, "lora_rank": 16, "lora_dropout": 0, "dtype": "float32"}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run of the library that has memorized its records."""
    folder = tmp_path_factory.mktemp("api")
    data = write_jsonl(folder / "data.jsonl", DIALOGUES)
    return train(models("llama"), data, output_dir=folder / "out", max_steps=150, **LEARNING)


def test_the_import_is_fast_and_loads_no_torch():
    program = (
        "import sys, atomtune; from atomtune import train, load, inspect, evaluate; "
        "assert callable(train) and callable(inspect); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_type_checkers_see_every_function():
    stub = Path(atomtune.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    named = set(re.findall(r"^from atomtune\.\w+ import (\w+) as \1$", stub, re.MULTILINE))
    assert named | {"__version__"} == set(atomtune.__all__)


def test_importing_a_subpackage_does_not_replace_the_function_of_its_name():
    import atomtune.evaluate.command
    import atomtune.inspect.command
    import atomtune.train.run

    assert atomtune.train is train and atomtune.inspect is inspect and atomtune.evaluate is evaluate
    assert pickle.loads(pickle.dumps(train)) is train
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = atomtune.trian


def test_train_returns_the_figures_of_run_json(run):
    record = json.loads((run.folder / "run.json").read_text())
    assert run.figures == record and record["status"] == "finished"
    assert run.train_loss == record["train_loss"] and run.eval_loss is None
    assert record["records_used"] == len(DIALOGUES)
    assert record["settings"]["lora_rank"] == {"value": 16, "source": "train()"}


def test_the_trained_model_is_freed_when_train_returns(models, tmp_path, one_base_at_a_time):
    # A notebook that loaded the tuned model next had two bases in memory.
    train(models("llama"), write_jsonl(tmp_path / "data.jsonl", DIALOGUES), output_dir=tmp_path / "out", max_steps=1)
    assert [base() for base in one_base_at_a_time] == [None]


def test_a_run_from_python_equals_the_run_of_the_command(run, models, tmp_path):
    """The adapters are equal bit by bit."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    flags = [word for name, value in LEARNING.items() for word in (f"--{name}", str(value))]
    paths = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *paths, "--max_steps", "150", *flags]) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (run.folder / weights).read_bytes()


def test_a_loaded_model_gives_its_memorized_answers(run):
    tuned = run.load(dtype="float32")
    assert tuned.chat("晚安") == "晚安，愿你好梦。"
    assert tuned.chat([{"role": "user", "content": "Who are you?"}]) == "I keep the light."
    assert "".join(tuned.stream("晚安")).strip() == "晚安，愿你好梦。"
    assert len(list(tuned.stream("晚安"))) > 1


def test_leaving_a_stream_ends_the_answer(run):
    tuned = load(run.folder, dtype="float32")
    before = threading.active_count()
    for _ in tuned.stream("晚安"):
        break
    assert threading.active_count() == before


def test_the_base_answers_with_the_adapter_disabled_and_then_re_enabled(run):
    tuned = load(run.folder, dtype="float32")
    tuned_text = tuned.chat("晚安")
    assert tuned.reply(tuned.messages_of("晚安"), base=True, max_new_tokens=20).text != tuned_text
    assert tuned.chat("晚安") == tuned_text


def test_equal_seeds_repeat_answers_and_the_global_rng_is_untouched(run):
    import torch

    tuned = load(run.folder, dtype="float32")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [tuned.chat("something else", temperature=2.0, max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(3), expected)


def test_inspect_counts_what_the_command_counts(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [*DIALOGUES, DIALOGUES[0], {"instruction": "x"}])
    found = inspect(data, models("llama"))
    capsys.readouterr()
    assert main(["inspect", str(data), "--model_path", str(models("llama")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.figures))
    assert found.findings["duplicates"] == 1 and found.findings["refused"] == 1
    assert 0 < found.tokens["tree"] <= found.tokens["packed"] <= found.tokens["padded"]


def test_inspect_writes_the_page_and_fails_the_checks_that_are_requested(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [*DIALOGUES, DIALOGUES[0]])
    page = tmp_path / "report.html"
    with pytest.raises(CheckFailed, match="duplicates"):
        inspect(data, models("llama"), html=str(page), fail_on=["duplicates"])
    assert "data.jsonl" in page.read_text(encoding="utf-8")
    inspect(data, models("llama"), samples=1, verbose=True)
    assert "│ between tokens" in capsys.readouterr().out


def test_evaluate_gives_the_values_of_report_json(run, tmp_path):
    pytest.importorskip("sacrebleu")
    data = write_jsonl(tmp_path / "test.jsonl", DIALOGUES[:4])
    settings = {"dataset_path": data, "max_new_tokens": 16, "no_probe": True, "dtype": "float32"}
    result = evaluate(run.folder, output_dir=tmp_path / "reports", **settings)
    report = json.loads((tmp_path / "reports" / "report.json").read_text())
    assert result.models == report["models"] and result.against_base == report["against_base"]
    assert result.models["out"]["nats_per_token"][0] < result.models["base"]["nats_per_token"][0]
    assert result.records == 4 and "Better" in result.sentences[0]


def test_without_an_output_folder_evaluate_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "test.jsonl", DIALOGUES[:2])
    before = set(run.folder.rglob("*"))
    evaluate(run.folder, dataset_path=data, no_generate=True, no_probe=True, dtype="float32")
    assert set(run.folder.rglob("*")) == before and [path.name for path in tmp_path.iterdir()] == ["test.jsonl"]


def test_nothing_is_printed_unless_requested(models, tmp_path, capfd):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    capfd.readouterr()
    run = train(models("llama"), data, output_dir=tmp_path / "out", max_steps=2, dtype="float32", bf16=True, lr=1e-4)
    inspect(data, models("llama"))
    run.load().chat("Hello", max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    # Regression: the notices about the settings themselves, which are read before there is a run.json, were lost.
    of_the_settings, *in_the_record = run.notices
    assert "lr → learning_rate" in of_the_settings and in_the_record == run.figures["notices"]
    inspect(data, models("llama"), verbose=True)
    assert "records" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (
            lambda: train("a", "b", learning_rat=1),
            BadSettings,
            r"train\(\): learning_rat: .*Did you mean learning_rate",
        ),
        (lambda: train("a", "b", lora_rank="x"), BadSettings, r"train\(\): lora_rank 'x': expected"),
        (lambda: train("a"), BadSettings, "dataset_path"),
        (lambda: load("nowhere"), BadModel, "no such folder"),
        (lambda: load("nowhere", temperature=1.0), BadSettings, r"load\(\): temperature: unknown"),  # one of `chat`
        (lambda: inspect("nowhere.jsonl", "nowhere"), BadModel, "nowhere"),
        (evaluate, BadSettings, "adapter_path"),
    ],
)
def test_errors_are_raised_instead_of_ending_the_process(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_broken_record_is_raised_with_its_line(models, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [*DIALOGUES, {"instruction": "x"}])
    with pytest.raises(BadData, match=r"data\.jsonl:9"):
        train(models("llama"), data, output_dir=tmp_path / "out", max_steps=1)


def test_a_second_run_in_the_same_process_is_refused_until_the_first_has_ended(models, tmp_path):
    # Both drew from one random generator, so neither run could be repeated.
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    first, second = tmp_path / "first", {"output_dir": tmp_path / "second", "max_steps": 1, "dtype": "float32"}
    long = {"output_dir": first, "max_steps": 10_000, "dtype": "float32", "eval_strategy": "no"}
    stopped: list[Stopped] = []

    def trained() -> None:
        try:
            train(models("llama"), data, max_minutes=0.2, **long)
        except Stopped as error:
            stopped.append(error)

    worker = threading.Thread(target=trained)
    worker.start()
    while not (first / "run.json").exists():
        worker.join(0.01)
        assert worker.is_alive(), stopped
    with pytest.raises(BadSettings, match="another run is being trained in this process"):
        train(models("llama"), data, **second)
    worker.join()
    assert [type(error) for error in stopped] == [Stopped]
    assert train(models("llama"), data, **second).figures["status"] == "finished"


def test_training_works_in_a_thread_of_the_program(models, tmp_path):
    """Python delivers signals only to the main thread."""
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    runs = []
    worker = threading.Thread(
        target=lambda: runs.append(train(models("llama"), data, output_dir=tmp_path / "out", max_steps=1))
    )
    worker.start()
    worker.join()
    assert runs[0].figures["status"] == "finished"


def test_signatures_name_every_setting_with_its_default():
    parameters = signatures.signature(train).parameters
    assert parameters["lora_rank"].default == 8 and parameters["lora_targets"].default == ["all-linear"]
    assert parameters["output_dir"].default is None
    assert signatures.signature(inspect).parameters["max_seq_length"].default is None  # None means auto
    assert "learning_rate" in parameters and parameters["settings"].kind is signatures.Parameter.VAR_KEYWORD
    assert "settings" not in signatures.signature(evaluate).parameters


def test_yaml_and_keywords_go_together(models, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    (tmp_path / "run.yaml").write_text("lora_rank: 4\nmax_steps: 1\n")
    run = train(models("llama"), [data, data], output_dir=tmp_path / "out", config=tmp_path / "run.yaml", lora_rank=2)
    assert run.figures["settings"]["lora_rank"]["value"] == 2
    assert run.figures["settings"]["max_steps"] == {"value": 1, "source": "run.yaml:2"}
    assert run.figures["records_read"] == 2 * len(DIALOGUES)


def test_reports_that_cannot_be_written_are_refused_before_anything_is_loaded(run, tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", DIALOGUES[:2])
    with pytest.raises(BadSettings, match="--output_dir /dev/null cannot be written"):
        evaluate(run.folder, dataset_path=data, output_dir="/dev/null", model_path="nowhere")
