"""Laws of the store: unchanged data is not encoded again, and changed data is never served from it."""

import hashlib
import os

import pytest

from atomtune.data.cache import examples_of, fingerprint_of
from atomtune.data.encoded_source import Rules
from atomtune.data.example_table import as_examples
from atomtune.data.ledger import Ledger
from atomtune.errors import BadData
from tests.conftest import DIALOGUES, write_jsonl
from tests.data.conftest import asked, entries, template_of
from tests.reading import encode, read_values
from tests.tiny import CHATML


@pytest.mark.parametrize("source", [CHATML, None])
def test_cached_examples_and_ledger_equal_the_encoded_ones(data, tmp_path, source):
    # The oracle is encode(): no example is lost, reordered or changed in Arrow, and the ledger is complete.
    template = template_of("sentencepiece" if source is None else "bytes", source)
    ledger = Ledger()
    direct = encode(read_values(data), template, ledger, max_tokens=120)
    for _ in ("encoded", "served"):
        examples, told, _ = asked(data, tmp_path / "cache", template=template)
        assert [as_examples(row) for row in examples] == direct
        assert told == ledger
    assert ledger.records_cut and ledger.control_origins and len(ledger.broken) == 2  # not an empty comparison


def test_notices_are_repeated_for_a_cached_file(tmp_path):
    # Notices about accepted records are repeated for a file that comes from the store.
    records = [{"instrution": "typo", "output": "read"}, *({"instruction": "Hi", "output": "Hi", "id": 7},) * 2]
    data = write_jsonl(tmp_path / "train.jsonl", records)
    for _ in ("encoded", "served"):
        _, ledger, _ = asked(data, tmp_path / "cache")
        assert sorted(ledger.notices.values()) == [1, 2]
        assert {type(notice) for notice in ledger.notices} == {str}


def test_a_second_request_is_served_without_encoding(data, tmp_path, no_encoding):
    first, ledger, data_hash = asked(data, tmp_path / "cache")
    no_encoding()
    again, same_ledger, same_hash = asked(data, tmp_path / "cache")
    assert (same_ledger, same_hash) == (ledger, data_hash)
    assert again.to_list() == first.to_list()


def test_a_file_with_only_a_new_modification_time_is_served_from_the_cache(data, tmp_path, no_encoding):
    asked(data, tmp_path / "cache")
    os.utime(data, (1, 1))
    no_encoding()
    asked(data, tmp_path / "cache")


def test_the_length_of_each_example_is_stored_for_sampling_by_length(data, tmp_path):
    examples, _, _ = asked(data, tmp_path / "cache")
    assert examples["length"][:] == [len(ids) for ids in examples["ids"]]


def test_the_returned_hash_is_the_sha256_of_the_file(data, tmp_path):
    assert asked(data, tmp_path / "cache")[2] == fingerprint_of(data)
    assert fingerprint_of(data) == hashlib.sha256(data.read_bytes()).hexdigest()


def test_splits_of_a_folder_that_are_not_read_are_noted_every_time(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", DIALOGUES)
    for _ in ("encoded", "served"):
        read = examples_of(folder, template_of(), Rules(max_tokens=120), cache_dir=tmp_path / "cache")
        assert read.notes == ("chats: only its split train is read, not test.",)
        assert read.ledger.records_read == len(DIALOGUES)


def test_a_file_with_only_refused_records_gives_a_ledger_and_no_examples(tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{"instruction": "Hi", "output": ""}, {"prompt": "Hi"}])
    for _ in ("encoded", "served"):
        examples, ledger, _ = asked(data, tmp_path / "cache")
        assert len(examples) == 0
        assert examples.column_names == ["ids", "learn", "ends", "origin", "length", "digest"]
        assert [refusal.origin for refusal in ledger.records_refused] == ["train.jsonl:1", "train.jsonl:2"]


@pytest.mark.parametrize("content", ["\n" * 5000, "[]", "[\n]\n"])
def test_a_file_without_records_is_refused_and_not_cached(tmp_path, content):
    data = tmp_path / "train.jsonl"
    data.write_text(content)
    with pytest.raises(BadData, match=r"train\.jsonl: it holds no records"):
        asked(data, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_path_without_a_data_file_is_refused(tmp_path, name):
    with pytest.raises(BadData, match=r"no such file|without data files"):
        asked(tmp_path / name, tmp_path / "cache")


def test_progress_of_a_cached_file_adds_up_to_its_size(data, tmp_path):
    # The bar reaches 100% either way.
    for _ in ("encoded", "served"):
        seen: list[int] = []
        asked(data, tmp_path / "cache", advance=seen.append)
        assert sum(seen) == data.stat().st_size


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_cached(data, tmp_path):
    # Once it was: after the file was restored, the store served records that it never had.
    before = data.stat().st_size

    def grow(n_bytes: int) -> None:
        # The file grows faster than it is read, and reading once never ended.
        assert data.stat().st_size < 100 * before
        with data.open("a") as file:
            file.write('{"instruction": "one", "output": "more"}\n' * (1 + n_bytes // 40))

    with pytest.raises(BadData, match=r"train\.jsonl changed while it was being read"):
        examples_of(data, template_of(), Rules(max_tokens=96), cache_dir=tmp_path / "cache", advance=grow)
    assert list((tmp_path / "cache" / "atomtune").iterdir()) == []
