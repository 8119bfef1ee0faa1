"""Run context: what every part of one run is handed."""

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
    """What was asked of this run, where it starts, and where it speaks and writes.

    began_with  of a resumed run: the values that the run which began took where a setting was auto
    derived     such values of this run, as its checkpoints keep them
    """

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    earlier_record: dict[str, Any]  # the run.json that lay in the output folder; empty if none
    console: Console
    record: RunRecord
    began_with: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resumed(self) -> Resumed | None:
        """The checkpoint this run goes on from, if it goes on from one."""
        return self.start if isinstance(self.start, Resumed) else None
