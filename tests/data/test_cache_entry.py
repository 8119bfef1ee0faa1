"""Laws of a cache entry: complete or not there, for all processes and users that share the cache."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pytest

from atomtune.data import cache_entry
from atomtune.data.cache import examples_of
from atomtune.data.cache_entry import entry_problem
from atomtune.data.encoded_source import Rules
from atomtune.disk import disk_failed
from atomtune.errors import BadSettings
from tests.data.conftest import asked, entries, template_of


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


def test_folders_left_by_killed_processes_are_removed_after_a_day(data, tmp_path):
    cache = tmp_path / "cache" / "atomtune"
    for name in (".new-old", ".new-young"):
        (cache / name / "entry").mkdir(parents=True)
    for name, hours in ((".new-old", 25), (".new-young", 23)):
        left = time.time() - 3600 * hours
        os.utime(cache / name, (left, left))
    asked(data, tmp_path / "cache")
    assert entries(tmp_path / "cache")[:-1] == [".new-young"]


def test_a_cache_entry_is_a_single_folder(data, tmp_path):
    asked(data, tmp_path / "cache")
    asked(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["checksums.json", "examples.arrow", "ledger.json"]


def test_of_two_concurrent_runs_the_slower_uses_the_finished_entry(data, tmp_path):
    # Two processes start on the same file; here the other one finishes while ours is reading.
    cache, others, finished = tmp_path / "cache", [], []

    def folders() -> list[int]:
        return [folder.stat().st_ino for folder in (cache / "atomtune").glob("[!.]*")]

    def meanwhile(n_bytes: int) -> None:
        if not others:
            others.append(None)
            others[0] = asked(data, cache)
            finished.extend(folders())

    examples, ledger, _ = asked(data, cache, advance=meanwhile)
    assert ledger == others[0][1]
    assert examples.to_list() == others[0][0].to_list()
    assert len(entries(cache)) == 1
    assert folders() == finished, "it was not moved away: the other process is reading it"


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
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),  # reading it would wait forever
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


@pytest.mark.parametrize("content", ["{}", "[]", '{"ledger.json": ""}'])
def test_checksums_that_leave_out_a_file_are_not_trusted(data, tmp_path, content):
    asked(data, tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    assert entry_problem(entry) == ""
    (entry / "checksums.json").write_text(content)
    assert entry_problem(entry)


def test_a_cache_entry_has_the_permissions_of_the_users_umask(data, tmp_path):
    # A temporary folder is readable only by its owner, so other users could not read a shared cache.
    asked(data, tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    (entry,) = (tmp_path / "cache" / "atomtune").iterdir()
    assert entry.stat().st_mode == (tmp_path / "plain").stat().st_mode


ASKED = """
import sys
from pathlib import Path
from atomtune.data.encoded_source import Rules
from atomtune.data.cache import examples_of
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
    real_sync, real_rename = cache_entry.sync, Path.rename

    def sync(path):
        order.append(("sync", path.name))
        real_sync(path)

    def rename(self, goal):
        order.append(("rename", Path(goal).name))
        return real_rename(self, goal)

    monkeypatch.setattr(cache_entry, "sync", sync)
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
    if mode == 0o1777 and entry_is != "whole":
        assert f"{entry.name}-65534" in entries(cache), "a broken entry of another user is left where it is"
    assert as_another_user(other_rows) == "True", "a second time too, from what was stored"
    assert asked(source, cache)[0].to_list() == rows, "and the first user's as well"


def test_the_error_for_an_unwritable_cache_names_hf_datasets_cache(data, tmp_path):
    # A cache that is read-only or no folder is the user's to fix, and not a bug in atomtune.
    place = tmp_path / "cache"
    place.write_text("a file")
    with pytest.raises(BadSettings, match="HF_DATASETS_CACHE"):
        asked(data, place)


@pytest.mark.parametrize("step", ["the first file", "the last rename"])
def test_a_full_disk_is_not_told_as_a_cache_that_cannot_be_written(data, tmp_path, monkeypatch, step):
    rename = Path.rename

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_at_the_entry(self, goal):
        return rename(self, goal) if goal.name.startswith("not-whole") else full()

    if step == "the first file":
        monkeypatch.setattr(cache_entry.tempfile, "TemporaryFile", full)
    else:
        monkeypatch.setattr(Path, "rename", full_at_the_entry)
    with pytest.raises(OSError, match="No space left") as raised:
        asked(data, tmp_path / "cache")
    assert disk_failed(raised.value)
