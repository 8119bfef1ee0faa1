"""Spelled: settings written as a command line again are read by another command as the same settings."""

from dataclasses import fields

import pytest

from atomtune.settings.command_settings import InspectSettings, VerifySettings
from atomtune.settings.read import read_settings, read_train
from atomtune.settings.run_settings import LoraSettings, ModelSettings, RecordSettings, TokenizerSettings
from atomtune.settings.spelled import words_of

NAMED = ["--dataset_path", "a b.jsonl", "c.jsonl", "--model_path", "base"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--keys", "question=instruction", "answer=output", "--skip_bad", "--max_seq_length", "512"],
        ["--chat_template_kwargs", '{"enable_thinking": false}', "--learn", "last", "--trust_remote_code"],
    ],
    ids=str,
)
def test_inspect_settings_spelled_as_flags_are_read_back_by_train(words):
    settings = read_settings(InspectSettings, [*NAMED, *words, "--samples", "5", "--seed", "3"], command="inspect")
    spelled = words_of(settings, TokenizerSettings, RecordSettings)
    train = read_train(spelled)
    assert all(getattr(train.data, field.name) == getattr(settings, field.name) for field in fields(RecordSettings))
    assert train.model.model_path == "base" and train.model.trust_remote_code == settings.trust_remote_code
    assert len(spelled) == len(NAMED) + len(words), "defaults are left out"


def test_verify_settings_spelled_as_flags_are_read_back_by_train():
    words = ["--layout", "packed", "--dtype", "float32", "--lora_rank", "4", "--lora_targets", "q_proj", "v_proj"]
    settings = read_settings(VerifySettings, [*NAMED, *words, "--lora_dropout", "0"], command="verify")
    train = read_train(words_of(settings, ModelSettings, RecordSettings, LoraSettings))
    for group, own in ((LoraSettings, train.lora), (ModelSettings, train.model), (RecordSettings, train.data)):
        assert all(getattr(own, field.name) == getattr(settings, field.name) for field in fields(group))
