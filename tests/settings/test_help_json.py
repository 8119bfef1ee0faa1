"""Help as JSON: --help as data; the values that it says a setting accepts are those that are accepted."""

import json

import pytest

from atomtune.cli import COMMANDS, main
from atomtune.errors import BadSettings, ExitCode
from atomtune.settings.help import help_text
from atomtune.settings.help_json import command_values, overview_values
from atomtune.settings.read import GROUPS, read
from tools import skill

EVERYTHING = overview_values({name: command.summary for name, command in COMMANDS.items()}, GROUPS)
#: Arguments that a command requires before it checks another setting.
NEEDED = {
    "merge": ["--adapter_path", "a", "--output_dir", "b"],
    "export": ["--adapter_path", "a", "--output_dir", "b"],
    **{command: ["--adapter_path", "a"] for command in ("chat", "certify", "serve", "web")},
    **{command: ["--model_path", "a", "--dataset_path", "b"] for command in ("train", "plan", "sweep")},
}
WITH_RANGE = [
    (command, setting["name"])
    for command, values in EVERYTHING["commands"].items()
    for setting in values["settings"]
    if setting["range"]
]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_json_has_exactly_the_settings_of_the_full_help_page(command):
    page = help_text(command, COMMANDS[command].summary, GROUPS[command], everything=True)
    shown = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    values = command_values(command, COMMANDS[command].summary, GROUPS[command])
    assert sorted(setting["flag"] for setting in values["settings"]) == sorted(shown)
    assert all(f"  {example}\n" in page for example in values["examples"])


@pytest.mark.parametrize(("command", "name"), WITH_RANGE)
def test_a_number_out_of_range_is_refused_with_the_documented_expectation(command, name):
    setting = next(s for s in EVERYTHING["commands"][command]["settings"] if s["name"] == name)
    limits = setting["range"]
    beyond = [limits[word] - 1 for word in ("at_least",) if word in limits]
    beyond += [limits[word] for word in ("more_than", "below") if word in limits]
    beyond += [limits[word] + 1 for word in ("at_most",) if word in limits]
    for value in beyond:
        with pytest.raises(BadSettings) as refused:
            read(command, [*NEEDED.get(command, []), setting["flag"], f"{value}"])
        assert setting["expected"] in str(refused.value)


def test_every_default_is_a_valid_value_of_its_setting():
    for command, values in EVERYTHING["commands"].items():
        for setting in values["settings"]:
            if setting["section"] == "transformers.Trainer" or setting["default"] in (None, []):
                continue
            assert not setting["choices"] or str(setting["default"]).lower() in setting["choices"], setting
            kinds = {"int": int, "float": int | float, "bool": bool, "text": str, "list": list}
            allowed = tuple(kinds[kind] for kind in setting["type"].split("|"))
            assert any(isinstance(setting["default"], kind) for kind in allowed), (command, setting)


def test_the_command_prints_one_object_and_nothing_else(capsys):
    assert main(["--help", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(EVERYTHING))
    assert main(["merge", "--help", "json"]) == 0
    merge = json.loads(capsys.readouterr().out)
    assert {setting["name"] for setting in merge["settings"] if setting["required"]} == {"adapter_path", "output_dir"}
    assert merge["exit_codes"].keys() == {str(int(code)) for code in ExitCode}


def test_settings_that_count_something_name_their_unit():
    settings = {s["name"]: s["unit"] for values in EVERYTHING["commands"].values() for s in values["settings"]}
    assert settings["max_seq_length"] == "tokens" and settings["max_minutes"] == "minutes"
    assert settings["per_device_train_batch_size"] == "records" and settings["max_steps"] == "steps"


def test_the_page_for_coding_agents_is_up_to_date():
    assert skill.FILE.read_text(encoding="utf-8") == skill.written(), "run `python -m tools.skill`"
