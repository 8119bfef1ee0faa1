"""Laws of folders: one that a command fills is complete or free again, and belongs to one process."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from atomtune.errors import BadSettings
from atomtune.folders import TemporaryFolder, filled, held, is_free, numbered, publish


def test_publishing_moves_all_files_and_the_given_last_file_last(tmp_path, monkeypatch):
    staging = tmp_path / ".saving-adapter"
    staging.mkdir()
    for name in ("adapter_model.safetensors", "tokenizer.json", "zz.json"):
        (staging / name).write_text(name)
    moved = []
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, goal: (moved.append(self.name), real(self, goal))[1])
    publish(staging, tmp_path, last="adapter_model.safetensors")
    assert moved == ["tokenizer.json", "zz.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(moved)


def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), filled(out, last="config.json") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not out.exists()
    with filled(out, last="config.json") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("a")
        (folder / "config.json").chmod(0o600)
        assert is_free(out), "nothing of it is seen before"
    assert sorted(path.name for path in out.rglob("*")) == ["a", "config.json", "part"]
    assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*") if path.is_file()} == {oct(0o666 & ~umask())}
    assert not is_free(out)


def test_a_file_system_that_refuses_to_set_permissions_holds_the_files(tmp_path, monkeypatch):
    # Regression: a run whose output lay on such a mount ended at its first checkpoint.
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    with filled(tmp_path / "out", last="a") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_folder_of_the_users_own_stays_when_the_command_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), filled(tmp_path, last="a"):
        raise ZeroDivisionError
    assert tmp_path.is_dir() and is_free(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="descriptors of folders are opened only there")
@pytest.mark.parametrize("call", ["unlink", "close", "rmdir"])
def test_a_stop_signal_during_a_clean_up_is_a_stop_and_leaves_nothing(tmp_path, monkeypatch, call):
    # An exception right after os.close made shutil.rmtree close again: "Bad file descriptor", exit code 1.
    def before_and_signal(*words: object, **more: object) -> None:
        original(*words, **more)
        signal.raise_signal(signal.SIGINT)

    original, out = getattr(os, call), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), filled(out, last="config.json") as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "a").write_text("a")
        (folder / "deep" / "b").write_text("b")
        monkeypatch.setattr(os, call, before_and_signal)
        raise ZeroDivisionError
    monkeypatch.undo()
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
import os, signal, sys
from pathlib import Path
from atomtune.folders import filled
with filled(Path(sys.argv[1]), last="config.json") as folder:
    (folder / "config.json").write_text("{}")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_command_do_not_block_the_next_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "kill"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "config.json").exists(), "no reader takes it for a model"
    assert is_free(tmp_path)
    with filled(tmp_path, last="config.json") as folder:
        assert not list(folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="folders are not locked there")
def test_two_commands_do_not_fill_one_folder(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "out"), "wait"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError), filled(tmp_path / "out", last="config.json"):
            pass
        other.communicate(b"")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_held_folder_is_exclusive_and_removed_if_nothing_was_written(tmp_path):
    out = tmp_path / "out"
    with held(out, "run"):
        with pytest.raises(BadSettings, match="another sweep is already writing here"), held(out, "sweep"):
            pass
        assert out.is_dir()
    assert not out.exists()
    with held(out, "run"):
        (out / "run.json").write_text("{}")
    with pytest.raises(OSError, match="of the block's own"), held(out, "run"):
        raise BlockingIOError("of the block's own")
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["run.json"]
    with pytest.raises(BadSettings, match="cannot be made or written"), held(out / "run.json", "run"):
        pass


def test_the_first_free_number_is_taken(tmp_path):
    (tmp_path / "demo-1").mkdir()
    (tmp_path / "demo-3").mkdir()
    assert numbered(tmp_path / "demo") == tmp_path / "demo-2"


TEMPORARY = """
import os, signal, sys
from atomtune.folders import TemporaryFolder
folder = TemporaryFolder("kind-")
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs locks on folders")
def test_temporary_folders_of_killed_processes_are_removed_and_live_ones_kept(tmp_path, monkeypatch):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def started(end: str) -> subprocess.Popen:
        words = [sys.executable, "-c", TEMPORARY, end]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    living = started("live")
    of_living = Path(living.stdout.readline().strip())
    killed = started("kill")
    of_killed = Path(killed.stdout.readline().strip())
    assert killed.wait() == -signal.SIGKILL and of_killed.is_dir()
    (tmp_path / "kind-file").write_text("no folder")
    (tmp_path / "kind-link").symlink_to(of_living)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = TemporaryFolder("kind-")
    assert not of_killed.exists() and (of_living / "file").is_file() and own.path.is_dir()
    own.remove()
    assert {path.name for path in tmp_path.iterdir()} == {of_living.name, "kind-file", "kind-link"}
    living.communicate()
    assert not of_living.exists(), "at its end it removes its own"
