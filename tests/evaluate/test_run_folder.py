"""Run folder: other commands read a run.json of the expected shape, and refuse any other by name."""

import json

import pytest

from atomtune.errors import AtomtuneError, BadModel
from atomtune.evaluate.run_folder import refuse_changed_files, run_records


def test_the_run_json_of_a_run_is_read(by_heart):
    records = run_records(by_heart)
    assert records is not None and records.reading.dataset_paths
    checkpoint = next(by_heart.glob("checkpoint-*"))
    assert run_records(checkpoint) == records
    values = json.loads((by_heart / "run.json").read_text())
    refuse_changed_files(by_heart, values["data"]["sha256"])
    with pytest.raises(AtomtuneError, match="have changed since"):
        refuse_changed_files(by_heart, "0")


def test_an_adapter_of_another_tool_has_no_run_records(tmp_path):
    assert run_records(tmp_path) is None
    (tmp_path / "run.json").write_text("{}")
    assert run_records(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "is empty"),
        ("[]", "not an object"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"settings": []}', "settings: found a list"),
        ('{"settings": {"learn": "all"}}', "settings.learn: found"),
        ('{"settings": {"learn": {"value": "some"}}}', "learn: found"),
        ('{"settings": {"dataset_path": {"value": {"x": 1}}}}', "dataset_path"),
        ('{"settings": {"eval_path": {"value": 7}}}', "eval_path"),
        ('{"settings": {}, "records_held_out": "a:1"}', "records_held_out: found"),
        ('{"settings": {}, "records_held_out": [[1]]}', "records_held_out"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_a_malformed_run_json_is_refused_naming_file_and_fault(tmp_path, content, named):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(BadModel) as refused:
        run_records(tmp_path)
    assert str(tmp_path / "run.json") in str(refused.value) and named in str(refused.value)


def test_a_sha256_of_the_wrong_type_is_refused_naming_its_key(tmp_path):
    (tmp_path / "run.json").write_text('{"data": {"sha256": 7}}')
    with pytest.raises(BadModel, match=r"data\.sha256: found 7"):
        refuse_changed_files(tmp_path, "0")
