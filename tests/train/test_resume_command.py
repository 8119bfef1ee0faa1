"""The command that continues a run, as it is printed when the run ends early."""

import shlex
from types import SimpleNamespace

import pytest

from atomtune.settings.read import read
from atomtune.train.resume_command import how_to_resume

OF_A_RUN = ["--model_path", "base", "--dataset_path", "train.jsonl"]


def told(argv, *, world_size=1):
    """How to continue a run in `out` that was started with these words."""
    return how_to_resume(
        SimpleNamespace(settings=read("train", argv), args=SimpleNamespace(output_dir="out", world_size=world_size))
    )


def words_of(argv):
    return shlex.split(told(argv).partition(" train ")[2])


@pytest.mark.parametrize(
    "resume",
    [
        *(["--resume"], ["--resume", "true"], ["--resume", "false"], ["--resume=true"], ["--resume=True"]),
        *(["--continue-training", "false"], ["--resume-from-checkpoint=old"], ["--hub-token", "secret"]),
    ],
)
def test_a_flag_is_left_out_together_with_its_value(resume):
    # `true` was left over, and read as a file of settings or as a second data file.
    rest = ["--max_steps", "4", "--output_dir", "out"]
    assert words_of([*resume, *OF_A_RUN, *rest]) == [*OF_A_RUN, *rest, "--resume"]
    assert words_of([*OF_A_RUN, *resume, *rest]) == [*OF_A_RUN, *rest, "--resume"]
    read("train", words_of([*OF_A_RUN, *rest, *resume]))


def test_flags_that_only_begin_like_one_that_is_left_out_stay():
    words = [*OF_A_RUN, "--resume_anyway", "true", "--output_dir", "out"]
    assert words_of(words) == [*words, "--resume"]


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("resume_from_checkpoint: old", "--resume_from_checkpoint"),
        ("continue_training: true\ncheckpoint: old", "--continue_training --checkpoint"),
    ],
)
def test_a_start_that_a_yaml_file_sets_is_named(tmp_path, start, flags):
    # With --resume as well, the printed command was refused: each names a checkpoint to resume from.
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model_path: base\ndataset_path: train.jsonl\n{start}\n")
    assert f"--resume in place of {flags} continues" in told([str(settings), "--output_dir", "out"])
