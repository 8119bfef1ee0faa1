"""Laws of the store: unchanged data is not encoded again, and changed data is never served from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
from tokenizers import Regex, pre_tokenizers

from atomtune.data import cache, workers
from atomtune.data.cache import Rules, as_examples, examples_of, fingerprint_of, records_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.encode import encode
from atomtune.data.ledger import Ledger
from atomtune.errors import BadData, BadSettings
from tests.conftest import DIALOGUES, write_jsonl
from tests.data.conftest import asked, entries, template_of
from tests.reading import read_values
from tests.tiny import CHATML, tokenizer_of

# --- what is served -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CHATML, None])
def test_cached_examples_and_ledger_equal_the_encoded_ones(data, tmp_path, source):
    # The oracle is encode(): no example is lost, reordered or changed in Arrow, and the ledger is complete.
    template = template_of("sentencepiece" if source is None else "bytes", source)
    ledger = Ledger()
    direct = list(encode(read_values(data), template, ledger, max_tokens=120))
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


# --- what is left behind --------------------------------------------------------------------------------------------


def test_an_interrupted_encoding_leaves_no_cache_entry(data, tmp_path):
    # Ctrl-C or a bug in the middle of the file must not leave half an entry that the next run would use.
    def interrupt(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(data, tmp_path / "cache", advance=interrupt)
    assert entries(tmp_path / "cache") == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it forks while torch has threads
def test_a_killed_encoding_leaves_nothing_that_is_served(data, tmp_path):
    # A real process and a real SIGKILL, so nothing cleans up. The next run must still read every record.
    child = os.fork()
    if not child:
        try:
            asked(data, tmp_path / "cache", advance=lambda n_bytes: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list((tmp_path / "cache").rglob("ledger.json"))
    _, ledger, _ = asked(data, tmp_path / "cache")
    assert ledger.records_read == 13


def test_a_cache_entry_is_a_single_folder(data, tmp_path):
    asked(data, tmp_path / "cache")
    asked(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["checksums.json", "examples.arrow", "ledger.json"]


def test_of_two_concurrent_runs_the_slower_uses_the_finished_entry(data, tmp_path):
    # Two processes start on the same file; here the other one finishes while ours is reading.
    cache, others = tmp_path / "cache", []

    def meanwhile(n_bytes: int) -> None:
        if not others:
            others.append(None)
            others[0] = asked(data, cache)

    examples, ledger, _ = asked(data, cache, advance=meanwhile)
    assert ledger == others[0][1]
    assert examples.to_list() == others[0][0].to_list()
    assert len(entries(cache)) == 1


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    """Replace the file by a valid Arrow file with other content."""
    datasets.Dataset.from_dict({"ids": [[1, 2]]}).save_to_disk(str(path.parent / "other"))
    path.write_bytes(next((path.parent / "other").glob("*.arrow")).read_bytes())


DAMAGES = {
    "a bit": flip,
    "no file": lambda path: path.unlink(),
    "an empty file": lambda path: path.write_bytes(b""),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another file": swap,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["examples.arrow", "ledger.json", "checksums.json"])
def test_a_damaged_cache_entry_is_rebuilt_with_a_notice(data, tmp_path, file, damage):
    # A flipped bit in an id was trained; most other damage was a traceback until the user removed the folder by hand.
    cache = tmp_path / "cache"
    examples, ledger, _ = asked(data, cache)
    rows = examples.to_list()
    (entry,) = (cache / "atomtune").iterdir()
    DAMAGES[damage](entry / file)
    again = examples_of(data, template_of(), Rules(max_tokens=120), cache_dir=cache)
    assert (again.examples.to_list(), again.ledger) == (rows, ledger)
    (note,) = again.notes
    assert "train.jsonl are built again" in note
    assert examples_of(data, template_of(), Rules(max_tokens=120), cache_dir=cache).notes == ()
    assert len(entries(cache)) == 1, "nothing is left beside it"


def test_a_cache_entry_has_the_permissions_of_the_users_umask(data, tmp_path):
    # A temporary folder is readable only by its owner, so other users could not read a shared cache.
    asked(data, tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    assert entry.stat().st_mode == (tmp_path / "plain").stat().st_mode


ASKED = """
import sys
from pathlib import Path
from atomtune.data.cache import Rules, examples_of
from atomtune.data.encoding.choose_template import load_template
from tests.tiny import CHATML, tokenizer_of

template = load_template("auto", tokenizer_of("bytes", CHATML))
print("ready", flush=True)
for cache in sys.stdin:
    read = examples_of(Path(sys.argv[1]), template, Rules(max_tokens=120), cache_dir=Path(cache.rstrip()))
    print(hash(str(read.examples.to_list())), read.ledger.records_read, flush=True)
"""


@pytest.mark.slow
def test_concurrent_processes_on_one_cache_all_read_the_same(data, tmp_path):
    # Real processes that start at the same moment. Once, one of them moved away an entry that the others were reading.
    empty, of_another_version = tmp_path / "empty", tmp_path / "of another version"
    asked(data, of_another_version)
    (entry,) = (of_another_version / "atomtune").iterdir()
    (entry / "ledger.json").write_text('{"version": 0}')
    script = [sys.executable, "-c", ASKED, str(data)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    processes = [subprocess.Popen(script, cwd=Path(__file__).parents[2], env=environment, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for folder in (empty, of_another_version):
        for process in processes:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
        outputs = [process.stdout.readline() for process in processes]
        assert outputs[0] == outputs[1] != "", [process.communicate(timeout=60) for process in processes]
        assert len(entries(folder)) == 1
        assert [path.name for path in (folder / "atomtune").iterdir() if path.name.startswith(".new-")] == []
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def test_a_cache_entry_is_synced_to_disk_before_it_is_renamed(data, tmp_path, monkeypatch):
    # Otherwise, after a power failure right after the rename, an empty file may have the entry's name.
    order = []
    real_sync, real_rename = cache.sync, Path.rename

    def sync(path):
        order.append(("sync", path.name))
        real_sync(path)

    def rename(self, goal):
        order.append(("rename", Path(goal).name))
        return real_rename(self, goal)

    monkeypatch.setattr(cache, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    asked(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    at = order.index(("rename", entry.name))
    assert {name for _, name in order[:at]} == {"examples.arrow", "ledger.json", "checksums.json", entry.name}
    assert order[at + 1 :] == [("sync", "atomtune")]


def as_another_user(work) -> str:
    """What `work` returns or raises if user 65534 runs it, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            answer = str(work())
        except Exception as error:  # noqa: BLE001  # the test shows whatever was raised
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


@pytest.fixture
def shared_folder():
    """A folder that other users can reach, unlike pytest's own."""
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it forks while torch has threads
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o755], ids=["sticky", "everybody's", "the owner's"])
@pytest.mark.parametrize("entry_is", ["whole", "damaged", "closed to others"])
def test_two_users_share_a_cache_or_get_an_error_naming_hf_datasets_cache(data, shared_folder, mode, entry_is):
    source = shared_folder / "train.jsonl"
    source.write_bytes(data.read_bytes())
    cache = shared_folder / "cache"
    rows = asked(source, cache)[0].to_list()
    (entry,) = (cache / "atomtune").iterdir()
    if entry_is == "damaged":
        flip(entry / "examples.arrow")
    if entry_is == "closed to others":
        entry.chmod(0o700)
    (cache / "atomtune").chmod(mode)

    def other_rows():
        return asked(source, cache)[0].to_list() == rows

    answer = as_another_user(other_rows)
    if mode == 0o755 and entry_is != "whole":
        assert answer.startswith("BadSettings") and "HF_DATASETS_CACHE" in answer
        return
    assert answer == "True"
    assert as_another_user(other_rows) == "True", "a second time too, from what was stored"
    assert asked(source, cache)[0].to_list() == rows, "and the first user's as well"


# --- files of a folder ------------------------------------------------------------------------------------------------


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


def test_splits_of_a_folder_that_are_not_read_are_noted_every_time(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", DIALOGUES)
    for _ in ("encoded", "served"):
        read = examples_of(folder, template_of(), Rules(max_tokens=120), cache_dir=tmp_path / "cache")
        assert read.notes == ("chats: only its split train is read, not test.",)
        assert read.ledger.records_read == len(DIALOGUES)


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


# --- files without examples -----------------------------------------------------------------------------------------


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


def test_the_error_for_an_unwritable_cache_names_hf_datasets_cache(data, tmp_path):
    # A cache that is read-only or no folder is the user's to fix, and not a bug in atomtune.
    place = tmp_path / "cache"
    place.write_text("a file")
    with pytest.raises(BadSettings, match="HF_DATASETS_CACHE"):
        asked(data, place)


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


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_a_ledger_round_trips_through_json(data):
    ledger = Ledger()
    list(encode(read_values(data), template_of(), ledger, max_tokens=120))
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_a_ledger_of_another_version_is_refused():
    values = Ledger().to_json()
    values.pop("records_cut")
    with pytest.raises(ValueError, match="another version"):
        Ledger.from_json(values)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")
def test_a_record_that_hangs_the_tokenizer_is_named(tmp_path, monkeypatch):
    # Only after a Q does the tokenizer try all ways to split a run of x, 300 times; single runs do not show it.
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(cache, "_RECORD_SECONDS", 1)
    monkeypatch.setattr(cache, "_CHARACTERS_A_SECOND", 10**9)
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
    monkeypatch.setattr(cache, "try_in_child_process", tried)
    turns = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(["user", "assistant"] * 150)]
    data = write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}])
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    done = examples_of(data, template, Rules(max_tokens=400), cache_dir=tmp_path)
    assert done.ledger.records_used == 1
    assert set(said) == {"train.jsonl:1"} and len(said) > 100


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


def test_records_missing_after_the_file_shrank_are_reported(data, tmp_path):
    # With fewer records than rows, the last rows were neither trained nor held out.
    stored = examples_of(data, template_of(), Rules(max_tokens=96), cache_dir=tmp_path / "cache").examples
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:3]), encoding="utf-8")
    records = records_of(data, Rules(max_tokens=96), stored)
    assert [next(records).origin for _ in range(3)] == stored["origin"][:3]
    with pytest.raises(BadData, match="changed while it was being read"):
        next(records)
