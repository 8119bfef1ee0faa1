"""Which adapters can be evaluated together: those of one base, however its path is written."""

import json
import shutil
from pathlib import Path

import pytest

from atomtune.console import Console
from atomtune.errors import BadSettings
from atomtune.evaluate.models import candidates_of
from atomtune.settings.command_settings import EvaluateSettings


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_adapters_of_one_base_are_evaluated_together_and_those_of_several_are_refused(by_heart, tmp_path):
    # Regression: two runs of which one had named its base by a relative path were refused.
    first, second = (Path(shutil.copytree(by_heart, tmp_path / name)) for name in ("polite", "terse"))
    base = json.loads((first / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    (tmp_path / "same").symlink_to(Path(base).resolve())
    edit(second / "adapter_config.json", base_model_name_or_path=str(tmp_path / "same"))
    settings = EvaluateSettings(adapter_path=[str(first), str(second)], dataset_path=["records.jsonl"])
    candidates = candidates_of(settings, Console())
    assert candidates.base_path == base
    assert [subject.name for subject in candidates.subjects] == ["base", "polite", "terse"]
    edit(second / "atomtune.json", base="another fingerprint")
    with pytest.raises(BadSettings, match=r"These adapters name different bases: .*same"):
        candidates_of(settings, Console())
