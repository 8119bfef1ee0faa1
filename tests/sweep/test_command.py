"""Sweep: each trial is the run of its settings file, the best has the lowest loss, and no trial runs twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from atomtune import sweep
from atomtune.cli import main
from atomtune.console import Console
from atomtune.errors import BadSettings
from atomtune.language import spoken
from atomtune.settings.read import read
from atomtune.sweep import trial_process
from atomtune.sweep.command import _first, _next, _shown
from atomtune.sweep.search import Grid
from atomtune.sweep.trials import Sweep, Trial
from tests.conftest import numbered_dialogues, write_jsonl
from tests.tiny import build

FAST = ("--max_steps", "12", "--eval_size", "8", "--eval_steps", "4", "--per_device_train_batch_size", "4")
RATES = ("--try", "learning_rate=1e-3,1e-2,5e-3")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def sweep_record(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture(scope="module")
def of_the_session(tmp_path_factory) -> Path:
    """A folder that all test workers share: a sweep takes long, so the first worker's is used by all."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def run(of_the_session) -> tuple[str, ...]:
    base, data = of_the_session / "swept-base", of_the_session / "swept.jsonl"
    with FileLock(f"{data}.lock"):
        if not data.exists():
            build("llama", base)
            write_jsonl(data, numbered_dialogues())
    return ("--model_path", str(base), "--dataset_path", str(data), *FAST)


@pytest.fixture(scope="module")
def swept(run, of_the_session) -> Path:
    """A sweep of three learning rates, one far too high: its loss is not finite."""
    folder = of_the_session / "swept"
    with FileLock(f"{folder}.lock"):
        if not (folder / "sweep.html").exists():
            flags = ("--try", "learning_rate=1e-3,1e-2,1e30", "--output_dir", str(folder))
            assert main(["sweep", *run, *flags]) == 0
    return folder


def test_planning_leaves_nothing_in_the_folder_if_it_is_killed(run, tmp_path, monkeypatch):
    in_folder = []

    def planned(command, **_options):
        in_folder.extend(path.name for path in tmp_path.iterdir())
        return subprocess.CompletedProcess(command, 2, stdout="", stderr="atomtune plan: no")

    monkeypatch.setattr(subprocess, "run", planned)
    assert main(["sweep", *run, "--output_dir", str(tmp_path)]) == 2
    assert in_folder == [".lock"]


@pytest.mark.slow
def test_every_trial_is_a_run_with_its_settings_on_the_same_held_out_records(swept):
    trials = sweep_record(swept)["trials"]
    assert [trial["settings"] for trial in trials] == [{"learning_rate": rate} for rate in ("1e-3", "1e-2", "1e30")]
    records = [record_of(swept / f"trial-{number}") for number in (1, 2)]
    assert [record["settings"]["learning_rate"]["value"] for record in records] == [1e-3, 1e-2]
    assert records[0]["records_held_out"] == records[1]["records_held_out"]
    assert [trial["eval_loss"] for trial in trials[:2]] == [record["eval_loss"] for record in records]


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_sweep_continues(swept):
    failed = sweep_record(swept)["trials"][2]
    assert failed["status"] == "failed" and failed["eval_loss"] is None
    assert "not finite" in failed["reason"] or "is nan" in failed["reason"]
    assert sweep_record(swept)["status"] == "finished"


@pytest.mark.slow
def test_the_best_is_the_lowest_and_its_file_trains_the_very_same_adapter(swept, tmp_path):
    losses = {name: record_of(swept / name)["eval_loss"] for name in ("trial-1", "trial-2")}
    assert sweep_record(swept)["best"] == min(losses, key=losses.__getitem__)
    assert main(["train", str(swept / "run.yaml"), "--output_dir", str(tmp_path / "best")]) == 0
    assert record_of(tmp_path / "best")["eval_loss"] == min(losses.values())


@pytest.mark.slow
def test_the_page_and_the_picture_show_every_trial(swept):
    page = (swept / "sweep.html").read_text()
    assert all(f"trial-{number}" in page for number in (1, 2, 3)) and "<script" not in page
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")


def started(run: tuple[str, ...], folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "atomtune", "sweep", *run, "--output_dir", str(folder), *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_trial(number: int, process: subprocess.Popen, folder: Path) -> psutil.Process:
    """Wait until a trial has started; returns its process."""
    for _ in range(1200):
        assert process.poll() is None, process.stderr.read()
        if (folder / f"trial-{number}.yaml").exists() and (children := psutil.Process(process.pid).children()):
            return children[0]
        time.sleep(0.1)
    raise AssertionError(f"no trial {number} within two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_a_stopped_sweep_resumes_without_rerunning_finished_trials(swept, run, tmp_path, capsys, number):
    folder = tmp_path / "out"
    shutil.copytree(swept, folder)
    before = {name: (folder / name / "run.json").stat().st_mtime_ns for name in ("trial-1", "trial-2")}
    process = started(run, folder, *RATES, "--resume")  # a value is added
    trial = wait_for_trial(4, process, folder)
    os.kill(process.pid, number)
    error = process.communicate(timeout=120)[1]
    trial.wait(60)  # it ends with the sweep, even if that was killed
    if number == signal.SIGINT:
        assert process.returncode == 75
        assert "trials are done and kept" in error and "--resume" in error
        assert [trial["status"] for trial in sweep_record(folder)["trials"]][-1] == "stopped"
    assert main(["sweep", *run, *RATES, "--output_dir", str(folder), "--resume", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [trial["status"] for trial in printed["trials"]] == ["finished", "finished", "failed", "finished"]
    assert {name: (folder / name / "run.json").stat().st_mtime_ns for name in before} == before


@pytest.mark.slow
def test_errors_are_reported_before_any_trial_and_leave_no_folder(run, tmp_path, capsys):
    folder = tmp_path / "out"
    flags = ("--output_dir", str(folder))
    assert main(["sweep", *run, *flags, "--try", "learning_rat=1,2"]) == 2
    assert "Did you mean --learning_rate?" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    assert main(["sweep", *run[:2], "--dataset_path", str(broken), *flags]) == 2
    assert "broken.jsonl" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.slow
def test_a_sweep_counts_the_records_of_its_evaluation_file(run, tmp_path):
    base, data = run[1], run[3]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", numbered_dialogues()[:7])
    short = ("--max_steps", "2", "--eval_path", str(held_out), "--try", "learning_rate=1e-3")
    folder = tmp_path / "out"
    assert main(["sweep", "--model_path", base, "--dataset_path", data, *short, "--output_dir", str(folder)]) == 0
    assert sweep_record(folder)["records_held_out"] == 7


@pytest.mark.slow
def test_few_records_of_which_none_are_held_out_are_refused(run, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    assert main(["sweep", *run[:2], "--dataset_path", str(few), "--output_dir", str(tmp_path / "out")]) == 2
    assert "--eval_size N, or --eval_path FILE" in capsys.readouterr().err


def test_the_first_sampled_trial_has_the_usual_values_in_any_spelling():
    # Only a value spelled as Python prints it was found, so that 32 was not the default 32.0, nor false False.
    words = ["--model_path", "base", "--dataset_path", "d.jsonl", "--trials", "2"]
    settings = read("sweep", [*words, "--try", "lora_alpha=16,32", "use_rslora=true,false", "lora_rank=8,16"])
    first = {"lora_alpha": "32", "use_rslora": "false", "lora_rank": "8"}
    assert _first(settings, Sweep("running", {}, settings.tried)) == first


def test_the_line_of_a_trial_is_chinese(capsys):
    """Regression: in a log it stayed “trial 1 of 2”: so short a text was not recognized as a message."""
    search = Grid({"learning_rate": ("0.001", "0.003")})
    with (
        spoken("zh"),
        _shown(Trial(1, {"learning_rate": "0.001"}), search, Console(), behind=search.watching(None, [])),
    ):
        pass
    assert capsys.readouterr().out.startswith("第 1 次试验，共 2 次：learning_rate 0.001\n")


def test_a_resumed_sweep_repeats_every_trial_without_a_result_once():
    statuses = ("finished", "failed", "pruned", "running", "stopped", "waiting")
    trials = tuple(Trial(n, {"lora_rank": str(n)}, status) for n, status in enumerate(statuses, 1))
    tried = {"lora_rank": tuple(map(str, range(1, 8)))}
    sweep, attempted = Sweep("running", {}, tried, trials), set()
    while (trial := _next(sweep, Grid(tried), attempted)) is not None:
        assert trial.number not in attempted
        attempted.add(trial.number)
        sweep = sweep.with_trial(replace(trial, status="failed"))
    assert attempted == {2, 4, 5, 6, 7}


def test_a_sweep_is_resumed_only_with_resume_and_unchanged_settings(by_stand_in, capsys):
    pytest.importorskip("optuna")
    swept = ("--trials", "1", "--try", "learning_rate=1e-3,2e-3")
    assert by_stand_in(*swept) == 0
    for more, said in (
        ((), "already holds a sweep"),
        (("--resume", "--lora_rank", "2"), "--lora_rank was not set when the sweep began and is 2 now"),
        (("--resume", "--try", "learning_rate=1e-3,2e-3,4e-3"), "--try differs from what it was"),
    ):
        assert by_stand_in(*swept, *more) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert by_stand_in(*swept, "--resume") == 0


def test_trials_with_nothing_left_to_try_are_refused(by_stand_in, tmp_path, capsys):
    # Regression: the same run was trained --trials times, and the first of them was called the best.
    pytest.importorskip("optuna")
    fixed = ("--trials", "2", "--learning_rate", "1e-3", "--lora_rank", "8")
    assert by_stand_in(*fixed, "--lora_dropout", "0") == 2
    assert "learning_rate, lora_rank, lora_dropout are all fixed" in capsys.readouterr().err
    assert by_stand_in(*fixed) == 0
    assert [set(settings) for settings in tried_in(tmp_path / "out")] == 2 * [{"lora_dropout"}]


def test_a_sweep_does_not_mix_with_other_files(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sweep", *run, *RATES, "--output_dir", str(tmp_path)]) == 2
    assert "is not empty and holds no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["mine.txt"]


@pytest.mark.slow
def test_without_try_three_learning_rates_around_the_derived_one_are_tried(run, tmp_path):
    settings = dict(zip([flag[2:] for flag in run[::2]], run[1::2], strict=True))
    paths = {name: settings.pop(name) for name in ("model_path", "dataset_path")}
    result = sweep(**paths, output_dir=tmp_path / "out", **{**settings, "max_steps": 2, "eval_steps": 2, "wd": 0})
    assert len(result.notices) == 1 and "wd → weight_decay" in result.notices[0]
    rates = sorted(float(trial.settings["learning_rate"]) for trial in result.trials)
    # 5e-4 (2000 / 32)^0.78 exceeds the highest rate that is derived, 4e-3; a short run gets 1.5 times that.
    assert rates == pytest.approx([2e-3, 6e-3, 18e-3])
    assert result.best.eval_loss == min(trial.eval_loss for trial in result.trials)
    assert result.load().chat("?") is not None
    with pytest.raises(BadSettings, match="already holds a sweep"):
        sweep(**paths, output_dir=tmp_path / "out")


#: Stands for Python with `-m atomtune plan` or `train`. The loss is lowest at a learning rate of 2e-3 and rank 8.
PROGRAM = """#!{python}
import json, math, pathlib, sys, yaml
command, file = sys.argv[3:5]
settings = yaml.safe_load(open(file))
if command == "plan":
    print(json.dumps({{"records_held_out": 5, "learning_rate": 0.001, "seconds": 0.5}}))
    sys.exit()
rate, rank = float(settings["learning_rate"]), int(settings.get("lora_rank", 8))
if rate > 1:
    sys.exit("atomtune train: Out of memory.")
folder = pathlib.Path(settings["output_dir"])
folder.mkdir(exist_ok=True)
loss = 1 + abs(math.log10(rate / 2e-3)) + abs(math.log2(rank / 8))
history = [{{"step": 0, "loss": 9.0}}, {{"step": 4, "loss": loss}}]
record = {{"eval_history": history, "steps": 4, "steps_planned": 4, "eval_loss": loss, "records_held_out": ["d:1"]}}
(folder / "run.json").write_text(json.dumps(record))
"""


@pytest.fixture
def by_stand_in(tmp_path, monkeypatch):
    """A function that sweeps with PROGRAM in place of Python, so that a trial takes no time; returns the exit code."""
    file = tmp_path / "program"
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(trial_process, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(sys, "executable", str(file))
    data = write_jsonl(tmp_path / "d.jsonl", numbered_dialogues())
    words = ["sweep", "--model_path", "base", "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")]
    return lambda *more: main([*words, *more])


def tried_in(folder: Path) -> list[dict]:
    return [trial["settings"] for trial in sweep_record(folder)["trials"]]


def test_the_first_sampled_trial_is_the_usual_run_and_fixed_settings_are_not_tried(by_stand_in, tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "out"
    assert by_stand_in("--trials", "3", "--lora_dropout", "0.2") == 0
    first, *others = tried_in(out)
    assert first == {"learning_rate": "0.001", "lora_rank": "8"}  # as planned, and the default
    assert len(others) == 2 and all(1e-4 <= float(settings["learning_rate"]) <= 1e-2 for settings in others)
    losses = {trial["name"]: trial["eval_loss"] for trial in named_trials(out)}
    assert sweep_record(out)["best"] == min(losses, key=losses.__getitem__)
    # More trials, which are chosen from the results of the earlier ones.
    assert by_stand_in("--trials", "5", "--lora_dropout", "0.2", "--resume") == 0
    assert tried_in(out)[:3] == [first, *others] and len(tried_in(out)) == 5


def named_trials(folder: Path) -> list[dict]:
    return [{**trial, "name": f"trial-{trial['number']}"} for trial in sweep_record(folder)["trials"]]


def test_only_the_settings_of_try_are_tried_and_a_range_begins_in_its_middle(by_stand_in, tmp_path):
    pytest.importorskip("optuna")
    assert by_stand_in("--trials", "2", "--try", "learning_rate=1e-4:1e-2", "lora_rank=4,16") == 0
    assert [set(settings) for settings in tried_in(tmp_path / "out")] == 2 * [{"learning_rate", "lora_rank"}]
    assert tried_in(tmp_path / "out")[0]["learning_rate"] == "0.001"


def test_sampled_trials_on_streamed_records_need_no_learning_rate_among_their_settings(by_stand_in, tmp_path):
    # Regression: it was refused because the learning rates to try were not named, although others were.
    pytest.importorskip("optuna")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", numbered_dialogues()[:1])
    streamed = ("--streaming", "--max_steps", "4", "--eval_path", str(held_out), "--learning_rate", "1e-3")
    assert by_stand_in(*streamed, "--trials", "2", "--try", "lora_rank=4,8") == 0
    assert [set(settings) for settings in tried_in(tmp_path / "out")] == 2 * [{"lora_rank"}]


def test_a_sweep_without_try_runs_three_rates_and_its_files_hold_all_settings(by_stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    assert by_stand_in("--max_steps", "4", "--save_total_limit", "2") == 0
    assert tried_in(out) == [{"learning_rate": rate} for rate in ("0.001", "0.00033", "0.003")]
    said = capsys.readouterr().out
    assert "3 trials, in" in said and "lowest of those tried" not in said and "highest of those tried" in said
    assert "trial-1  learning_rate 0.001  held-out loss 1.3010 at step 4, the best so far (" in said
    assert "trial-2  learning_rate 0.00033  held-out loss 1.7825 at step 4 (" in said
    best, trial = (yaml.safe_load((out / name).read_text()) for name in ("run.yaml", "trial-3.yaml"))
    assert best["learning_rate"] == 0.003 and best["max_steps"] == 4 and "output_dir" not in best
    assert trial == {**best, "output_dir": str(out / "trial-3")}
    assert (trial["save_total_limit"], sweep_record(out)["records_held_out"]) == (2, 5)


def test_a_trial_keeps_few_checkpoints_by_default_and_what_it_held_out_is_counted(by_stand_in, tmp_path, capsys):
    # Of a sweep that cannot be planned, the trials themselves tell how many records they hold out.
    out = tmp_path / "out"
    held_out = write_jsonl(tmp_path / "held_out.jsonl", numbered_dialogues()[:1])
    streamed = ("--streaming", "--max_steps", "4", "--eval_path", str(held_out))
    assert by_stand_in(*streamed) == 2
    assert "the learning rates to try must be named" in capsys.readouterr().err
    assert by_stand_in(*streamed, "--try", "learning_rate=1e-3") == 0
    assert yaml.safe_load((out / "trial-1.yaml").read_text())["save_total_limit"] == 1
    assert sweep_record(out)["records_held_out"] == 1 and sweep_record(out)["seconds_expected"] is None


def test_a_sweep_whose_trials_all_fail_gives_their_reasons_and_is_repeated_by_a_resume(by_stand_in, tmp_path, capsys):
    assert by_stand_in("--try", "learning_rate=5,6") == 3
    said = capsys.readouterr().err
    assert "trial-1 (learning_rate 5): Out of memory." in said and "trial-2 (learning_rate 6): Out of memory." in said
    assert not (tmp_path / "out" / "run.yaml").exists()
    assert by_stand_in("--try", "learning_rate=5,6,1e-3", "--resume") == 0
    assert [trial["status"] for trial in sweep_record(tmp_path / "out")["trials"]] == ["failed", "failed", "finished"]
    assert (tmp_path / "out" / "trial-1.log").read_text().count("Out of memory") == 2


def test_resuming_a_sweep_requires_the_whole_command(tmp_path, capsys):
    # Regression: it was refused for an --eval_size 0 that the user had not passed.
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["sweep", "--output_dir", str(tmp_path), "--resume"]) == 2
    assert "needs --model_path and --dataset_path" in capsys.readouterr().err
