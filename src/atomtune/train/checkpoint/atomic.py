"""Atomic: a folder that appears complete or not at all, even if the disk fills up or the machine loses power.

A checkpoint is written under a hidden name. Every file is synced to disk and listed in a manifest with its size and
SHA-256; then one rename gives the folder its name. So a folder that has its own name is complete, and the manifest
shows what was changed later.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from atomtune.disk import only_finite, read_json_object, remove_tree, remove_unfinished, sha256_of, sync, write_json
from atomtune.errors import listing
from atomtune.folders import numbered, open_to_umask, sync_tree
from atomtune.process import signals_wait
from atomtune.train.checkpoint.state import state_files

MANIFEST = "manifest.json"
#: A checkpoint's name as atomtune writes it.
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
#: Prefixes of the names of folders that are being written, of those that a new one is about to replace, and of those
#: that are being removed.
STAGING, REPLACED, LEAVING = ".saving-", ".replaced-", ".removing-"


def staging_of(final: Path) -> Path:
    """Where a folder is written before it gets its name; on the same disk, so that it can be renamed."""
    return final.with_name(STAGING + final.name)


def _replaced_of(final: Path) -> Path:
    return final.with_name(REPLACED + final.name)


@contextlib.contextmanager
def staged(final: Path, *, clears: bool) -> Iterator[Path]:
    """Yield a folder to write in; if it still exists at the end, it is removed, even after an error.

    If `seal` was interrupted while it replaced `final`, the old folder gets its name back.
    clears  whether this rank removes it: only the rank that writes may, or it would lose the folder while writing
    """
    staging, replaced = staging_of(final), _replaced_of(final)
    try:
        yield staging
    finally:
        if clears:
            with signals_wait():
                if replaced.is_dir() and not replaced.is_symlink() and not final.exists():
                    replaced.rename(final)
                remove_tree(replaced)
                remove_tree(staging)


def clear_staging(folder: Path) -> None:
    """Finish or remove what a killed run was writing or removing. Call it only while holding the folder's lock.

    A run that saves a step again renames the old folder just before it renames the new one. Killed in between, it
    leaves two folders that are complete and only lack their name. A symbolic link under such a name is not ours.
    """
    for prefix in (STAGING, REPLACED):  # a staged folder is the newer one
        for left in folder.glob(f"{prefix}checkpoint-*"):
            final = left.with_name(left.name.removeprefix(prefix))
            if not left.is_symlink() and not final.exists() and not damage(left):
                sync_tree(left)
                left.rename(final)
                sync(folder)
    for prefix in (STAGING, REPLACED, LEAVING):
        for left in folder.glob(f"{prefix}*"):
            remove_tree(left)
    remove_unfinished(folder)


def seal(staging: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a staged folder, sync it to disk, and rename it to `final`.

    facts  further content of the manifest
    If `final` exists and has a manifest, it is replaced; without one it is not ours, and is renamed to something else.
    The replaced folder is removed last. If this is interrupted, `staged` gives it its name back; after a kill,
    `clear_staging` does.
    """
    entries = {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in _files(staging)}
    body = only_finite({**facts, "files": entries})
    write_json(staging / MANIFEST, {**body, "sha256": _digest(body)})
    open_to_umask(staging)
    sync_tree(staging)
    replaced = _replaced_of(final)
    if (final / MANIFEST).is_file() and not final.is_symlink():
        remove_tree(replaced)
        final.rename(replaced)
    elif final.exists() or final.is_symlink():
        final.rename(numbered(final.with_name(f"{final.name}.other")))
    staging.rename(final)
    sync(final.parent)
    remove_tree(replaced)


def damage(folder: Path) -> list[str]:
    """What is wrong with a sealed folder; empty if it is complete and unchanged."""
    try:
        manifest = read_manifest(folder)
        entries: dict[str, Any] = manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return ["it has no manifest: it was not finished, or another tool wrote it"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return ["its manifest is not readable"]
    if manifest.get("sha256") != _digest({name: value for name, value in manifest.items() if name != "sha256"}):
        return ["its manifest has changed since it was written"]
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size or sha256_of(file) != digest:
            problems.append(f"{name} has changed since it was written")
    # The Trainer opens its state files by name, so a file that is not in the manifest was added by someone else.
    strangers = [file.name for file in state_files(folder) if file.name not in expected]
    return problems + [f"{name} was added afterwards" for name in strangers]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises OSError or ValueError if it is missing or cannot be read."""
    return read_json_object(folder / MANIFEST)


def facts_in(folder: Path, key: str) -> dict[str, Any]:
    """An object among the facts in a manifest; empty if another tool wrote the folder."""
    try:
        values = read_manifest(folder).get(key)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N folders, newest first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return sorted(folders, key=step_in, reverse=True)


def step_in(path: Path) -> int:
    """N of a folder checkpoint-N."""
    return int(path.name.rpartition("-")[2])


def newest_undamaged(folder: Path, *, notice: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest undamaged checkpoint, or None; each damaged one that is skipped gets a notice."""
    for path in checkpoints(folder):
        problems = damage(path)
        if not problems:
            return path
        notice(f"{path.name} is skipped: {listing(problems, 3)}.")
    return None


def rotate(folder: Path, *, keep: int | None, protected: Collection[str | Path], notice: Callable[[str], None]) -> None:
    """Remove the oldest checkpoints beyond `keep`: only ours, but not protected ones, nor the newest undamaged one."""
    if keep is None or keep <= 0:
        return
    ours = [path for path in checkpoints(folder) if (path / MANIFEST).is_file() and not path.is_symlink()]
    newest_whole = next((path for path in ours if not damage(path)), None)
    stay = {Path(path).resolve() for path in (*ours[:keep], *protected)}
    if newest_whole is not None:
        stay.add(newest_whole.resolve())
    for path in reversed(ours):
        if path.resolve() not in stay:
            try:
                remove(path)
            except OSError as error:
                notice(f"{path} could not be removed: {error.strerror}.")


def remove(folder: Path) -> None:
    """Remove a sealed folder. It is renamed first, so that no half-removed folder is found under its name."""
    leaving = folder.with_name(LEAVING + folder.name)
    remove_tree(leaving)
    folder.rename(leaving)
    remove_tree(leaving)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            yield file.relative_to(folder).as_posix(), file
