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

    derived         values that this run chose for settings on auto, as its checkpoints store them
    derived_before  for a resumed run: those of the original run
    """

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    earlier_record: dict[str, Any]  # run.json found in the output folder; empty if there was none
    console: Console
    record: RunRecord
    derived_before: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resumed(self) -> Resumed | None:
        """The checkpoint from which this run resumes, or None."""
        return self.start if isinstance(self.start, Resumed) else None
