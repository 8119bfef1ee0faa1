"""Run context: the values that all parts of one run share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from atomtune.console import Console
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.checkpoint.start import Resumed, Start
from atomtune.train.run_report import RunRecord


@dataclass(frozen=True)
class RunContext:
    """A run's settings, how it starts, its console and its record.

    began_with  for a resumed run: values that the original run chose for settings on auto
    derived     such values of this run, as its checkpoints store them
    """

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    earlier_record: dict[str, Any]  # run.json found in the output folder; empty if there was none
    console: Console
    record: RunRecord
    began_with: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resumed(self) -> Resumed | None:
        """The checkpoint from which this run resumes, or None."""
        return self.start if isinstance(self.start, Resumed) else None
