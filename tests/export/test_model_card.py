"""Model card: it says what is true of the run, and no more."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from atomtune.cli import main
from atomtune.export.model_card import hub_name, licence_of, model_card, shown_base
from atomtune.model.adapter_folder import AdapterMetadata
from tests.conftest import DIALOGUES, write_jsonl

METADATA = AdapterMetadata(template="chatml", instruction_role="system", stop="<|im_end|>", instruction="Be brief.")
RECORD = {
    "settings": {
        "model_path": {"value": "maker/base-1b", "source": "--model_path"},
        "dataset_path": {"value": "/home/me/private/talk.jsonl", "source": "--dataset_path"},
        "output_dir": {"value": "/home/me/out", "source": "--output_dir"},
        "hub_token": {"value": "(not kept)", "source": "--hub_token"},
        "template": {"value": "/home/me/secret/own.jinja", "source": "--template"},
        "deepspeed": {"value": "~/private/zero3.json", "source": "--deepspeed"},
        "lora_rank": {"value": 8, "source": "default"},
        "warmup_steps": {"value": 3, "source": "--warmup_steps"},
        "eval_size": {"value": 0.0, "source": "default"},
    },
    "data": {"path": "/home/me/private/talk.jsonl", "sha256": "ab12"},
    "records_read": 1200,
    "records_refused": [{"origin": "talk.jsonl:3", "reason": "empty"}],
}


@pytest.fixture
def card_of_run(models, tmp_path):
    """The card of a real run with held-out records, and the contents of its run.json."""
    data = write_jsonl(tmp_path / "talk.jsonl", [{**record, "input": str(n)} for n, record in enumerate(DIALOGUES * 4)])
    out = tmp_path / "out"
    flags = ["--max_steps", "4", "--eval_size", "4", "--save_steps", "2", "--logging_steps", "1", "--dtype", "float32"]
    words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(out)]
    assert main(["train", *words, *flags]) == 0
    return (out / "README.md").read_text(encoding="utf-8"), json.loads((out / "run.json").read_text()), out


def row(card: str, name: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_card_of_a_run_has_its_counts_settings_and_figures(card_of_run):
    card, record, out = card_of_run
    assert "More Information Needed" not in card and "Model Card for" not in card
    assert row(card, "records read") == [str(record["records_read"])] == ["32"]
    assert row(card, "tokens learned") == [f"{record['target_tokens']:,}"]
    assert row(card, "records held out, not learned") == [str(len(record["records_held_out"]))]
    assert row(card, "`max_steps`") == ["4"] and row(card, "`logging_steps`") == ["1"]
    last = record["loss_history"][-1]
    assert row(card, "training, last") == ["4", f"{last['loss']:.4f}"]
    assert row(card, "held-out records, last")[1] == f"{record['eval_loss']:.4f}"
    of_checkpoint = (out / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    assert row(of_checkpoint, "training, last")[0] == "2"


def test_the_card_contains_no_paths_and_no_record_text(card_of_run, tmp_path):
    card, _, _ = card_of_run
    assert str(tmp_path) not in card
    assert not any(record["output"] in card for record in DIALOGUES if len(record["output"]) > 2)
    card = model_card(RECORD, METADATA, [])
    assert "/home/me" not in card and "~" not in card and "Be brief." not in card and "hub_token" not in card
    assert "own.jinja" in card and "zero3.json" in card
    assert "`talk.jsonl`" in card and "`warmup_steps`" in card and "`eval_size`" not in card


def test_the_front_matter_names_base_model_and_library_for_the_hub():
    values = yaml.safe_load(model_card(RECORD, METADATA, []).split("---")[1])
    assert values["base_model"] == "maker/base-1b" and values["library_name"] == "peft"
    assert "license" not in values


def test_the_card_says_when_no_records_were_held_out():
    assert "No records were held out" in model_card(RECORD, METADATA, [{"step": 1, "loss": 2.0}])
    assert "No records were held out" not in model_card(RECORD, METADATA, [{"step": 1, "eval_loss": 2.0}])


def test_the_python_code_in_the_card_compiles():
    (code,) = re.findall(r"```python\n(.*?)```", model_card(RECORD, METADATA, []), re.DOTALL)
    compile(code, "README.md", "exec")
    assert '"<|im_end|>"' in code


def test_the_python_code_in_the_card_sets_the_template_variables():
    """Regression: the code, copied unchanged, told a model to think that was trained not to."""
    metadata = replace(METADATA, template_variables={"enable_thinking": False})
    (code,) = re.findall(r"```python\n(.*?)```", model_card(RECORD, metadata, []), re.DOTALL)
    compile(code, "README.md", "exec")
    assert "return_dict=True, **{'enable_thinking': False}" in code


def test_the_license_is_read_from_the_bases_model_card(tmp_path):
    assert licence_of(str(tmp_path)) is None
    for text, licence in (
        ("---\nlicense: apache-2.0\n---\n# Base", "apache-2.0"),
        ("# no front matter\nlicense: mit", None),
        ("---\nlicense: [a\n---", None),
        ("---\n- a list\n---", None),
        ("---\ndate: 2024-02-30\nlicense: 'mit'\n---", "mit"),  # no such day. Regression: a traceback
        ("---\nlicense: mit\nx: " + "[" * 100_000 + "\n---", "mit"),
        ("---\nmodel:\n  license: mit\n---", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(str(tmp_path)) == licence
    assert shown_base(str(tmp_path)) == tmp_path.name


def test_a_base_in_the_hub_cache_is_shown_with_its_hub_name(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de289a04d12100db370d81485cdf75e47ca"
    folder.mkdir(parents=True)
    assert hub_name(str(folder)) == shown_base(str(folder)) == "Qwen/Qwen3-0.6B"
    assert hub_name(str(tmp_path)) is None, "a folder of the user's own is on no hub"
    assert hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
