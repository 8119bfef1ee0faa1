"""Settings file: train reads exactly the values that were written, whatever their characters."""

import pytest

from atomtune.settings.read import read_train
from atomtune.sweep.settings_file import write_settings

RUN = {"model_path": "base", "dataset_path": "train.jsonl"}
VALUES = ["run", "true", "007", "1e-4", "a b", "a: b", "# no", "null", "~", "'", '"quoted"', "灯 塔", "-1", "C:\\d"]


@pytest.mark.parametrize("value", VALUES)
def test_a_text_comes_back_as_it_was(value, tmp_path):
    file = tmp_path / "run.yaml"
    write_settings(file, {**RUN, "run_name": value, "keys": [f"{value}x=output", "b=c"]}, comment="a comment")
    read = read_train([str(file)])
    assert read.trainer["run_name"] == value
    assert read.data.keys == [f"{value}x=output", "b=c"]


def test_numbers_and_switches_come_back_as_they_were(tmp_path):
    file = tmp_path / "run.yaml"
    paths = ["a.jsonl", "b c.jsonl"]
    settings = {**RUN, "dataset_path": paths, "learning_rate": "3e-4", "skip_bad": "true"}
    write_settings(file, settings, comment="a comment")
    read = read_train([str(file)])
    assert (read.trainer["learning_rate"], read.data.skip_bad) == (3e-4, True)
    assert read.data.dataset_paths == paths
