"""Train settings: everything a run was told, and where each value was set; what a plan and a sweep were told about it.

The groups hold a value of each field in `fields.py`; what the library takes is in `trainer`, under its own names.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic.dataclasses import dataclass

from atomtune.settings.entry import DEFAULT, FOUND
from atomtune.settings.fields import DataSettings, LoraSettings, ModelSettings, RunSettings, is_secret


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything `atomtune train` was told: its own groups, the Trainer's values, and where each was set."""

    data: DataSettings
    model: ModelSettings
    lora: LoraSettings
    run: RunSettings
    trainer: dict[str, Any]
    origins: dict[str, str]  # setting → `--lora_rank`, `run.yaml:3`, `atomtune's default`
    demo: bool
    argv: tuple[str, ...] | None = None  # the words behind `atomtune train`; None where a function was called
    json: bool = False

    def with_derived(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> "TrainSettings":
        """These settings with values for those that were left to the run, and why each is so."""
        of_data = {field.name for field in fields(DataSettings)} & values.keys()
        data = replace(self.data, **{name: values[name] for name in of_data})
        trainer = {**self.trainer, **{name: value for name, value in values.items() if name not in of_data}}
        origins = dict(self.origins)
        for name in values:
            origins.setdefault(name, f"{FOUND}: {reasons[name]}" if name in reasons else FOUND)
        return replace(self, data=data, trainer=trainer, origins=origins)

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Each setting of our own and each that the Trainer gets, with its origin; secrets left out."""
        values: dict[str, Any] = {}
        for group in (self.data, self.model, self.lora, self.run):
            values |= {field.name: getattr(group, field.name) for field in fields(group)}
        values |= self.trainer
        resolved = {}
        for name, value in values.items():
            shown = "(not kept)" if is_secret(name) and value else value
            resolved[name] = {"value": shown, "source": self.origins.get(name, DEFAULT)}
        return resolved


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The settings of a run that is only planned."""

    train: TrainSettings
    json: bool


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Trials of one run's settings.

    train   the run as it is without --try
    shared  what the user wrote for every trial, as written: setting → value
    tried   setting → the values to try, or one range `LOW:HIGH`
    """

    train: TrainSettings
    shared: Mapping[str, Any]
    tried: Mapping[str, tuple[str, ...]]
    trials: int
    json: bool
