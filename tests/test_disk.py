"""Laws of the disk: which errors are the disk's, and what is never replaced by a file."""

import errno
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atomtune.disk import disk_failed, disk_reason, expanded, place_problem, replacing, sharing_problem, sync


def test_pipes_and_folders_are_never_replaced_by_a_file(tmp_path):
    """`inspect --html /dev/full` replaced the device by a file."""
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for place in (pipe, folder):
        with pytest.raises(FileExistsError) as refused, replacing(place) as file:
            file.write(b"x")
        assert str(place) in place_problem(refused.value)
    with replacing(link) as file:
        file.write(b"x")
    assert link.read_bytes() == b"x" and not link.is_symlink()
    assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == [folder, link, pipe]


def test_path_errors_are_distinguished_from_bugs():
    assert place_problem(NotADirectoryError(20, "Not a directory", "/a/b")) == "/a/b: Not a directory."
    assert place_problem(FileNotFoundError(2, "No such file or directory", "/a/b")) == ""  # may be a bug in atomtune
    assert place_problem(PermissionError(13, "Permission denied")) == ""
    assert place_problem(ValueError("/a/b")) == ""


@pytest.mark.parametrize(
    ("error", "disk"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(5, "Input/output error"), True),
        (OSError(30, "Read-only file system"), True),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0; file write failed"), True),
        (RuntimeError("I/O error: Disk quota exceeded"), True),
        (RuntimeError("cannot open shard: Stale file handle"), True),
        (RuntimeError("Error while serializing: I/O error: Read-only file system (os error 30)"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (PermissionError(13, "Permission denied"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_disk_failures_are_distinguished_from_bugs(error, disk):
    assert disk_failed(error) is disk


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "/out/run.json"), "/out/run.json: No space left on device"),
        (RuntimeError("Error while serializing: I/O error: words (os error 30)"), "Read-only file system"),
        (RuntimeError("I/O error: Disk quota exceeded"), "I/O error: Disk quota exceeded"),
        (RuntimeError("basic_ios::clear: iostream error"), "not all bytes arrived on the disk"),
    ],
)
def test_a_failed_write_is_reported_with_the_systems_reason(tmp_path, error, reason):
    assert disk_reason(error, tmp_path) == reason


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_recognized_behind_a_torch_error(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.save({"weight": torch.zeros(2**16)}, tmp_path / "optimizer.pt")
        assert disk_reason(caught.value, tmp_path) == "No space left on device"
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)  # the error still holds the open file


def test_the_home_of_an_unknown_user_is_not_expanded():
    assert expanded("~/x") == Path.home() / "x"
    assert expanded("~nobody-here/x") == Path("~nobody-here/x")


def test_no_usable_temporary_folder_counts_as_a_disk_failure(monkeypatch):
    # Libraries use tempfile when they are imported: on a full disk every command was reported as a bug.
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", list)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    assert disk_failed(caught.value)


def test_full_shared_memory_is_distinguished_from_a_full_disk(monkeypatch):
    torch_says = RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")
    assert "docker run --shm-size" in sharing_problem(torch_says)
    assert sharing_problem(RuntimeError("out of resource: shared memory, Required: 231424")) == ""  # a GPU's own
    no_semaphore = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    if Path("/dev/shm").is_dir():
        assert "/dev/shm" in sharing_problem(no_semaphore)
    assert sharing_problem(OSError(errno.ENOSPC, "No space left on device", "out/run.json")) == ""
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**9))
    assert sharing_problem(no_semaphore) == ""


@pytest.mark.skipif(os.name != "posix", reason="folders are opened only there")
@pytest.mark.parametrize(("code", "refused"), [(errno.EINVAL, ["file"]), (errno.EIO, ["file", "folder"])])
def test_a_file_system_that_cannot_sync_folders_is_used_but_a_failing_disk_is_not(tmp_path, monkeypatch, code, refused):
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "fsync", fail)
    raised = []
    for path in sorted(tmp_path.iterdir()):
        try:
            sync(path)
        except OSError:
            raised.append(path.name)
    assert raised == refused
