"""Laws of LLaMA-Factory's dataset_info.json: a folder with one is read according to it."""

import json
from pathlib import Path

import pytest

from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.reading.dataset_info import ListedFile, listed_files
from atomtune.data.reading.sources import notes_on, size_of
from atomtune.data.records import Record
from atomtune.errors import BadData
from tests.tiny import CHATML, tokenizer_of

RULES = Rules(max_tokens=1000)


def folder_of(tmp_path: Path, info: object, **files: object) -> Path:
    folder = tmp_path / "data"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def read(source: Path, cache: Path) -> list[Record]:
    encoded = examples_of(source, load_template("auto", tokenizer_of("bytes", CHATML)), RULES, cache_dir=cache)
    assert encoded.ledger.records_refused == []
    return list(records_of(source, RULES, encoded.examples))


ALPACA = [{"instruction": "早", "input": "", "output": "早上好"}]
TALK = [{"talk": [{"who": "me", "says": "晚"}, {"who": "it", "says": "晚安"}], "persona": "温和"}]
TALK_INFO = {
    "file_name": "chats.json",
    "formatting": "sharegpt",
    "columns": {"messages": "talk", "system": "persona"},
    "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
}


@pytest.mark.parametrize("source", ["", "dataset_info.json"])
def test_listed_files_are_read_with_their_columns_and_tags(tmp_path, source):
    info = {"mine": {"file_name": "mine.json"}, "chats": TALK_INFO, "far": {"hf_hub_url": "owner/name"}}
    folder = folder_of(tmp_path, info, mine=ALPACA, chats=TALK, unlisted=[{"x": 1}])
    records = read(folder / source, tmp_path / "cache")
    assert [[turn.text for turn in record.turns] for record in records] == [["早", "早上好"], ["温和", "晚", "晚安"]]
    assert records[0].origin == "data/mine.json:1"
    assert size_of(folder / source) == sum((folder / name).stat().st_size for name in ("mine.json", "chats.json"))


def test_columns_of_an_alpaca_file_are_renamed_as_listed(tmp_path):
    columns = {"prompt": "q", "query": "more", "response": "a"}
    folder = folder_of(
        tmp_path, {"x": {"file_name": "x.json", "columns": columns}}, x=[{"q": "译", "more": "早", "a": "Morning"}]
    )
    ((question, answer),) = [record.turns for record in read(folder, tmp_path / "cache")]
    assert (question.text, question.input, answer.text) == ("译", "早", "Morning")


def test_the_users_keys_and_format_take_precedence_over_those_listed(tmp_path):
    columns = {"prompt": "q", "response": "a"}
    values = [{"q": "译", "a": "Morning", "text": "早"}]
    folder = folder_of(tmp_path, {"x": {"file_name": "x.json", "columns": columns}}, x=values)
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    for changed, texts in (
        ({"keys": (("q", "output"), ("a", "instruction"))}, ["Morning", "译"]),
        ({"format": "text"}, ["早"]),
    ):
        rules = Rules(max_tokens=1000, **changed)
        encoded = examples_of(folder, template, rules, cache_dir=tmp_path / "cache")
        (record,) = records_of(folder, rules, encoded.examples)
        assert [turn.text for turn in record.turns] == texts


def test_a_column_of_media_under_a_name_of_its_own_refuses_the_records_that_have_any(tmp_path):
    info = {**TALK_INFO, "columns": {**TALK_INFO["columns"], "images": "pictures"}}
    chats = [{**TALK[0], "pictures": []}, {**TALK[0], "pictures": ["cat.png"]}]
    folder = folder_of(tmp_path, {"chats": info}, chats=chats)
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    ledger = examples_of(folder, template, RULES, cache_dir=tmp_path / "cache").ledger
    assert ledger.records_used == 1
    assert [refusal.reason for refusal in ledger.records_refused] == [
        'key "images" holds media; only text can be trained on'
    ]


def test_pairs_learn_the_chosen_answer(tmp_path):
    pair = {
        "conversations": [{"from": "human", "value": "早"}],
        "good": {"from": "gpt", "value": "早上好"},
        "bad": {"from": "gpt", "value": "滚"},
    }
    columns = {"messages": "conversations", "chosen": "good", "rejected": "bad"}
    info = {"x": {"file_name": "x.json", "formatting": "sharegpt", "ranking": True, "columns": columns}}
    (record,) = read(folder_of(tmp_path, info, x=[pair]), tmp_path / "cache")
    assert [turn.text for turn in record.turns] == ["早", "早上好"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"file_name": "no.json"}, "is not there"),
        ({"file_name": "../secret.json"}, "is not in this folder"),
        ({"file_name": "/etc/hostname"}, "is not in this folder"),
        # The folder's hash leaves hidden files out, so the cache would serve its examples after a change.
        ({"file_name": ".raw/x.json"}, "is hidden"),
        ({"file_name": "x\0.json"}, "is not there"),
        ({"file_name": "x\ud800.json"}, "is not there"),
        ({"file_name": 7}, "it names no file in this folder"),
        ({"file_name": "x.json", "formatting": "parrot"}, "expected one of alpaca, sharegpt, openai"),
        ({"file_name": "x.json", "formatting": ["alpaca"]}, "expected one of alpaca, sharegpt, openai"),
    ],
)
def test_an_invalid_entry_is_refused_with_the_reason(tmp_path, entry, why):
    (tmp_path / "secret.json").write_text("[]")
    folder = folder_of(tmp_path, {"x": entry}, x=ALPACA)
    (folder / ".raw").mkdir()
    (folder / ".raw" / "x.json").write_text("[]")
    with pytest.raises(BadData, match=why):
        listed_files(folder)


@pytest.mark.parametrize("info", [{}, [], 3, {"features": {"a": {"dtype": "string"}}, "citation": ""}, {"zh": {}}])
def test_a_dataset_info_written_by_the_datasets_library_is_ignored(tmp_path, info):
    assert listed_files(folder_of(tmp_path, info, x=ALPACA)) is None


def test_what_is_not_listed_and_entries_without_a_file_are_noted(tmp_path):
    info = {"mine": {"file_name": "mine.json"}, "far": {"hf_hub_url": "owner/far"}, "odd": {"file_name": ["a.json"]}}
    folder = folder_of(tmp_path, info, mine=ALPACA, forgotten=ALPACA)
    (folder / "notes.txt").write_text("not records")
    assert notes_on(folder, "data") == [
        "data: data files that dataset_info.json does not list are not read: 1, first forgotten.json.",
        "data: entries of dataset_info.json that name no file here, such as data sets on a hub, are not read: 2, first "
        "far. Pass the hub's name of such a data set with --dataset_path.",
    ]
    assert notes_on(folder_of(tmp_path / "all", {"mine": {"file_name": "mine.json"}}, mine=ALPACA), "data") == []


def test_a_dataset_info_that_is_not_json_is_reported(tmp_path):
    for text in ("{", "[" * 100_000):
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(BadData, match=r"dataset_info\.json: cannot be read"):
            listed_files(tmp_path)


def test_every_role_is_mapped_and_a_column_without_a_name_is_not(tmp_path):
    tags = {f"{role}_tag": role[0] for role in ("user", "assistant", "observation", "function", "system")}
    entry = {"file_name": "x.json", "formatting": "sharegpt", "columns": {"system": None, "tools": 3}, "tags": tags}
    (file,) = listed_files(folder_of(tmp_path, {"x": entry}, x=[]))
    assert file.keys == {}
    assert file.roles == {"u": "user", "a": "assistant", "o": "tool", "f": "function_call", "s": "system"}


def test_columns_and_tags_with_default_names_are_not_mapped(tmp_path):
    entry = {
        "file_name": "x.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    }
    folder = folder_of(tmp_path, {"x": entry}, x=[])
    assert listed_files(folder) == [ListedFile(folder / "x.json", "sharegpt", {}, {})]
