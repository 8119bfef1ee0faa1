"""A source is encoded file by file, each in its own format, under limits; its records can be read again."""

import json
import sys

import pytest
from tokenizers import Regex, pre_tokenizers

from atomtune.data import encoded_source, workers
from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.errors import BadData
from tests.conftest import DIALOGUES, write_jsonl
from tests.data.conftest import asked, template_of
from tests.tiny import CHATML, tokenizer_of


def test_each_file_of_a_folder_has_its_own_format(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"instruction": "早", "output": "早上好"}])
    write_jsonl(
        folder / "b.jsonl", [{"messages": [{"role": "user", "content": "晚"}, {"role": "assistant", "content": "安"}]}]
    )
    examples, ledger, _ = asked(folder, tmp_path / "cache")
    assert (ledger.records_used, ledger.records_refused) == (2, [])
    assert ledger.format == "alpaca, messages"
    assert examples["origin"][:] == ["mixed/a.jsonl:1", "mixed/b.jsonl:1"]
    answers = [record.answer for record in records_of(folder, Rules(max_tokens=120), examples)]
    assert answers == ["早上好", "安"]


@pytest.mark.parametrize(
    "first", [b'{"a": "' + b"1" * 5_000_000, b"{" * 400_000, b"\n" * 400_000], ids=["long", "broken", "blank"]
)
def test_the_format_is_detected_from_the_first_readable_line_however_far_it_is(tmp_path, first):
    # The format was detected from the first 256 KB, and without a value there, every chat was refused as alpaca.
    said = [{"role": "user", "content": "晚"}, {"role": "assistant", "content": "安"}]
    data = tmp_path / "train.jsonl"
    data.write_bytes(b"\n" * 5 + first + b"\n" + json.dumps({"messages": said}).encode() + b"\n")
    examples, ledger, _ = asked(data, tmp_path / "cache")
    assert (ledger.format, ledger.records_used) == ("messages", 1)
    bad = ["train.jsonl:6"] if first.strip() else []
    assert [refusal.origin for refusal in ledger.records_refused] == bad
    assert [record.answer for record in records_of(data, Rules(max_tokens=120), examples)] == ["安"]


def test_files_with_the_same_name_have_distinct_origins(data, tmp_path):
    for name in ("a/train.jsonl", "b/train.jsonl"):
        encoded = examples_of(data, template_of(), Rules(max_tokens=120), name=name, cache_dir=tmp_path / "cache")
        assert all(origin.startswith(f"{name}:") for origin in encoded.examples["origin"][:])
        assert all(refusal.origin.startswith(f"{name}:") for refusal in encoded.ledger.records_refused)
        records = list(records_of(data, Rules(max_tokens=120), encoded.examples, name=name))
        assert [record.origin for record in records] == encoded.examples["origin"][:]


def test_rows_of_a_one_line_array_map_to_their_own_records(tmp_path):
    # Catches values that share an origin: in splits and in inspect, a refused record's text appeared for the next one.
    answers = ["word " * 400, "first", "second", "word " * 400, "third"]
    data = tmp_path / "train.json"
    data.write_text(json.dumps([{"instruction": "Hi", "output": answer} for answer in answers]))
    examples, ledger, _ = asked(data, tmp_path / "cache")
    assert len(examples) == 3
    assert len(ledger.records_refused) == 2
    records = list(records_of(data, Rules(max_tokens=120), examples))
    assert [record.answer for record in records] == ["first", "second", "third"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")
def test_a_record_that_hangs_the_tokenizer_is_named(tmp_path, monkeypatch):
    # Only after a Q does the tokenizer try all ways to split a run of x, 300 times; single runs do not show it.
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(encoded_source, "_RECORD_SECONDS", 1)
    monkeypatch.setattr(encoded_source, "_CHARACTERS_A_SECOND", 10**9)
    tokenizer = tokenizer_of("bytes", CHATML)
    split = pre_tokenizers.Split(Regex("Qx*x*y"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
    endless = {"instruction": ("Q" + 4000 * "x") * 300 + " y", "output": "a"}
    data = write_jsonl(tmp_path / "train.jsonl", [*DIALOGUES, endless, *DIALOGUES])
    with pytest.raises(BadData) as told:
        examples_of(data, load_template("auto", tokenizer), Rules(max_tokens=120), cache_dir=tmp_path)
    assert str(told.value).startswith(
        f"train.jsonl:{len(DIALOGUES) + 1}: encoding this record did not finish within 1 sec"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")
def test_the_time_limit_applies_to_each_answer_of_a_long_conversation(tmp_path, monkeypatch):
    # Each answer gets its own shortened prompt: 4,000 turns took longer than the limit for one record.
    said: list[str] = []

    def tried(work, **limits):
        work(said.append)

    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.001)
    monkeypatch.setattr(encoded_source, "try_in_child_process", tried)
    turns = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(["user", "assistant"] * 150)]
    data = write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}])
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    done = examples_of(data, template, Rules(max_tokens=400), cache_dir=tmp_path)
    assert done.ledger.records_used == 1
    assert set(said) == {"train.jsonl:1"} and len(said) > 100


def test_records_missing_after_the_file_shrank_are_reported(data, tmp_path):
    # With fewer records than rows, the last rows were neither trained nor held out.
    stored = examples_of(data, template_of(), Rules(max_tokens=96), cache_dir=tmp_path / "cache").examples
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:3]), encoding="utf-8")
    records = records_of(data, Rules(max_tokens=96), stored)
    assert [next(records).origin for _ in range(3)] == stored["origin"][:3]
    with pytest.raises(BadData, match="changed while it was being read"):
        next(records)
