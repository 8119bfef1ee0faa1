"""Run context: what every part of one run is handed."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from atomtune.console import Console
from atomtune.settings.fields import TrainSettings
from atomtune.train.checkpoint.start import Resumed, Start
from atomtune.train.run_report import RunRecord


@dataclass(frozen=True)
class RunContext:
    """What was asked of this run, where it starts, and where it speaks and writes."""

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    earlier_record: dict[str, Any]  # the run.json that lay in the output folder; empty if none
    console: Console
    record: RunRecord

    @property
    def resumed(self) -> Resumed | None:
        """The checkpoint this run goes on from, if it goes on from one."""
        return self.start if isinstance(self.start, Resumed) else None
