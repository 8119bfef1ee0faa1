"""`atomtune runs`: the list of a folder's runs, and the differences between two."""

import json
import shutil
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from atomtune.cli import main
from atomtune.folders import held
from tests.conftest import DIALOGUES, write_jsonl


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    """Two real runs that differ in rate and rank, and a folder with a broken record."""
    top = tmp_path_factory.mktemp("runs")
    data = write_jsonl(top / "talk.jsonl", DIALOGUES)
    for name, flags in (("slow", ("--lora_rank", "4")), ("fast", ("--learning_rate", "1e-2"))):
        words = ["--model_path", str(models("llama")), "--dataset_path", str(data), "--dtype", "float32"]
        more = ["--max_steps", "3", "--logging_steps", "1", "--save_steps", "2", "--output_dir", str(top / name)]
        assert main(["train", *words, *more, *flags]) == 0
    (top / "broken").mkdir()
    (top / "broken" / "run.json").write_text('{"status": ')
    return top


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_runs_are_listed_with_data_and_loss_but_checkpoints_are_not_listed(folder, capsys):
    capsys.readouterr()
    assert main(["runs", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [Path(run["folder"]).name for run in listed] == ["slow", "fast"]  # in the order of their start
    for run in listed:
        assert run["status"] == "finished" and run["data"] == "talk.jsonl" and run["steps"] == 3
        assert run["train_loss"] == record_of(Path(run["folder"]))["train_loss"]
    assert main(["runs", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "slow" in out and "fast" in out and "finished" in out


@pytest.mark.parametrize(("eval_step", "said"), [(3, "1.25"), (2, "1.25 at step 2")])
def test_a_loss_of_another_step_than_the_kept_one_is_shown_with_its_step(folder, tmp_path, capsys, eval_step, said):
    """A run that was resumed with --eval_strategy no showed the loss of an earlier adapter as its own."""
    (tmp_path / "resumed").mkdir()
    record = {**record_of(folder / "slow"), "eval_loss": 1.25, "eval_step": eval_step}
    assert record["outcome"]["kept_step"] == 3
    (tmp_path / "resumed" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    assert f" {said} " in (out := capsys.readouterr().out) and ("at step" in out) == (eval_step != 3)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["eval_step"] == eval_step
    assert main(["runs", str(tmp_path / "resumed"), str(folder / "fast")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eval_loss"))
    assert said in row


def test_a_killed_run_is_not_listed_as_running(folder, tmp_path, capsys):
    """Its record says "running" forever, so the lock on its folder decides."""
    run = tmp_path / "run"
    shutil.copytree(folder / "slow", run)
    (run / "run.json").write_text(json.dumps({**record_of(run), "status": "running"}), encoding="utf-8")

    def status() -> str:
        capsys.readouterr()
        assert main(["runs", str(run), "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]["status"]

    with held(run, "run"):
        assert status() == "running"
    assert status() == "killed"
    (run / ".lock").unlink()  # as after copying the folder from another machine
    assert status() == "running"


def test_piped_output_has_one_line_per_run_and_untruncated_names(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "qwen3-8b-persona-" + "x" * 60
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text((folder / "slow" / "run.json").read_text())
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith(name) and " finished " in row


def test_two_runs_show_the_settings_that_differ_and_no_others(folder, capsys):
    capsys.readouterr()
    assert main(["runs", str(folder / "slow"), str(folder / "fast"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["settings"] == {"learning_rate": [6e-3, 1e-2], "lora_rank": [4, 8]}
    assert main(["runs", str(folder / "slow"), str(folder / "fast")]) == 0
    out = capsys.readouterr().out
    last = record_of(folder / "fast")["loss_history"][-1]["loss"]
    assert "lora_rank" in out and "max_steps" not in out and f"{last:.4g}" in out


def test_a_setting_given_in_only_one_run_is_shown_as_default_for_the_other(folder, tmp_path, capsys):
    """`seed  42  –` looked like another seed or none in the second run, but both had the same."""
    set_one = shutil.copytree(folder / "slow", tmp_path / "set")
    record = record_of(set_one)
    record["settings"]["seed"] = {"value": 42, "origin": "--seed"}
    (set_one / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["runs", str(set_one), str(folder / "slow")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    assert line.split() == ["seed", "42", "default"]


def test_plot_writes_a_png_of_two_runs_losses(folder, tmp_path, capsys):
    picture = tmp_path / "losses.png"
    assert main(["runs", str(folder / "slow"), str(folder / "fast"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_held_out_losses_of_two_runs_are_compared_and_plotted(folder, tmp_path, monkeypatch, capsys):
    """Runs are chosen by held-out losses, but only training losses were compared."""
    for name, losses in (("one", (3.5, 1.25)), ("two", (3.5, 2.125))):
        copy = Path(shutil.copytree(folder / "slow", tmp_path / name))
        history = [{"step": step, "loss": loss} for step, loss in zip((0, 3), losses, strict=True)]
        (copy / "run.json").write_text(json.dumps({**record_of(copy), "eval_history": history}))
    lines: list[tuple[str, list[float]]] = []
    drawn = Axes.plot

    def plot(self: Axes, steps: list[int], losses: list[float], *more: object, **options: object) -> object:
        lines.append((str(options["color"]), list(losses)))
        return drawn(self, steps, losses, *more, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    capsys.readouterr()
    words = [str(tmp_path / "one"), str(tmp_path / "two"), "--plot", str(tmp_path / "losses.svg")]
    assert main(["runs", *words]) == 0
    said = capsys.readouterr().out.partition("held-out loss at step")[2]
    assert [line.split() for line in said.splitlines()[1:3]] == [["0", "3.5", "3.5"], ["3", "1.25", "2.125"]]
    assert [colour for colour, _ in lines] == ["C0", "C0", "C1", "C1"] and lines[1][1] == [3.5, 1.25]


def test_runs_that_log_at_different_steps_are_compared_at_those_that_both_have(folder, tmp_path, capsys):
    """Only every n-th step of both together was shown, so the column of a run with fewer entries was nearly empty."""
    record = record_of(folder / "slow")
    for name, every in (("short", 2), ("long", 5)):
        history = [{"step": step, "loss": 1.5} for step in range(every, 101, every)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**record, "loss_history": history}))
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "short"), str(tmp_path / "long")]) == 0
    lines = capsys.readouterr().out.partition("loss at step")[2].splitlines()[1:]
    assert [line.split()[1:] for line in lines].count(["1.5", "1.5"]) >= 8


def test_a_run_that_ended_before_its_first_loss_is_compared_too(folder, tmp_path, capsys):
    """Its run.json has no losses yet, which ended in a traceback."""
    record = {name: value for name, value in record_of(folder / "slow").items() if not name.endswith("_history")}
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    assert main(["runs", str(folder / "slow"), str(tmp_path / "refused")]) == 0
    assert "failed" in capsys.readouterr().out


def test_a_folder_that_is_not_a_run_is_reported(folder, tmp_path, capsys):
    assert main(["runs", str(folder / "slow"), str(tmp_path)]) == 2
    assert "Pass the output folder of a run" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "No runs in" in capsys.readouterr().out


@pytest.fixture
def altered(folder, tmp_path):
    """Creates a run whose run.json has other values, alone in a folder."""

    def make(values: dict) -> Path:
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / "run.json").write_text(json.dumps({**record_of(folder / "slow"), **values}))
        return tmp_path / "odd"

    return make


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"settings": [1]}, "settings: found a list of 1, expected an object"),
        ({"settings": {"lora_rank": 8}}, "settings.lora_rank: found 8, expected an object"),
        ({"loss_history": 5}, "loss_history: found 5, expected a list"),
        ({"loss_history": [{}]}, "loss_history[0].step: found no value, expected a value"),
        ({"loss_history": [{"step": "1", "loss": 2.0}]}, 'loss_history[0].step: found "1", expected a whole number'),
    ],
    ids=str,
)
def test_a_malformed_run_json_is_reported_with_the_path_of_the_bad_value(folder, altered, capsys, values, found):
    odd = altered(values)
    assert main(["runs", str(odd.parent)]) == 0
    told = capsys.readouterr()
    assert "a run is not listed" in told.err + told.out and found in told.err + told.out
    assert main(["runs", str(folder / "fast"), str(odd)]) == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"settings": {"dataset_path": {"value": 5}}}, "5"),
        ({"loss_history": [{"step": 1, "loss": None}]}, "finished"),
        ({"started": 5, "status": [], "steps": 1e300, "train_loss": "low"}, "1e+300"),
    ],
    ids=str,
)
def test_odd_values_in_a_well_formed_run_json_are_shown_unchanged(folder, altered, capsys, values, shown):
    odd = altered(values)
    assert main(["runs", str(odd.parent)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("odd")]
    assert shown in line.split()
    assert main(["runs", str(folder / "fast"), str(odd)]) == 0


def test_an_unsupported_plot_format_is_refused_before_anything_is_printed(folder, tmp_path, capsys):
    capsys.readouterr()
    assert main(["runs", str(folder / "slow"), str(folder / "fast"), "--plot", str(tmp_path / "losses.doc")]) == 2
    told = capsys.readouterr()
    assert "expected a file that ends in .png, .pdf, .svg" in told.err and not told.out


def test_the_plot_is_written_with_json_output_too(folder, tmp_path, capsys):
    picture = tmp_path / "losses.png"
    capsys.readouterr()
    assert main(["runs", str(folder / "slow"), str(folder / "fast"), "--json", "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] and picture.is_file()


def test_a_folder_deleted_during_the_search_for_runs_is_skipped(folder, tmp_path, monkeypatch, capsys):
    """Meanwhile another run rotates its checkpoints, or a sweep its trials."""
    for name in ("gone", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "run.json").write_text((folder / "slow" / "run.json").read_text())
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name == "gone":
            path.rmdir()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert main(["runs", str(tmp_path)]) == 0
    assert "here" in capsys.readouterr().out
