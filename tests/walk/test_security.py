"""Planted programs: files that run code if they are read carelessly. None may run; each is refused or ignored."""

import io
import json
import os
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atomtune.cli import main
from atomtune.model import load_errors
from atomtune.train.checkpoint.atomic import MANIFEST, checkpoints, damage, read_manifest, seal
from atomtune.train.checkpoint.state import state_files
from tests.conftest import write_jsonl
from tests.trained import whole_run


class Program:
    """Unpickling this creates the mark file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "it-ran"


def plant(file: Path, mark: Path, *, zipped: bool = True) -> None:
    """Write a file that torch.load, or pickle.load, would execute."""
    if zipped:
        torch.save({"state": Program(mark), "weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(pickle.dumps(Program(mark)))


def test_the_planted_pickle_executes_if_loaded_unsafely(tmp_path, mark):
    # Otherwise no test below could fail.
    plant(tmp_path / "file", mark)
    torch.load(tmp_path / "file", weights_only=False)
    assert mark.exists()


def train(base, data, out, *more) -> list[str]:
    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)]
    return [*command, "--max_steps", "4", "--save_steps", "2", "--dtype", "float32", *more]


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("whole"), lambda data, out: train(models("llama"), data, out))[1]


@pytest.fixture
def whole(undisturbed, tmp_path) -> Path:
    """The folder of a finished run on the dialogues, in which a test may plant files."""
    return Path(shutil.copytree(undisturbed, tmp_path / "whole"))


@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "pickle"])
def test_malicious_pickled_adapter_weights_are_refused_and_not_executed(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, tmp_path, mark, capsys, zipped
):
    folder = tmp_path / "checkpoint-40000"
    folder.mkdir()
    plant(folder / "adapter_model.bin", mark, zipped=zipped)
    flags = ["--continue_training", "--checkpoint", str(folder)]
    assert main(train(models("llama"), dialogues, tmp_path / "out", *flags)) == 2
    assert "weights cannot be read as tensors" in capsys.readouterr().err
    assert not mark.exists()


def test_chat_and_merge_refuse_a_malicious_pickled_adapter(whole, tmp_path, mark, capsys):
    (whole / "adapter_model.safetensors").unlink()
    plant(whole / "adapter_model.bin", mark)
    for command in (["chat", "--prompt", "x"], ["merge", "--output_dir", str(tmp_path / "merged")]):
        assert main([*command, "--adapter_path", str(whole)]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


def test_malicious_pickled_base_weights_are_refused_and_not_executed(models, dialogues, tmp_path, mark, capsys):
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    for file in base.glob("model*.safetensors*"):
        file.unlink()
    plant(base / "pytorch_model.bin", mark)
    assert main(train(base, dialogues, tmp_path / "out")) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


#: The file names under which the library opens states, and files that are opened elsewhere.
STATES = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"]
STATES += ["pytorch_model_fsdp.bin"]
OTHERS = ["training_args.bin", "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "random-0.pkl"]


@pytest.mark.parametrize("name", STATES)
def test_a_malicious_state_file_planted_in_a_checkpoint_is_refused(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, whole, tmp_path, mark, capsys, name
):
    # A changed or an added file: the checkpoint no longer fits its manifest.
    kept = checkpoints(whole)[-1]
    plant(kept / name, mark)
    assert main(train(models("llama"), dialogues, tmp_path / "out", "--resume_from_checkpoint", str(kept))) == 2
    assert name in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("name", STATES)
def test_a_malicious_state_file_with_a_valid_manifest_is_refused(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, whole, tmp_path, mark, capsys, name, zipped
):
    # A manifest proves that nothing changed, not who wrote it, so the file itself must be harmless.
    kept = checkpoints(whole)[-1]
    plant(kept / name, mark, zipped=zipped)
    facts = {key: value for key, value in read_manifest(kept).items() if key not in ("files", "sha256")}
    staging = kept.rename(tmp_path / "staging")
    (staging / MANIFEST).unlink()
    seal(staging, kept, facts)
    assert damage(kept) == []
    assert main(train(models("llama"), dialogues, tmp_path / "out", "--resume_from_checkpoint", str(kept))) == 2
    told = capsys.readouterr().err
    assert f"{kept / name} is damaged, or it is a program and not only tensors" in told
    assert not mark.exists()


@pytest.mark.parametrize("name", OTHERS)
def test_a_malicious_file_beside_the_checkpoint_states_is_not_opened(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, whole, tmp_path, mark, name
):
    out = tmp_path / "out"
    kept = checkpoints(whole)[-1]
    (kept / name).parent.mkdir(exist_ok=True)
    plant(kept / name, mark, zipped=".metadata" not in name)
    assert main(train(models("llama"), dialogues, out, "--resume_from_checkpoint", str(kept))) == 0
    assert not mark.exists()
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def foreign(whole, tmp_path) -> Path:
    """A checkpoint as another tool leaves it, without a manifest."""
    folder = Path(shutil.copytree(checkpoints(whole)[-1], tmp_path / "checkpoint-2"))
    (folder / MANIFEST).unlink()
    return folder


def test_a_checkpoint_of_another_tool_is_resumed(models, dialogues, foreign, tmp_path):
    # Otherwise the next test could not fail.
    assert main(train(models("llama"), dialogues, tmp_path / "out", "--resume_from_checkpoint", str(foreign))) == 0


@pytest.mark.parametrize("name", STATES)
def test_a_malicious_state_in_a_checkpoint_of_another_tool_is_refused(  # noqa: PLR0917  # pytest's fixtures
    models, dialogues, foreign, tmp_path, mark, capsys, name
):
    plant(foreign / name, mark)
    assert main(train(models("llama"), dialogues, tmp_path / "out", "--resume_from_checkpoint", str(foreign))) == 2
    assert not mark.exists()
    assert "is a program and not only tensors" in capsys.readouterr().err


def test_a_safetensors_index_pointing_outside_the_folder_is_refused(models, dialogues, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (base / "model.safetensors").rename(elsewhere)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(train(base, dialogues, tmp_path / "out")) == 2
    assert "'../elsewhere.safetensors', which is not a file name in this folder" in capsys.readouterr().err


def test_a_pickle_index_pointing_outside_the_folder_is_refused(models, dialogues, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "elsewhere.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.bin")}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert main(train(base, dialogues, tmp_path / "out")) == 2
    assert "'../elsewhere.bin', which is not a file name in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_corrupt_weights_index_is_named(models, dialogues, tmp_path, capsys, content):
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    (base / "model.safetensors.index.json").write_text(content)
    assert main(train(base, dialogues, tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "model.safetensors.index.json c" in told, "cannot be read, or cannot be used"
    assert "xpected a" in told


def test_a_mirrors_password_is_not_printed(dialogues, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:sesame@127.0.0.1:9")
    monkeypatch.setattr(load_errors, "OFFLINE_BY_CHOICE", False)
    assert main(train("someone/some-model", dialogues, tmp_path / "out")) == 2
    told = capsys.readouterr()
    assert "127.0.0.1:9" in told.err
    assert "sesame" not in told.out + told.err
    assert not (tmp_path / "out").exists()


def test_yaml_that_constructs_a_python_object_is_refused(tmp_path, mark, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"output_dir: !!python/object/apply:os.system ['touch {mark}']\n")
    assert main(["train", str(settings)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(settings.read_text())


def test_a_chat_template_cannot_run_system_commands(models, dialogues, tmp_path, mark, capsys):
    template = tmp_path / "mine.jinja"
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    template.write_text(escape + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert main(train(models("llama"), dialogues, tmp_path / "out", "--template", str(template))) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


def test_the_only_pickles_a_run_writes_are_tensor_only_states(models, dialogues, tmp_path):
    out = tmp_path / "out"
    assert main(train(models("llama"), dialogues, out)) == 0
    states = [file for checkpoint in checkpoints(out) for file in state_files(checkpoint)]
    assert {file.name for file in states} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    others = [path for path in out.rglob("*") if path.is_file() and path not in states]
    assert {path.suffix for path in others} <= {".json", ".safetensors", ".md", ".jinja", ".png", ".html", ".lock", ""}
    for path in others:
        assert not path.read_bytes().startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")), path
    harmless = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch ByteStorage", "torch DoubleStorage"}
    harmless |= {"collections OrderedDict", "numpy dtype", "numpy ndarray", "_codecs encode"}
    harmless |= {"numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct"}
    for file in states:
        with zipfile.ZipFile(file) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            assert names_in(archive.read(name)) <= harmless


def names_in(pickled: bytes) -> set[str]:
    """All names that unpickling would look up and call, found without unpickling."""
    words: list[str] = []
    found = set()
    for opcode, argument, _ in pickletools.genops(io.BytesIO(pickled)):
        if opcode.name == "GLOBAL":
            found.add(argument)
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(words[-2:]))
        elif isinstance(argument, str):
            words.append(argument)
    return found


def test_a_hub_token_is_neither_printed_nor_written_to_files(models, tmp_path, capsys):
    token = "hf_" + "secret" * 5
    data = write_jsonl(tmp_path / "d.jsonl", [{"instruction": f"q{n}", "output": "a"} for n in range(8)])
    out = tmp_path / "out"
    assert main(train(models("llama"), data, out, "--hub_token", token)) == 0
    told = capsys.readouterr()
    assert token not in told.out + told.err
    assert not [path for path in out.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert json.loads((out / "run.json").read_text())["settings"]["hub_token"]["value"] == "(not kept)"


def test_truncated_adapter_and_base_weights_are_reported(models, dialogues, whole, tmp_path, capsys):
    base, adapter = tmp_path / "base", whole / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    assert main(["chat", "--prompt", "x", "--adapter_path", str(whole)]) == 2
    assert "cannot be read as tensors" in capsys.readouterr().err
    shutil.copytree(models("llama"), base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    assert main(train(base, dialogues, tmp_path / "two")) == 2
    assert str(base) in capsys.readouterr().err
