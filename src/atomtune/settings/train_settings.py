"""Train settings: all settings of a run and where each was set, and those of a plan and of a sweep.

The groups are classes of run_settings.py. The settings of the library's Trainer are in `trainer`, under its own names.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic.dataclasses import dataclass

from atomtune.settings.declare import is_secret
from atomtune.settings.entry import DEFAULT, FOUND
from atomtune.settings.run_settings import DataSettings, LoraSettings, ModelSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All settings of `atomtune train`: its own groups, the Trainer's values, and where each was set."""

    data: DataSettings
    model: ModelSettings
    lora: LoraSettings
    run: RunSettings
    trainer: dict[str, Any]
    origins: dict[str, str]  # setting → where it was set: `--lora_rank`, `run.yaml:3`, `atomtune's default`
    demo: bool
    argv: tuple[str, ...] | None = None  # the words after `atomtune train`; None if a function was called
    json: bool = False

    def with_derived(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> "TrainSettings":
        """These settings with values for those on auto, and the reasons for them."""
        of_data = {field.name for field in fields(DataSettings)} & values.keys()
        data = replace(self.data, **{name: values[name] for name in of_data})
        trainer = {**self.trainer, **{name: value for name, value in values.items() if name not in of_data}}
        origins = dict(self.origins)
        for name in values:
            origins.setdefault(name, f"{FOUND}: {reasons[name]}" if name in reasons else FOUND)
        return replace(self, data=data, trainer=trainer, origins=origins)

    def resolved(self) -> dict[str, dict[str, Any]]:
        """name → value and origin, of our own settings and of those for the Trainer; secrets are replaced."""
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
    """The trials of a sweep.

    train   the run without --try
    shared  settings that the user wrote for all trials: setting → value as written
    tried   setting → the values to try, or one range `LOW:HIGH`
    """

    train: TrainSettings
    shared: Mapping[str, Any]
    tried: Mapping[str, tuple[str, ...]]
    trials: int
    json: bool
