"""A sealed folder is complete or detected as damaged; rotation removes only our own folders."""

import errno
import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atomtune.train.checkpoint.atomic import (
    MANIFEST,
    checkpoints,
    clear_staging,
    damage,
    remove,
    rotate,
    seal,
    staged,
    staging_of,
)


def sealed(folder: Path, step: int, content: bytes = b"weights") -> Path:
    final = folder / f"checkpoint-{step}"
    staging = staging_of(final)
    (staging / "inner").mkdir(parents=True)
    (staging / "adapter.safetensors").write_bytes(content)
    (staging / "inner" / "state.json").write_text('{"a": 1}')
    seal(staging, final, {"step": step, "identity": {"seed": 42, "limit": math.inf}})
    return final


def test_a_sealed_folder_is_complete_and_its_staging_folder_is_removed(tmp_path):
    made = sealed(tmp_path, 4)
    assert damage(made) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert sorted(manifest["files"]) == ["adapter.safetensors", "inner/state.json"]


def test_every_single_flipped_bit_is_found(tmp_path):
    # 200 places in all files, including the manifest. Flips in bytes that are never read do not count.
    made = sealed(tmp_path, 4, bytes(range(256)) * 4)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    draw = random.Random(0)
    for _ in range(200):
        file = draw.choice(files)
        before = file.read_bytes()
        place, bit = draw.randrange(len(before)), draw.randrange(8)
        file.write_bytes(before[:place] + bytes([before[place] ^ (1 << bit)]) + before[place + 1 :])
        if file.name != MANIFEST:
            assert damage(made) == [f"{file.relative_to(made).as_posix()} has changed since it was written"]
        else:
            assert damage(made) or _same_json(before, file.read_bytes())
        file.write_bytes(before)
    assert damage(made) == []


def _same_json(one: bytes, other: bytes) -> bool:
    return json.loads(one) == json.loads(other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b'{"files": {"a": {}}}', b"\xff\xfe"])
def test_an_invalid_manifest_is_reported_as_damage_without_a_crash(tmp_path, content):
    made = sealed(tmp_path, 4)
    (made / MANIFEST).write_bytes(content)
    assert len(damage(made)) == 1


def test_a_manifest_that_is_a_pipe_or_device_is_reported_as_damage(tmp_path):
    """A pipe was read forever, and /dev/zero until the memory was full."""
    pipe, device = sealed(tmp_path, 1), sealed(tmp_path, 2)
    (pipe / MANIFEST).unlink()
    os.mkfifo(pipe / MANIFEST)
    (device / MANIFEST).unlink()
    (device / MANIFEST).symlink_to("/dev/zero")
    assert [damage(folder) for folder in (pipe, device)] == 2 * [["its manifest is not readable"]]


def test_a_missing_file_and_a_missing_manifest_are_named(tmp_path):
    made = sealed(tmp_path, 4)
    (made / "inner" / "state.json").unlink()
    assert damage(made) == ["inner/state.json is missing"]
    (made / MANIFEST).unlink()
    assert "no manifest" in damage(made)[0]


def test_sealing_replaces_own_checkpoints_and_moves_foreign_folders_aside(tmp_path):
    sealed(tmp_path, 4, b"old")
    assert (sealed(tmp_path, 4, b"new") / "adapter.safetensors").read_bytes() == b"new"
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "notes.txt").write_text("mine")
    assert damage(sealed(tmp_path, 6)) == []
    assert (tmp_path / "checkpoint-6.other-1" / "notes.txt").read_text() == "mine"
    # A link is foreign too, wherever it leads.
    elsewhere = sealed(tmp_path / "elsewhere", 2)
    for step, goal in ((8, elsewhere), (10, tmp_path / "nowhere")):
        (tmp_path / f"checkpoint-{step}").symlink_to(goal)
        assert damage(sealed(tmp_path, step)) == []
        assert (tmp_path / f"checkpoint-{step}.other-1").readlink() == goal
    assert damage(elsewhere) == []


def test_rotation_keeps_the_newest_the_protected_and_everything_a_user_made(tmp_path):
    for step in (2, 4, 6, 8, 10):
        sealed(tmp_path, step)
    for name in ("checkpoint-final", "checkpoint-3", "checkpoint-007", "backup"):  # no manifest, or another name
        (tmp_path / name).mkdir()
    rotate(tmp_path, keep=0, protected=[], notice=pytest.fail)  # 0 means no limit, as in the Trainer
    assert len(checkpoints(tmp_path)) == 6
    protected = tmp_path / "backup" / ".." / "checkpoint-4"  # the same folder in other words
    rotate(tmp_path, keep=2, protected=[protected], notice=pytest.fail)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        *("checkpoint-10", "checkpoint-8", "checkpoint-4"),
        *("checkpoint-final", "checkpoint-3", "checkpoint-007", "backup"),
    }


def test_rotation_never_removes_the_last_undamaged_checkpoint(tmp_path):
    for step in (2, 4, 6):
        sealed(tmp_path, step)
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "adapter.safetensors").write_bytes(b"torn")
    rotate(tmp_path, keep=1, protected=[], notice=pytest.fail)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-2"]


def test_rotation_leaves_a_symlinked_checkpoint_alone(tmp_path):
    elsewhere = sealed(tmp_path / "elsewhere", 2)
    out = tmp_path / "out"
    sealed(out, 4)
    (out / "checkpoint-2").symlink_to(elsewhere)
    rotate(out, keep=1, protected=[], notice=pytest.fail)
    assert damage(elsewhere) == []


def test_a_checkpoint_that_cannot_be_removed_is_reported_and_the_others_are_removed(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        sealed(tmp_path, step)
    real, said = Path.rename, []

    def rename(self, goal):
        if self.name == "checkpoint-4":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self, goal)

    monkeypatch.setattr(Path, "rename", rename)
    rotate(tmp_path, keep=1, protected=[], notice=said.append)
    assert said == [f"{tmp_path / 'checkpoint-4'} could not be removed: Permission denied."]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]


def test_leftover_staging_folders_of_a_killed_run_are_cleared(tmp_path):
    for name in (".saving-checkpoint-4", ".replaced-checkpoint-4", ".removing-checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".run.json.1a2b3c4d.part").write_text("{")
    kept = sealed(tmp_path, 6)
    clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_saving_a_step_again_always_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    # The epoch's end and a stop may save the same step twice; with --save_total_limit 1 there is no other checkpoint.
    real, renames = Path.rename, 0

    def rename(self, goal):
        nonlocal renames
        renames += 1
        if renames == int(folder.name):
            raise SystemExit
        return real(self, goal)

    monkeypatch.setattr(Path, "rename", rename)
    survived = 0
    for folder in (tmp_path / "1", tmp_path / "2", tmp_path / "3"):
        renames = -1  # do not count the first save's own
        sealed(folder, 4, b"old")
        try:
            sealed(folder, 4, b"new")
        except SystemExit:
            clear_staging(folder)
        else:
            survived += 1
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
        assert damage(folder / "checkpoint-4") == []
    assert survived == 1, "it died before the old name went, and between that and the new one's coming"


def saved(folder: Path, content: bytes) -> None:
    """Save checkpoint-4 as a run does."""
    final = folder / "checkpoint-4"
    with staged(final, clears=True) as staging:
        staging.mkdir(parents=True)
        (staging / "adapter.safetensors").write_bytes(content)
        seal(staging, final, {"step": 4})


def interrupted(action: Callable[[], None], *, place: int) -> bool:
    """Run the action with Ctrl-C before or after one of its calls of the system; False if it has no n-th such place."""
    places = 0

    def count(frame, event, function):
        nonlocal places
        if event in ("c_call", "c_return") and getattr(function, "__module__", "") == os.rename.__module__:
            places += 1
            if places == place:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        action()
    except (KeyboardInterrupt, OSError):  # shutil.rmtree turns some into "Bad file descriptor"
        return True
    finally:
        sys.setprofile(None)
    return False


def test_ctrl_c_at_any_moment_of_saving_a_step_again_loses_neither_copy(tmp_path):
    # Once the old checkpoint was removed first, and an interrupted save then removed the new one too.
    kept = set()
    for place in range(1, 1000):
        folder = tmp_path / str(place)
        saved(folder, b"old")
        was_interrupted = interrupted(lambda folder=folder: saved(folder, b"new"), place=place)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"], place
        assert damage(folder / "checkpoint-4") == []
        kept.add((folder / "checkpoint-4" / "adapter.safetensors").read_bytes())
        if not was_interrupted:
            break
    assert place > 40 and kept == {b"old", b"new"}


def test_ctrl_c_at_any_moment_of_a_removal_leaves_the_whole_checkpoint_or_none(tmp_path):
    left = set()
    for place in range(1, 1000):
        final = sealed(tmp_path / str(place), 4)
        was_interrupted = interrupted(lambda final=final: remove(final), place=place)
        left.add(final.exists())
        assert not final.exists() or damage(final) == []
        clear_staging(final.parent)
        assert [path.name for path in final.parent.iterdir()] == (["checkpoint-4"] if final.exists() else [])
        if not was_interrupted:
            break
    assert left == {True, False}


def test_a_folder_gets_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    # Without that, a loss of power may leave a checkpoint with its name and with empty files, or without its name.
    synced, named = set(), []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor):
        real_sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def rename(self, goal):
        if not goal.name.startswith("."):
            assert {path.stat().st_ino for path in (self, *self.rglob("*"))} <= synced
            synced.discard(goal.parent.stat().st_ino)
            named.append(goal.name)
        return real_rename(self, goal)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    sealed(tmp_path, 2)
    assert tmp_path.stat().st_ino in synced
    monkeypatch.setattr(Path, "rename", real_rename)
    sealed(tmp_path, 4).rename(tmp_path / ".saving-checkpoint-4")  # as a kill before the last rename leaves it
    sealed(tmp_path, 6).rename(tmp_path / ".replaced-checkpoint-6")
    monkeypatch.setattr(Path, "rename", rename)
    synced.clear()
    clear_staging(tmp_path)
    assert tmp_path.stat().st_ino in synced
    assert named == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_of_two_complete_copies_of_a_step_the_one_saved_later_is_kept(tmp_path):
    sealed(tmp_path, 4, b"old").rename(tmp_path / ".replaced-checkpoint-4")
    sealed(tmp_path, 4, b"new").rename(tmp_path / ".saving-checkpoint-4")
    clear_staging(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "adapter.safetensors").read_bytes() == b"new"


def test_a_replaced_checkpoint_gets_its_name_back_if_no_other_has_it(tmp_path):
    # As after a kill while an interrupted save was being undone.
    sealed(tmp_path, 2).rename(tmp_path / ".replaced-checkpoint-2")
    clear_staging(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") == []


def test_staged_folders_are_cleared_if_damaged_and_replace_no_checkpoint(tmp_path):
    sealed(tmp_path, 2).rename(tmp_path / ".saving-checkpoint-2")
    sealed(tmp_path / "other", 4).rename(tmp_path / ".saving-checkpoint-4")
    (tmp_path / "other").rmdir()
    sealed(tmp_path / "own", 4, b"its own").rename(tmp_path / "checkpoint-4")
    (tmp_path / "own").rmdir()
    (tmp_path / ".saving-checkpoint-2" / "adapter.safetensors").write_bytes(b"torn")
    clear_staging(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "adapter.safetensors").read_bytes() == b"its own"
