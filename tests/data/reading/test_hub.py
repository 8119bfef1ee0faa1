"""Laws of data sets: saved folders, folders of files and hub names give the stored rows, or say what to do."""

import gzip
import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pytest
from huggingface_hub import constants

from atomtune.data.reading import hub
from atomtune.data.reading.hub import is_hub_name
from atomtune.data.reading.raw import RawRecord
from atomtune.data.reading.sources import fingerprint_of, notes_on, size_of
from atomtune.errors import BadData
from tests.reading import read_values

ROWS = [{"instruction": f"第{n}个", "messages": [{"role": "user", "content": str(n)}]} for n in range(2500)]
OTHER = [{"instruction": "held out", "messages": []}]
SAVED = datasets.Dataset.from_list(ROWS)
HELD_OUT = datasets.Dataset.from_list(OTHER, features=SAVED.features)


def numbered(name: str, rows: list[dict] = ROWS) -> list[RawRecord]:
    return [RawRecord(row, f"{name}:{n}") for n, row in enumerate(rows, 1)]


# --- folders that save_to_disk wrote --------------------------------------------------------------------------------


def test_a_saved_data_set_gives_its_rows(tmp_path: Path):
    SAVED.save_to_disk(tmp_path / "saved", num_shards=3)
    seen: list[int] = []
    assert list(read_values(tmp_path / "saved", seen.append)) == numbered("saved")
    assert sum(seen) == size_of(tmp_path / "saved") > 0


def test_rows_come_in_the_order_of_the_data_set_not_of_the_file(tmp_path: Path):
    # Catches reading the Arrow files directly, without the data set's index.
    SAVED.select([5, 3, 8]).save_to_disk(tmp_path / "saved")
    assert [one.value for one in read_values(tmp_path / "saved")] == [ROWS[5], ROWS[3], ROWS[8]]


def test_of_several_splits_train_is_read(tmp_path: Path):
    datasets.DatasetDict(train=SAVED, test=HELD_OUT).save_to_disk(tmp_path / "saved")
    assert list(read_values(tmp_path / "saved")) == numbered("saved/train")
    assert list(read_values(tmp_path / "saved" / "test")) == numbered("test", OTHER)


def test_a_missing_train_split_error_lists_the_splits(tmp_path: Path):
    datasets.DatasetDict(dev=HELD_OUT, test=HELD_OUT).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadData, match="no split train; splits here: dev, test"):
        list(read_values(tmp_path / "saved"))


@pytest.mark.parametrize("damage", ["no rows", "half the rows", "no description", "half a description"])
def test_a_damaged_saved_data_set_is_refused_with_the_remedy(tmp_path: Path, damage):
    folder = tmp_path / "saved"
    SAVED.save_to_disk(folder)
    (rows,) = folder.glob("*.arrow")
    if damage == "no rows":
        rows.unlink()
    elif damage == "half the rows":
        os.truncate(rows, rows.stat().st_size // 2)
    elif damage == "no description":
        (folder / "dataset_info.json").unlink()
    else:
        (folder / "state.json").write_text((folder / "state.json").read_text()[:20])
    with pytest.raises(BadData, match=r"saved(.|\n)*again"):
        list(read_values(folder))


# --- folders of data files ------------------------------------------------------------------------------------------


def test_a_folder_of_parquet_files_gives_the_train_split_and_file_names(tmp_path: Path):
    # These are the file names of `push_to_hub`; the oracle is load_dataset's own choice of files.
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    for n in range(2):
        part = SAVED.select(range(n * 1250, n * 1250 + 1250))
        part.to_parquet(folder / "data" / f"train-0000{n}-of-00002.parquet")
    HELD_OUT.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    found = list(read_values(folder))
    assert [one.value for one in found] == list(datasets.load_dataset(str(folder), split="train"))
    assert found[1249].origin == "repo/data/train-00000-of-00002.parquet:1250"
    assert found[1250].origin == "repo/data/train-00001-of-00002.parquet:1"


def test_the_current_folder_is_read(tmp_path: Path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    assert [record.value for record in read_values(".")] == [{"a": 1}]


def test_a_folder_of_jsonl_is_read_as_strictly_as_a_file(tmp_path: Path):
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    (folder / "b.jsonl").write_text('{"b": "1"}\n')
    for name in (".hidden", "README.md", "LICENSE.txt", "dataset_infos.json"):
        (folder / name).write_text("{}")
    first, twice, last = read_values(folder)
    assert (first, last) == (RawRecord({"a": 1}, "chats/a.jsonl:1"), RawRecord({"b": "1"}, "chats/b.jsonl:1"))
    assert twice.origin == "chats/a.jsonl:2" and "appears twice" in twice.reason


@pytest.mark.parametrize(
    "card", [": [", "configs: [{config_name: [1]}]", f"x: {'[' * 9999}"], ids=lambda card: card[:8]
)
def test_unusable_yaml_in_the_readme_is_reported(tmp_path: Path, card: str):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(BadData, match=r"the YAML at the top of its README\.md cannot be used"):
        list(read_values(tmp_path))


def test_a_readme_that_names_files_outside_the_folder_is_refused(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (tmp_path / "b.jsonl", folder / "a.jsonl"):
        path.write_text('{"a": 1}\n')
    (folder / "README.md").write_text(
        f"---\nconfigs: [{{config_name: default, data_files: {tmp_path}/b.jsonl}}]\n---\n"
    )
    with pytest.raises(BadData, match="its README names data files outside this folder"):
        list(read_values(folder))


def test_a_folder_of_symlinks_like_the_hub_cache_is_read(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "5ac3").write_text('{"a": 1}\n')
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(tmp_path / "blobs" / "5ac3")
    assert list(read_values(tmp_path / "snapshot")) == [RawRecord({"a": 1}, "snapshot/train.jsonl:1")]


def test_a_folder_with_several_kinds_of_files_is_refused(tmp_path: Path):
    # load_dataset reads the most frequent kind of file and drops the others silently.
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(BadData, match=r"1 would be left out, first (a\.jsonl|b\.csv)"):
        list(read_values(tmp_path))


def test_a_folder_in_which_only_some_names_say_a_split_is_refused_with_that_reason(tmp_path: Path):
    # Both files are JSONL, but the message said "files of several kinds".
    (tmp_path / "chat.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "chat-test.jsonl.gz").write_bytes(gzip.compress(b'{"a": 2}\n'))
    with pytest.raises(BadData) as refused:
        list(read_values(tmp_path))
    assert "chat-test.jsonl.gz belongs to the split test" in str(refused.value)
    assert "1, first chat.jsonl" in str(refused.value) and "kinds" not in str(refused.value)
    # The message's remedy.
    (tmp_path / "chat.jsonl").rename(tmp_path / "train-chat.jsonl")
    assert [record.value for record in read_values(tmp_path)] == [{"a": 1}]


def test_a_backup_in_a_folder_is_not_read_as_data(tmp_path: Path):
    # `datasets` reads it, so each of its records was trained on twice.
    for name in ("a.jsonl", "a.jsonl.bak"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(BadData, match=r"also read a\.jsonl\.bak, which is hidden .*\(1 such files\)\. Move them"):
        list(read_values(tmp_path))


def test_a_hidden_file_that_a_readme_names_is_refused(tmp_path: Path):
    # It is not part of the folder's hash, so the cache would serve its examples after a change.
    (tmp_path / "README.md").write_text(
        '---\nconfigs: [{config_name: default, data_files: ["*.jsonl", ".raw/*"]}]\n---\n'
    )
    (tmp_path / ".raw").mkdir()
    for name in ("a.jsonl", ".raw/b.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(BadData, match=r"also read b\.jsonl, which is hidden"):
        list(read_values(tmp_path))


@pytest.mark.parametrize("others", [[], ["b.jsonl"]])
def test_a_file_in_a_folder_with_an_extension_in_upper_case_is_refused_with_that_reason(tmp_path: Path, others):
    for name in ("A.JSONL", *others):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(BadData, match=r"A\.JSONL: in a folder, only extensions in lower case"):
        list(read_values(tmp_path))
    assert [record.value for record in read_values(tmp_path / "A.JSONL")] == [{"a": 1}]


def test_a_link_in_a_folder_that_is_not_followed_is_refused(tmp_path: Path):
    # What it links to was left out in silence.
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"a": 1}\n')
    (folder / "itself").symlink_to(folder)
    (folder / "more").symlink_to(elsewhere)
    (folder / "README.md").symlink_to(tmp_path / "nowhere.md")
    assert [record.value for record in read_values(folder)] == [{"a": 1}]
    (elsewhere / "deep" / "b.jsonl").write_text('{"b": 1}\n')
    with pytest.raises(BadData, match="more: a link to a folder, which is not followed"):
        list(read_values(folder))
    (folder / "more").unlink()
    (folder / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadData, match=r"b\.jsonl: a link to a file that is not there"):
        list(read_values(folder))


def test_splits_that_are_not_read_are_named(tmp_path: Path, monkeypatch):
    files, saved = tmp_path / "owner" / "files", tmp_path / "saved"
    for split in ("train", "test", "validation"):
        SAVED.to_parquet(files / f"{split}.parquet")
    datasets.DatasetDict(train=SAVED, test=HELD_OUT, validation=HELD_OUT).save_to_disk(saved)
    note = "mine: only its split train is read, not test, validation."
    assert notes_on(files, "mine") == notes_on(saved, "mine") == [note]
    monkeypatch.setattr(hub, "is_hub_name", lambda source: source == "owner/files")
    monkeypatch.chdir(tmp_path)
    assert notes_on("owner/files", "mine") == [note]
    assert list(read_values("owner/files")) == numbered("owner/files")


def test_a_data_set_without_other_splits_has_no_note(tmp_path: Path):
    SAVED.to_parquet(tmp_path / "one" / "test.parquet")  # its only split is read
    datasets.DatasetDict(test=HELD_OUT).save_to_disk(tmp_path / "dict")
    SAVED.save_to_disk(tmp_path / "saved")
    for name in ("one", "one/test.parquet", "dict", "saved"):
        assert notes_on(tmp_path / name, "mine") == []


def test_files_of_a_folder_that_hold_no_records_read_here_are_noted(tmp_path: Path):
    SAVED.to_json(tmp_path / "train.jsonl")
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    assert notes_on(tmp_path, "mine") == []
    (tmp_path / "pictures").mkdir()
    for name in ("more.feather", "pictures/a.png"):
        (tmp_path / name).write_text("")
    assert notes_on(tmp_path, "mine") == [
        "mine: files that do not end like a data file are not read: 2, first more.feather."
    ]


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(BadData, match=r"a folder without data files \(\.jsonl, "):
        list(read_values(tmp_path))
    with pytest.raises(BadData, match=r"a folder without data files \(\.jsonl, "):
        size_of(tmp_path)


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squad", "openai/gsm8k", "openai/gsm8k:main", "a-b/c.d_e"])
def test_hub_names_are_recognized(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["train.jsonl", "data/train.csv.gz", "notes.txt", "./x", "/x/y", "a/b/c", "~/x", "../x", "a b", ""]
)
def test_paths_are_not_hub_names(name):
    assert not is_hub_name(name)


def test_an_existing_path_takes_precedence_over_a_hub_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SAVED.save_to_disk("saved")
    assert list(read_values("saved")) == numbered("saved")


def test_offline_mode_set_by_the_user_is_reported_as_the_reason():
    with pytest.raises(BadData, match=r"nobody/nothing: no file or folder here(.|\n)*HF_HUB_OFFLINE forbids"):
        list(read_values("nobody/nothing"))


def test_an_unreachable_hub_error_names_hf_endpoint_without_its_password(monkeypatch):
    # The tests run with HF_HUB_OFFLINE=1, so pretend that the user did not set it.
    monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://me:sesame@127.0.0.1:9")
    with pytest.raises(BadData, match=r"nobody/nothing: no file or folder here(.|\n)*HF_ENDPOINT") as refused:
        list(read_values("nobody/nothing"))
    assert "at 127.0.0.1:9 cannot" in str(refused.value) and "sesame" not in str(refused.value)


def test_an_unreachable_hub_is_not_retried(monkeypatch):
    """The library would retry for half a minute and print a line each time."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(BadData, match="cannot be reached"):
            list(read_values("nobody/unreachable"))
        assert constants.is_offline_mode()


class _KnowsNothing(BaseHTTPRequestHandler):
    """A hub without any repository; it answers like the real one."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *said: object) -> None:
        """Do not write to the tests' standard error."""


def test_a_name_unknown_to_the_hub_is_reported_as_no_such_dataset():
    # In another process, where the library is not offline, against a real server.
    code = """if True:
        from atomtune.data.reading.sources import read_files
        [list(file.chunks) for file in read_files("nobody/nothing")]
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), _KnowsNothing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        server.shutdown()
    assert "BadData: nobody/nothing: no file or folder here and no dataset on the hub has this name" in done.stderr


def repository(folder: Path, *, configurations: bool = False) -> Path:
    """A folder with the files of a hub repository; `datasets` loads it by its relative name like from the hub."""
    (folder / "owner" / "name").mkdir(parents=True)
    for name in ("zh", "en"):
        SAVED.to_parquet(folder / "owner" / "name" / name / "train.parquet")
    if configurations:
        (folder / "owner" / "name" / "README.md").write_text(
            "---\nconfigs:\n- {config_name: zh, data_files: zh/*}\n- {config_name: en, data_files: en/*}\n---\n"
        )
    return folder


def test_a_configuration_is_chosen_after_a_colon(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(repository(tmp_path, configurations=True))
    assert list(read_values("owner/name:zh")) == numbered("owner/name:zh")
    assert size_of("owner/name:zh") == 0


def test_a_missing_configuration_error_lists_the_available_ones(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(repository(tmp_path, configurations=True))
    with pytest.raises(BadData, match=r"'?zh'?(.|\n)*owner/name:configuration"):
        list(read_values("owner/name:fr"))


def test_a_data_set_with_a_loading_script_is_refused_and_not_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program").mkdir()
    Path("program/program.py").write_text("from pathlib import Path; Path('ran').touch()")
    with pytest.raises(BadData, match="built by a script of its own, which atomtune does not run"):
        list(read_values("program:all"))
    assert not Path("ran").exists()


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_folders_hash_depends_only_on_file_contents_and_names(tmp_path: Path):
    folder, seen = tmp_path / "chats", []
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"a": 1}))
    seen.append(fingerprint_of(folder))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    os.utime(folder / "a.jsonl", (1, 1))
    assert fingerprint_of(folder) == seen[0]
    (folder / "a.jsonl").write_text(json.dumps({"a": 2}))
    seen.append(fingerprint_of(folder))
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    seen.append(fingerprint_of(folder))
    assert len(set(seen)) == 3


@pytest.mark.slow
def test_a_hub_data_set_has_the_same_hash_in_every_process(tmp_path: Path):
    # A random hash would make the store useless, and a resumed run would refuse its own data.
    repository(tmp_path)
    code = "from atomtune.data.reading.sources import fingerprint_of; print(fingerprint_of('owner/name:default'))"
    hashes = {
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("ask", [fingerprint_of, lambda source: list(read_values(source))])
def test_a_missing_source_is_reported_by_fingerprinting_and_by_reading(tmp_path: Path, ask):
    with pytest.raises(BadData, match="no such file"):
        ask(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadData, match="no such file"):
        ask(str(tmp_path / "nowhere"))
