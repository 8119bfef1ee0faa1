"""Job: what every part of one run shares."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from atomtune.console import Console
from atomtune.settings.fields import TrainSettings
from atomtune.train.checkpoint.start import Start
from atomtune.train.run_report import RunRecord


@dataclass(frozen=True)
class Job:
    """What every part of one run shares: what was asked, where it starts, and where it speaks and writes."""

    settings: TrainSettings
    args: TrainingArguments
    start: Start
    before: dict[str, Any]  # the run.json that was here, if any
    console: Console
    record: RunRecord
