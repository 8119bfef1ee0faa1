"""A run stays in its output folder, whatever is or happens there: links, damage, other runs, limits of the system."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.train import trainer as trainer_module
from atomtune.train.checkpoint.atomic import MANIFEST, checkpoints, damage
from tests.trained import whole_run

ROOT = Path(__file__).parents[2]


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_steps", "2", *more),
    ]


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole"), lambda data, out: command(models("llama"), data, out))[1]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = [
    *(".saving-adapter", ".saving-checkpoint-2", ".saving-checkpoint-4", ".replaced-checkpoint-4"),
    *(".removing-checkpoint-2", "checkpoint-2", "run.json", "loss.png", "adapter_model.safetensors", "tokenizer.json"),
    ".lock",
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if number % 2 else name for number, name in enumerate(NAMES)]
)
def test_nothing_behind_a_link_is_written_moved_or_removed(models, dialogues, undisturbed, tmp_path, name):
    # In a shared output folder, somebody may create links with the names that a run uses.
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    shutil.copytree(undisturbed / "checkpoint-2", elsewhere)
    (elsewhere / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    out.mkdir()
    leads_to = elsewhere if "saving" in name or "checkpoint" in name else tmp_path / "file"
    (out / name).symlink_to(leads_to)
    before = everything_in(elsewhere)
    code = main(command(models("llama"), dialogues, out))
    assert everything_in(elsewhere) == before
    assert (tmp_path / "file").read_text() == "mine too"
    if name in ("checkpoint-2", "run.json", "adapter_model.safetensors"):
        assert code in (0, 2)  # with these names of a run's own files, the folder may look like a run's
    elif name == ".lock":
        assert code == 2
    else:
        assert code == 0
        assert damage(out / "checkpoint-4") == []


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
RECORDS = {
    "nested": DEEP,
    "other kinds": '{"status": ["finished"], "lengths": 3, "steps": "many", "start": {}}',
    "lengths of other kinds": '{"status": "finished", "lengths": {"max_steps": "4", "num_train_epochs": null}}',
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("name", ["run.json", "checkpoint-4/manifest.json", "checkpoint-4/trainer_state.json"])
def test_damaged_json_in_the_output_folder_does_not_break_a_resume(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, undisturbed, tmp_path, capsys, name, content
):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    expected = (out / "adapter_model.safetensors").read_bytes()
    if name == "run.json":
        (out / "adapter_model.safetensors").unlink()
    else:
        (out / "run.json").write_text('{"status": "running"}')
    (out / name).write_text(content)
    assert main(command(models("llama"), dialogues, out, "--resume")) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_a_folder_in_place_of_run_json_is_reported(models, dialogues, tmp_path, capsys, resume):
    (tmp_path / "out" / "run.json").mkdir(parents=True)
    assert main(command(models("llama"), dialogues, tmp_path / "out", *resume)) == 2
    assert "run.json is a folder" in capsys.readouterr().err


def meanwhile(monkeypatch, action) -> None:
    """Call the action once, in the middle of the run."""
    real, calls = trainer_module.target_nats, []

    def target_nats(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "target_nats", target_nats)


@pytest.mark.slow
def test_a_run_whose_lock_file_was_removed_still_holds_its_folder(models, dialogues, tmp_path, monkeypatch):
    out, codes = tmp_path / "out", []

    def begin_another() -> None:
        (out / ".lock").unlink()
        again = command(models("llama"), dialogues, out, "--resume")
        done = subprocess.run([sys.executable, "-m", "atomtune", *again], capture_output=True, text=True, check=False)
        codes.append((done.returncode, "another run is already writing here" in done.stderr))

    meanwhile(monkeypatch, begin_another)
    assert main(command(models("llama"), dialogues, out)) == 0
    assert codes == [(2, True)]


def test_an_output_folder_replaced_during_the_run_is_detected(models, dialogues, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def replace() -> None:
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "theirs.txt").write_text("another run's")

    meanwhile(monkeypatch, replace)
    assert main(command(models("llama"), dialogues, out)) == 3
    assert f"{out} is not the folder this run started in" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]
    assert [path.name for path in checkpoints(tmp_path / "moved")] == ["checkpoint-2"]


LIMITED = ["--max_steps", "12", "--save_total_limit", "9"]


@pytest.fixture(scope="module")
def unlimited(models, tmp_path_factory) -> tuple[Path, Path]:
    """A file of the dialogues, and the folder of a run on it without a limit."""
    folder = tmp_path_factory.mktemp("unlimited")
    return whole_run(folder, lambda data, out: command(models("llama"), data, out, *LIMITED))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 0.95])
def test_a_limit_on_the_size_of_files_keeps_the_last_checkpoint(models, unlimited, tmp_path, share):
    """`ulimit -f` at any size up to the largest file of a save, from the second save on."""
    base, out, flags = models("llama"), tmp_path / "out", LIMITED
    dialogues, whole = unlimited
    largest = max(file.stat().st_size for file in (whole / "checkpoint-2").iterdir())
    script = (
        "import resource, sys\n"
        "from atomtune.train import trainer\n"
        "from atomtune.cli import main\n"
        "real, calls = trainer.target_nats, []\n"
        "def limited(*a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({int(share * largest)}, resource.RLIM_INFINITY))\n"
        "    return real(*a, **k)\n"
        "trainer.target_nats = limited\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command(base, dialogues, out, *flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "Last complete checkpoint" in done.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert damage(out / "checkpoint-2") == []
    assert not [path for path in out.iterdir() if path.name.startswith((".saving", ".replaced", ".removing"))]
    assert main(command(base, dialogues, out, *flags, "--resume")) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_written_by_any_command_follow_the_umask(models, dialogues, tmp_path, mask):
    # By default, safetensors and temporary files are readable only by their owner: chat failed for other users.
    out = tmp_path / "out"
    before = os.umask(mask)
    try:
        assert main(command(models("llama"), dialogues, out)) == 0
        of_run = ["--adapter_path", str(out), "--output_dir"]
        assert main(["merge", *of_run, str(tmp_path / "merged")]) == 0
        assert main(["export", *of_run, str(tmp_path / "peft"), "--to", "peft", "--for_class", "LlamaForCausalLM"]) == 0
        assert main(["evaluate", *of_run, str(tmp_path / "report"), "--dataset_path", str(dialogues)]) == 0
        page = ["--html", str(tmp_path / "page.html")]
        assert main(["inspect", "--dataset_path", str(dialogues), "--model_path", str(models("llama")), *page]) == 0
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.name != ".lock" and path != dialogues]
    files, folders = ([path for path in written if path.is_dir() == is_dir] for is_dir in (False, True))
    assert len(files) > 40
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~mask)}
    assert {oct(path.stat().st_mode & 0o777) for path in folders} == {oct(0o777 & ~mask)}
    assert json.loads((out / "checkpoint-4" / MANIFEST).read_text())["step"] == 4


def test_a_model_is_not_written_over(models, dialogues, tmp_path, capsys):
    # The run replaced its tokenizer, template and README.md, and put an adapter beside its weights.
    base = Path(shutil.copytree(models("llama"), tmp_path / "base"))
    before = everything_in(base)
    assert main(command(base, dialogues, base)) == 2
    assert "holds a model (config.json)" in capsys.readouterr().err
    assert everything_in(base) == before


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "report.html"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resumed"])
def test_a_file_that_no_run_wrote_is_not_replaced(models, dialogues, tmp_path, capsys, name, more):  # noqa: PLR0917
    # `--output_dir .` in a user's own project replaced its README.md by the adapter's.
    out = tmp_path / "project"
    out.mkdir()
    (out / name).write_text("mine")
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--output_dir", str(out)]
    assert main([*words, "--max_steps", "1", *more]) == 2
    assert f"holds {name}, which the run would replace" in capsys.readouterr().err
    assert everything_in(out) == {name: b"mine"}, "no lock is left behind either"


@pytest.mark.parametrize("place", ["out", ""])
def test_an_output_folder_inside_the_dataset_folder_is_refused(models, dialogues, tmp_path, capsys, place):
    # Otherwise its run.json would be a data file, and each checkpoint would change the hash of the records.
    data = tmp_path / "data"
    data.mkdir()
    shutil.move(dialogues, data)
    assert main(command(models("llama"), data, data / place)) == 2
    assert "would be read as records" in capsys.readouterr().err
    assert [path.name for path in data.iterdir()] == [dialogues.name]


def test_the_suggested_resume_command_omits_token_and_start_checkpoint(models, dialogues, tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model_path: {models('llama')}\ndataset_path: {dialogues}\ndtype: float32\n")
    token, out = "hf_" + "secret" * 5, tmp_path / "out"
    assert main(["train", str(settings), "--max_steps", "2", "--save_steps", "1", "--output_dir", str(out)]) == 0
    flags = ["--hub_token", token, "--max_minutes", "0.0001", "--max_steps", "4"]
    flags += ["--resume_from_checkpoint", str(out / "checkpoint-1"), "--output_dir", str(tmp_path / "two")]
    assert main(["train", *flags, "--continue_training", "false", str(settings)]) == 75
    told = capsys.readouterr()
    words = shlex.split(next(line for line in told.err.splitlines() if line.startswith("  ")).partition(" train ")[2])
    assert token not in told.err + told.out + (tmp_path / "two" / "run.json").read_text()
    assert str(settings) in words and "--hub_token" not in words and "--resume_from_checkpoint" not in words
