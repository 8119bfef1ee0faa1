"""Hub: data sets of the `datasets` library: saved with `save_to_disk`, a folder of data files, or on the hub.

If there are several splits, `train` is read. Rows are read as plain Arrow, so no image or audio is decoded. Code that
comes with a data set is never run.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path

import datasets
import pyarrow
import yaml
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever this version of the library uses

from atomtune.data.reading.arrow_rows import BATCH_ROWS, checked, explained, in_bytes, read_batches
from atomtune.data.reading.compression import ENDINGS, ending_of
from atomtune.data.reading.raw import RawRecord, printable
from atomtune.data.records import Refusal
from atomtune.errors import BadData
from atomtune.hub_reach import OFFLINE_BY_CHOICE, endpoint_shown, stay_offline_if_unreachable

#: Extensions of data files, before .gz or .zst, for each kind of file.
_KINDS = ((".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet",), (".arrow",))
READ = tuple(chain.from_iterable(_KINDS))
_NAMES_READ = tuple(ending + packed for ending in READ for packed in ("", *ENDINGS))
#: JSON files of `datasets` that describe a data set and hold no records.
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
#: Beginnings of the names of files that describe a data set, in any case.
_ABOUT_DATA = ("readme", "license", "licence")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def is_hub_name(source: str) -> bool:
    """Whether the text is the name of a data set on the hub: `name` or `owner/name`, optionally `:configuration`."""
    exists = Path(source).exists()
    return not exists and bool(_HUB_NAME.fullmatch(source)) and ending_of(Path(source)) not in (*READ, ".txt")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, advance: Callable[[int], None], *, name: str) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of a folder that `save_to_disk` wrote.

    name  of the data set in origins
    Raises BadData if it is damaged, or has several splits and none is named train.
    """
    size = sum(path.stat().st_size for path in all_files(folder))
    with explained(folder, "a dataset saved by datasets"):
        try:
            saved = datasets.load_from_disk(str(folder))
        except (KeyError, TypeError, ValueError) as error:
            raise BadData(
                f"{folder}: a folder saved by datasets whose description cannot be read ({type(error).__name__}). "
                "Save it again with save_to_disk."
            ) from None
        if isinstance(saved, datasets.DatasetDict):
            split = _only_split(folder, sorted(saved))
            saved, name = saved[split], f"{name}/{split}"
        yield from _rows(saved, name, size, advance)


def _only_split(folder: Path, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) != 1:
        raise BadData(f"{folder}: no split train; splits here: {', '.join(splits) or 'none'}. Pass the folder of one.")
    return splits[0]


def _rows(
    rows: datasets.Dataset, name: str, size: int, advance: Callable[[int], None]
) -> Iterator[list[RawRecord | Refusal]]:
    tables = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
    batches = checked(batch for table in tables for batch in table.to_batches())
    yield from read_batches(batches, name, size, in_bytes(size, len(rows), advance))


def all_files(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders that are not hidden, sorted by path."""
    return [path for path in _all_paths(folder) if path.is_file()]


def _all_paths(folder: Path) -> list[Path]:
    """What is in a folder and its subfolders and not hidden; links to folders are not followed."""
    return sorted(
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def files_of(folder: Path) -> list[Path]:
    """The files of the train split of a folder of data files, as `datasets.load_dataset` chooses them.

    Raises BadData if there are none, or if `datasets` would leave out data files that belong to no split.
    """
    splits = _files_by_split(folder)
    return splits[_only_split(folder, sorted(splits))]


def unread_splits(folder: Path) -> list[str]:
    """The splits beside train of a saved data set or a folder of data files; none of them is read."""
    if is_saved(folder):
        listed = folder / "dataset_dict.json"
        splits = json.loads(listed.read_text(encoding="utf-8"))["splits"] if listed.is_file() else []
    else:
        splits = list(_files_by_split(folder))
    return _beside_train(splits)


def other_files(folder: Path) -> list[Path]:
    """What is in a folder of data files and is neither one of them nor describes the data set."""
    return [
        path
        for path in all_files(folder)
        if not is_data_file(path) and path.name not in _NO_DATA and not path.name.lower().startswith(_ABOUT_DATA)
    ]


def unread_splits_on_hub(name: str) -> list[str]:
    return _beside_train(_fetched(name).info.splits or {})


def _beside_train(splits: Iterable[str]) -> list[str]:
    others = sorted(splits)
    if "train" not in others:
        return []
    others.remove("train")
    return others


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    paths = _all_paths(folder)
    here = [path for path in paths if is_data_file(path) and path.is_file()]
    _refuse_unread_paths(folder, paths, here)
    if not here:
        raise BadData(f"{folder}: a folder without data files ({', '.join(READ)}). Pass one with --dataset_path.")
    # Only the folder itself is resolved, as `datasets` does, not the links in it: a hub snapshot is a folder of links.
    root = folder.resolve()  # and `datasets` needs a folder name, which `.` has not
    with _explained(str(folder)):
        chosen = datasets.load_dataset_builder(str(root)).config.data_files
    try:
        splits = {str(split): [Path(file).relative_to(root) for file in files] for split, files in chosen.items()}
    except ValueError:
        raise BadData(
            f"{folder}: its README names data files outside this folder. Pass the files themselves."
        ) from None
    split_of = {folder / file: split for split, files in splits.items() for file in files}
    left_out = [file for file in here if file not in split_of]
    if left_out:
        raise BadData(_left_out(folder, left_out, split_of))
    # It reads train.jsonl.bak too, as its name has a known extension somewhere, and hidden files that a README names.
    others = sorted(split_of.keys() - set(here))
    if others:
        raise BadData(
            f"{folder}: `datasets` would also read {printable(others[0].name)}, which is hidden or does not end like a "
            f"data file ({len(others):,} such files). Move them elsewhere, or pass the data files themselves."
        )
    return {split: [folder / file for file in files] for split, files in splits.items()}


def is_data_file(path: Path) -> bool:
    """Whether a file in a folder holds records, judged by its name."""
    return ending_of(path) in READ and path.name not in _NO_DATA


def _refuse_unread_paths(folder: Path, paths: Sequence[Path], here: Sequence[Path]) -> None:
    """Raise BadData for records in the folder that `datasets` would not see.

    paths  what is in the folder
    here   its data files
    """
    for path in here:
        if not path.name.endswith(_NAMES_READ):
            raise BadData(
                f"{folder}: {printable(path.name)}: in a folder, only extensions in lower case are read. Rename it, or "
                "pass the file itself."
            )
    root = folder.resolve()
    for path in paths:
        if not path.is_symlink():
            continue
        if not path.exists() and is_data_file(path):
            raise BadData(f"{path}: a link to a file that is not there. Restore the file, or remove the link.")
        is_elsewhere = path.is_dir() and not path.resolve().is_relative_to(root)
        if is_elsewhere and any(map(is_data_file, path.rglob("*"))):
            raise BadData(
                f"{path}: a link to a folder, which is not followed. Pass that folder too, or remove the link."
            )


def _left_out(folder: Path, left_out: Sequence[Path], split_of: Mapping[Path, str]) -> str:
    """The error for a folder in which `datasets` gives some files no split.

    It reads files of one kind. If the names of some say their split (train, test), it leaves out those without.
    """
    first, number = left_out[0], len(left_out)
    for file, split in split_of.items():
        if _kind(file) == _kind(first):
            return (
                f"{folder}: {printable(file.name)} belongs to the split {split}, and files that belong to none would "
                f"be left out: {number}, first {printable(first.name)}. Pass the files themselves, or rename those to "
                "train on so that their names begin with train."
            )
    return (
        f"{folder}: files of several kinds; {number} would be left out, first {printable(first.name)}. Pass the files "
        "themselves, or keep files of one kind in the folder."
    )


def _kind(file: Path) -> tuple[str, ...]:
    return next((endings for endings in _KINDS if ending_of(file) in endings), ())


def read_hub(source: str, *, name: str) -> Iterator[list[RawRecord | Refusal]]:
    """The rows of a data set on the hub, through the cache of `datasets`.

    name  of the data set in origins
    Raises BadData if it cannot be loaded.
    """
    yield from _rows(_fetched(source), name, 0, lambda n_bytes: None)


def hub_fingerprint(name: str) -> str:
    """A hash of the data set's name and of its `datasets` fingerprint, which changes with its revision and files."""
    return hashlib.sha256(f"{name} {_fetched(name)._fingerprint}".encode()).hexdigest()


@cache
def _fetched(name: str) -> datasets.Dataset:
    """Load the data set, once per process, so that the rows that are read are those that were hashed."""
    repository, _, configuration = name.partition(":")
    if not Path(repository).exists():
        stay_offline_if_unreachable()
    with _explained(name):
        return datasets.load_dataset(repository, configuration or None, split="train")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of `datasets` into a BadData that says what to do."""
    try:
        yield
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise BadData(
                f"{name}: a gated dataset. Accept its conditions on its hub page, then log in: hf auth login"
            ) from None
        raise BadData(
            f"{name}: no file or folder here and no dataset on the hub has this name. Check the spelling, or hf auth "
            "login."
        ) from None
    except (ConnectionError, HTTPError):
        if OFFLINE_BY_CHOICE:
            raise BadData(
                f"{name}: no file or folder here has this name, the hub's cache has no such dataset, and "
                "HF_HUB_OFFLINE forbids asking the hub.\nUnset HF_HUB_OFFLINE, or pass a file."
            ) from None
        endpoint = endpoint_shown()
        raise BadData(
            f"{name}: no file or folder here has this name, and the hub at {endpoint} cannot be reached.\n"
            "Set HF_ENDPOINT to a mirror you can reach, or download the dataset by other means and pass its file."
        ) from None
    except (yaml.YAMLError, RecursionError, TypeError, LookupError, AttributeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise BadData(
            f"{name}: the YAML at the top of its README.md cannot be used ({type(error).__name__}: {cause}). Fix it, "
            "or pass the data files themselves."
        ) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise BadData(
            f"{name}: this dataset is built by a script of its own, which atomtune does not run. Pass a version of it "
            "that is stored as Parquet or JSONL."
        ) from None
    except (DatasetsError, OSError, ValueError, pyarrow.ArrowException) as error:
        remedy = "\nName one of them: owner/name:configuration." if "onfig" in str(error) else ""
        raise BadData(
            f"{name}: no dataset could be loaded. {type(error).__name__}: {str(error)[:600]}{remedy}"
        ) from None
