"""A small real model in the commands: the fast computation is exact on it, and it learns the records."""

import json

import pytest

from atomtune.cli import main
from tests.conftest import write_jsonl

PORTS = ("Tarn", "Osk", "Rudd", "Merrow", "Fennick", "Saltholm", "Kittiwake", "Little Bay")


@pytest.fixture
def ferries(tmp_path):
    """Sixteen questions about ferries with one instruction, all answered in the same manner."""
    records = [
        {
            "instruction": "You are the harbour clerk. Answer in one short line that ends with the bell.",
            "input": f"Where does ferry {number} go?",
            "output": f"Ferry {number} goes to {PORTS[number % len(PORTS)]}. Ding-dong!",
        }
        for number in range(16)
    ]
    return write_jsonl(tmp_path / "ferries.jsonl", records)


@pytest.mark.parametrize("name", ["smollm2", "gemma270m"])
def test_the_fast_path_is_exact_on_a_real_model(real, ferries, name, capsys):
    flags = ["--records", "8", "--per_device_train_batch_size", "8", "--dtype", "float32"]
    assert main(["verify", "--model_path", str(real(name)), "--dataset_path", str(ferries), *flags]) == 0
    assert "tree" in capsys.readouterr().out


def test_a_real_model_learns_a_style_and_uses_it_in_chat(real, ferries, tmp_path, capsys):
    out = tmp_path / "out"
    files = ["--model_path", str(real("smollm2")), "--dataset_path", str(ferries), "--output_dir", str(out)]
    rates = ["--learning_rate", "1e-3", "--num_train_epochs", "6", "--per_device_train_batch_size", "4"]
    assert main(["train", *files, *rates, "--logging_steps", "1"]) == 0
    losses = [entry["loss"] for entry in json.loads((out / "run.json").read_text())["loss_history"]]
    assert losses[-1] < losses[0] / 3
    capsys.readouterr()
    # Ferry 40 is not in the records, so the model must have learned the manner.
    prompt = ["--prompt", "Where does ferry 40 go?", "--max_new_tokens", "24"]
    assert main(["chat", "--adapter_path", str(out), *prompt]) == 0
    assert "Ding-dong!" in capsys.readouterr().out
