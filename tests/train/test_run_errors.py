"""Run errors: the message names the folder that could not be written."""

import errno
import os
import re
from collections import namedtuple
from types import SimpleNamespace

import datasets
import pytest
from transformers import TrainingArguments

from atomtune.errors import Stopped
from atomtune.language import spoken, translated
from atomtune.train import run_errors
from atomtune.train.run_errors import told_to_user

Usage = namedtuple("Usage", "free")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The output folder, and a cache of encoded records on a disk with less free space."""
    output, cache = tmp_path / "output", tmp_path / "cache"
    output.mkdir()
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(run_errors.shutil, "disk_usage", lambda path: Usage(0 if path == cache else 10**9))
    return output, cache


def full(filename=None):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)


def test_the_folder_of_the_file_that_could_not_be_written_is_named(folders):
    output, _ = folders
    told = str(told_to_user(full(str(output / "checkpoint-4" / "x")), TrainingArguments(str(output)), again=""))
    assert f"{output / 'checkpoint-4'} could not be written ({output / 'checkpoint-4' / 'x'}: No space left" in told


@pytest.mark.parametrize(
    ("signal_name", "processes", "is_doubtful"), [("SIGTERM", 2, True), ("SIGTERM", 1, False), ("SIGINT", 2, False)]
)
def test_a_sigterm_in_a_job_of_several_processes_is_not_taken_for_the_users(
    tmp_path, signal_name, processes, is_doubtful
):
    # A process that was killed was recorded as a stop: torchrun sends SIGTERM to the others.
    args = SimpleNamespace(output_dir=str(tmp_path), world_size=processes, process_index=0, dataloader_num_workers=0)
    told = told_to_user(KeyboardInterrupt(signal_name), args, again="again")
    assert isinstance(told, Stopped) and f"{signal_name} received; stopped at once. There is no checkpoint" in str(told)
    assert ("If nobody stopped the run, another of its processes has ended" in str(told)) == is_doubtful
    with spoken("zh"):
        assert not re.search("[a-z]{3,} [a-z]{3,}", translated(str(told)))


def test_a_lost_process_before_the_first_checkpoint_leaves_nothing_to_continue(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), world_size=2, process_index=0, dataloader_num_workers=0)
    told = str(told_to_user(RuntimeError("Connection closed by peer"), args, again="--resume continues from there"))
    assert "The same command starts over" in told and "continues" not in told


def test_a_torch_write_error_names_the_output_folder_not_the_cache(folders):
    # Regression: the cache was named, because its disk had less free space.
    output, _ = folders
    error = RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 341696 vs 341584")
    assert f"{output} could not be written" in str(told_to_user(error, TrainingArguments(str(output)), again=""))


def test_a_disk_error_without_a_file_name_names_the_fullest_disk(folders, tmp_path, monkeypatch):
    output, cache = folders
    assert f"{cache} could not be written" in str(told_to_user(full(), TrainingArguments(str(output)), again=""))
    monkeypatch.setattr(run_errors.shutil, "disk_usage", lambda path: Usage(0 if path == tmp_path else 10**9))
    monkeypatch.setattr(run_errors.tempfile, "tempdir", str(tmp_path))
    assert f"{tmp_path} could not be written" in str(told_to_user(full(), TrainingArguments(str(output)), again=""))
