"""Environment: variables that a launcher sets pass; those left over from another job are reported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.settings import environment
from atomtune.settings.environment import (
    SPINS,
    cache_notices,
    environment_problems,
    number_problems,
    repetition_notice,
    waiting_notice,
)
from atomtune.settings.read import read_train
from atomtune.train.arguments import spare_folder

FOUR = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        FOUR,
        FOUR | {"RANK": "3", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "none"},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},  # a cluster's defaults, without a job
        FOUR | {"WORLD_SIZE": "1"},
        FOUR | {"PMI_SIZE": "2"},  # torchrun, started by MPI on each of two machines
        {"PMI_SIZE": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"},
        {"ACCELERATE_USE_FSDP": "False", "ACCELERATE_MIXED_PRECISION": "no"},
    ],
)
def test_variables_set_by_a_launcher_are_accepted(environment):
    assert list(environment_problems(environment)) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "not RANK, MASTER_ADDR, MASTER_PORT", "unset WORLD_SIZE")),
        ({"RANK": "2"}, ("RANK=2", "unset RANK")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("RANK=0, WORLD_SIZE=2", "not MASTER_ADDR, MASTER_PORT")),
        (FOUR | {"RANK": "4"}, ("RANK=4 of WORLD_SIZE=4", "unset RANK WORLD_SIZE")),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0", "unset WORLD_SIZE")),
        (FOUR | {"WORLD_SIZE": "many"}, ("WORLD_SIZE is 'many'", "a whole number")),
        (FOUR | {"MASTER_PORT": "x"}, ("MASTER_PORT is 'x'", "from 1 to 65,535", "unset MASTER_PORT")),
        (FOUR | {"MASTER_PORT": "99999"}, ("MASTER_PORT is '99999'",)),
        ({"LOCAL_RANK": "0"}, ("LOCAL_RANK=0", "not RANK, WORLD_SIZE", "unset LOCAL_RANK")),
        (FOUR | {"LOCAL_RANK": "-1"}, ("LOCAL_RANK is '-1'",)),
        ({"PMI_SIZE": "4", "SLURM_NTASKS": "4"}, ("PMI_SIZE=4", "MPI", "unset PMI_SIZE")),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, ("OMPI_COMM_WORLD_SIZE is 'many'", "a whole number")),
    ],
)
def test_leftover_launcher_variables_are_reported_with_the_remedy(environment, named):
    (said,) = environment_problems(environment)
    assert all(part in said for part in (*named, "torchrun"))


def test_a_multi_process_job_without_torchrun_gets_a_waiting_notice():
    assert "process 0 of 4" in str(waiting_notice(FOUR))
    assert waiting_notice(FOUR | {"TORCHELASTIC_RUN_ID": "none"}) is None
    assert waiting_notice(FOUR | {"WORLD_SIZE": "1"}) is None
    assert waiting_notice({}) is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, ("ACCELERATE_TORCH_DEVICE=meta", "unset", "--use_cpu")),
        ({"ACCELERATE_USE_CPU": "maybe"}, ("ACCELERATE_USE_CPU is 'maybe'", "true or false")),
        ({"ACCELERATE_USE_FSDP": ""}, ("ACCELERATE_USE_FSDP is ''",)),
    ],
)
def test_harmful_accelerate_variables_are_reported(environment, named):
    (problem,) = environment_problems(environment)
    assert all(part in problem for part in named)


def test_a_variable_that_breaks_a_library_import_is_reported(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "soon")
    assert main(["inspect", "--dataset_path", "x.jsonl"]) == 2
    assert "HF_HUB_DOWNLOAD_TIMEOUT is 'soon'; expected a number of seconds" in capsys.readouterr().err


def test_half_precision_from_the_environment_is_refused_on_a_cpu(models, dialogues, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert "ACCELERATE_MIXED_PRECISION=bf16" in capsys.readouterr().err


def test_a_cache_path_relative_to_the_working_directory_is_reported():
    relative = {
        "HF_HOME": "cache",
        "HF_DATASETS_CACHE": "./cache/data",
        "HF_HUB_CACHE": "/abs",
        "XDG_CACHE_HOME": "~/c",
        "HF_MODULES_CACHE": "~nobody-here/c",
    }
    notices = list(cache_notices(relative))
    assert [notice.split()[0] for notice in notices] == ["HF_HOME", "HF_DATASETS_CACHE"]
    assert str(Path("cache").absolute()) in notices[0]


def test_a_folder_of_another_job_in_the_environment_is_not_written_to(models, dialogues, tmp_path, monkeypatch):
    monkeypatch.setenv("ATOMTUNE_OUTPUT_DIR", str(tmp_path / "another-job"))
    monkeypatch.chdir(tmp_path)
    for name, value in FOUR.items():
        monkeypatch.setenv(name, value)
    settings = read_train(["--model_path", str(models("llama")), "--dataset_path", str(dialogues)])
    assert spare_folder(settings) == Path("runs/dialogues-1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_folder_that_cannot_be_created_is_reported_without_traceback(name, models, dialogues, tmp_path):
    # Inside a file, where not even root can create a folder.
    (tmp_path / "file").write_text("x")
    left_out = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment[name] = str(tmp_path / "file" / "cache")
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "atomtune", *command, "--output_dir", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / 'file' / 'cache'}" in done.stderr
    assert "Set HF_DATASETS_CACHE to a folder that can be written." in done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_with_a_command_that_does_not_share_its_work_is_reported(tmp_path, capsys, monkeypatch):
    # Regression: every process printed the same evaluation, and of a merge the second one ended the first.
    torchrun = FOUR | {"TORCHELASTIC_RUN_ID": "none"}
    assert repetition_notice("train", torchrun) is None
    assert repetition_notice("evaluate", FOUR) is None  # a cluster's own variables, in a pod for one command
    assert repetition_notice("evaluate", torchrun | {"WORLD_SIZE": "1"}) is None
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert main(["runs", str(tmp_path)]) == 0
    assert "each of these 4 does all the work of runs. Start it without torchrun." in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="another library of OpenMP")
@pytest.mark.parametrize(("own", "spins"), [({}, SPINS), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own, spins, tmp_path):
    """The OpenMP library prints its settings when torch loads it, here after a command has run."""
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"from atomtune.cli import main; main(['runs', {str(tmp_path)!r}]); import torch"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=others | {"OMP_DISPLAY_ENV": "VERBOSE"} | own,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr


def test_in_a_container_there_are_as_many_threads_as_it_has_cores(monkeypatch, tmp_path):
    """Regression: with a share of 2 of 64 cores, 64 threads stopped each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "removed after the test, too")
    monkeypatch.setattr(environment, "visible_cores", lambda: 64)
    threads = []
    for granted, own in ((2, None), (64, None), (2, "3")):
        monkeypatch.setattr(environment, "cores", lambda granted=granted: granted)
        os.environ.pop("OMP_NUM_THREADS", None)
        if own:
            os.environ["OMP_NUM_THREADS"] = own
        assert main(["runs", str(tmp_path)]) == 0
        threads.append(os.environ.get("OMP_NUM_THREADS"))
    assert threads == ["2", None, "3"]


def test_a_deleted_working_directory_is_reported_once(models, dialogues, tmp_path):
    # Regression: one of torch's libraries ended the process: "Intel oneMKL FATAL ERROR: Cannot load libtorch_cpu.so".
    words = ["inspect", str(dialogues), "--model_path", str(models("llama"))]
    command = f'mkdir gone; cd gone; rmdir ../gone; exec "{sys.executable}" -m atomtune "$@"'
    done = subprocess.run(
        ["bash", "-c", command, "-", *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr.count("no longer exists, or cannot be read")) == (2, 1), done.stderr


def test_python_started_without_docstrings_is_reported(tmp_path):
    # transformers builds classes from its docstrings. Regression: every command ended in a traceback.
    words = [sys.executable, "-OO", "-m", "atomtune", "runs", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("PYTHONOPTIMIZE")) == (2, 2), done.stderr


def test_a_non_numeric_datasets_memory_size_is_reported():
    name = "HF_DATASETS_IN_MEMORY_MAX_SIZE"
    (told,) = number_problems({name: "abc"})
    assert told == f"the environment variable {name} is 'abc'; expected a number of bytes. `unset {name}`."
    assert not list(number_problems({name: "1e9"}))
