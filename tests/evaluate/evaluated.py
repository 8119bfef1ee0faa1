"""Evaluations made by the command, for the tests of its parts."""

import json

from atomtune.cli import main


def evaluate(*words: str) -> int:
    return main(["evaluate", *words, "--dtype", "float32"])


def report_in(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def trained_on_part(models, tmp_path, data, name: str, *more: str):
    flags = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(tmp_path / name)]
    assert main(["train", *flags, "--max_steps", "1", "--dtype", "float32", *more]) == 0
    return tmp_path / name
