"""`atomtune certify` on a tiny model: a correct model holds, and each planted fault is found and reported.

Here the engine is plain transformers in this process; test_engines.py asks the real servers.
"""

import errno
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from atomtune.certify import command
from atomtune.certify.comparison import ALLOWED, EngineOutcome
from atomtune.certify.prompts import OUR_OWN, CertPrompt
from atomtune.cli import main
from atomtune.console import Console
from atomtune.engines.engine import Request, UnknownTokens
from atomtune.engines.served_folder import ServedFolder
from atomtune.engines.transformers_in_process import TransformersInProcess
from atomtune.errors import BadModel, RunFailed
from atomtune.model.adapter_folder import base_of
from atomtune.model.load import load_tokenizer
from atomtune.settings.command_settings import CertifySettings
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import build
from tests.walk.test_pages import wrong_next_steps


def certify(adapter: Path, served: Path | None = None, *more: str) -> int:
    words = ["--adapter_path", str(adapter), "--dtype", "float32", "--engine", "in-process"]
    return main(["certify", *words, *(["--served", str(served)] if served else []), *more])


def certificate_in(folder: Path) -> dict:
    (entry,) = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    return entry


@pytest.fixture
def adapter(by_heart, tmp_path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(by_heart, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def merged(by_heart, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    assert main(["merge", "--adapter_path", str(by_heart), "--output_dir", str(folder), "--dtype", "float32"]) == 0
    return folder


def test_certificate_holds_for_an_adapter_served_as_trained(adapter, capsys):
    assert certify(adapter) == 0
    entry = certificate_in(adapter)
    n = entry["prompts"]
    assert n >= 8
    counts = [entry[name] for name in ("prompt_ids_equal", "greedy_equal", "differs_from_base")]
    assert counts == [n, n, n]
    assert entry["holds"] is True and entry["stops"] == entry["should_stop"] > 0
    assert entry["max_logprob_difference"] < 1e-3  # float32 on both sides
    said = capsys.readouterr().out
    assert "serves the tuned model" in said and f"The certificate is {adapter / 'certificate.json'}." in said


def test_certificate_holds_for_a_merged_model(by_heart, merged, capsys):
    assert certify(by_heart, merged) == 0
    assert certificate_in(merged)["holds"] is True
    said = capsys.readouterr().out
    assert not wrong_next_steps(said) and f"serve --adapter_path {by_heart} --dtype float32 --served {merged}" in said


def test_merged_weights_are_allowed_the_rounding_error_of_their_dtype(by_heart, tmp_path):
    """`merge` writes the base's dtype; after training in float32, the guide's own command ended with exit code 4."""
    folder = tmp_path / "merged"
    words = ["--adapter_path", str(by_heart), "--output_dir", str(folder), "--dtype", "bfloat16"]
    assert main(["merge", *words]) == 0
    assert certify(by_heart, folder) == 0
    entry = certificate_in(folder)
    assert (
        entry["dtype"] == "bfloat16" and entry["mean_logprob_difference"] > 2e-3
    )  # more than a float32 certificate would allow


def told(capsys) -> str:
    return capsys.readouterr().err


def test_a_changed_template_is_caught_with_the_first_differing_token_id(by_heart, adapter, capsys):
    file = adapter / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert "Human: " in text
    file.write_text(text.replace("Human: ", "User: "), encoding="utf-8")
    assert certify(by_heart, adapter) == 4
    error = told(capsys)
    assert "prompts got different token ids" in error and "prompt id 1" in error
    assert "Human" in error and "User" in error  # both are shown
    assert certificate_in(adapter)["prompt_ids_equal"] == 0


def test_a_template_that_writes_the_date_is_certified_on_any_day(adapter, capsys):
    """Engines write today's date: from the day after training no certificate held, and `serve` did not start."""
    file = adapter / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %B %Y') }}" + file.read_text(encoding="utf-8"), encoding="utf-8")
    metadata = adapter / "atomtune.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "template_date": "2024-02-29"}))
    assert certify(adapter, None, "--prompts", "3") == 0
    assert "the template writes the date: 2024-02-29 in training, today's" in capsys.readouterr().out


def test_another_stop_token_is_caught(by_heart, merged, tmp_path, capsys):
    served = Path(shutil.copytree(merged, tmp_path / "served"))
    file = served / "generation_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "eos_token_id": 300}))
    assert certify(by_heart, served) == 4
    assert "not end at the right place" in told(capsys)


def test_a_served_folder_without_a_chat_template_raises_bad_model(merged, tmp_path):
    served = Path(shutil.copytree(merged, tmp_path / "served"))
    (served / "chat_template.jinja").unlink()
    engine = TransformersInProcess(ServedFolder(served), dtype="float32")
    with engine, pytest.raises(BadModel, match="there is no chat template in it"):
        engine.prompt_ids(Request([{"role": "user", "content": "Hi"}]))


def test_an_adapter_without_a_chat_template_is_named_and_not_its_temporary_view(adapter, tmp_path):
    (adapter / "chat_template.jinja").unlink()
    engine = TransformersInProcess(ServedFolder(adapter), dtype="float32")
    with engine, pytest.raises(BadModel, match=f"^{adapter}: there is no chat template in it"):
        engine.prompt_ids(Request([{"role": "user", "content": "Hi"}]))


def test_an_adapter_that_does_nothing_is_caught(adapter, capsys):
    zero_b(adapter)
    assert certify(adapter) == 4
    assert "the adapter changes nothing" in told(capsys)
    assert certificate_in(adapter)["holds"] is False


def zero_b(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: t.zero_() if "lora_B" in name else t for name, t in weights.items()}, file)


def test_an_engine_that_serves_a_zeroed_adapter_is_caught(by_heart, adapter, capsys):
    zero_b(adapter)
    assert certify(by_heart, adapter) == 4
    assert "the adapter is not applied" in told(capsys)
    assert certificate_in(adapter)["differs_from_base"] == 0


@pytest.mark.slow
def test_adapter_keys_that_the_engine_does_not_match_are_caught(by_heart, adapter, capsys):
    """As happens to the adapter of a text model on a vision-language class: it is loaded and ignored."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    other = {name.replace("model.model.layers", "model.model.language_model.layers"): t for name, t in weights.items()}
    assert other.keys() != weights.keys()
    save_file(other, file, metadata={"format": "pt"})
    assert certify(by_heart, adapter) == 4
    assert "the adapter is not applied" in told(capsys)


def test_a_merge_into_another_base_is_caught(by_heart, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    build("llama", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: t * 1.02 for name, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "merged"
    words = ["--adapter_path", str(by_heart), "--model_path", str(other), "--other_base", "--output_dir", str(out)]
    assert main(["merge", *words, "--dtype", "float32"]) == 0
    assert certify(by_heart, out) == 4
    assert "log-probabilities of the reference answers differ" in told(capsys)


def test_ids_beyond_the_served_vocabulary_are_reported_as_another_base(merged):
    """An id beyond the served model's vocabulary was an IndexError in torch, reported as a bug in atomtune."""
    with TransformersInProcess(ServedFolder(merged), dtype="float32") as engine:
        known = engine.model.get_input_embeddings().weight.shape[0]
        assert len(engine.log_probabilities([1, 2], [known - 1])) == 1
        for prompt, answer in (([1, known], [2]), ([1, 2], [known])):
            with pytest.raises(UnknownTokens, match="made of another base"):
                engine.log_probabilities(prompt, answer)


def test_a_served_model_of_another_base_replaces_an_earlier_certificate(by_heart, models, tmp_path, capsys):
    """Exit code 4 left the entry of an earlier check, `"holds": true`, as it was."""
    served = Path(shutil.copytree(models("qwen3"), tmp_path / "served"))  # with fewer tokens than the adapter's base
    (served / "certificate.json").write_text('[{"engine": "in-process", "holds": true}]')
    assert certify(by_heart, served) == 4
    error = told(capsys)
    assert "so it was made of another base" in error and "pass --served with what" in error
    entry = certificate_in(served)
    assert entry["holds"] is False and "another base" in "".join(entry["problems"])


def test_an_unservable_path_is_reported_before_anything_is_loaded(by_heart, tmp_path, capsys):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    weights = tmp_path / "model.safetensors"
    weights.touch()
    empty, exported = tmp_path / "empty", tmp_path / "exported"
    empty.mkdir()
    exported.mkdir()
    (exported / "out-bf16.gguf").write_bytes(b"GGUF")
    for served, engine, said in (
        (empty, "transformers", f"--served {empty}: no config.json or adapter_config.json here, so it holds no model."),
        (exported, "transformers", f"Pass the file in it: --served {exported / 'out-bf16.gguf'}"),
        (weights, "transformers", f"--served {weights} is a file, and not a .gguf"),
        (by_heart, "llama.cpp", "export --to gguf"),
        (gguf, "transformers", "is a GGUF. llama.cpp serves those"),
        (tmp_path / "none", "transformers", "no such file or folder"),
    ):
        words = ["--adapter_path", str(by_heart), "--served", str(served), "--engine", engine]
        assert main(["certify", *words]) == 2
        assert said in told(capsys)


def test_error_for_a_merged_model_as_adapter_path_suggests_served(merged, capsys):
    assert certify(merged) == 2
    assert f"--adapter_path {merged} is a whole model" in (error := told(capsys)) and "this one with --served" in error


def test_a_missing_adapter_error_names_adapter_path_not_served(tmp_path, capsys):
    assert main(["certify", "--adapter_path", str(tmp_path / "none")]) == 2
    error = told(capsys)
    assert f"--adapter_path {tmp_path / 'none'}: no such file or folder" in error and "--served" not in error


@pytest.mark.slow
def test_certifying_an_nf4_run_on_unquantized_weights_is_reported(trained_in_nf4, tmp_path, capsys):
    """No engine quantizes the base as the run did, so all use other weights than in training; not so a merged model."""
    _, run = trained_in_nf4
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert certify(copy, None, "--prompts", "1") == 0
    assert "trained on the base in nf4, but is certified on its weights as they are stored" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["certify", "serve"])
def test_a_base_that_engines_load_as_stored_is_not_quantized(name, adapter, capsys):
    # `certify --quantize nf4` compared a base in 4 bits with an engine's, and `serve` did nothing with it.
    assert main([name, "--adapter_path", str(adapter), "--quantize", "nf4"]) == 2
    assert "--quantize: unknown" in told(capsys)


def test_certificates_of_other_engines_stay(adapter):
    file = adapter / "certificate.json"
    file.write_text(json.dumps([{"engine": "vllm", "holds": True}, {"engine": "in-process", "holds": False}]))
    assert certify(adapter) == 0
    assert [(one["engine"], one["holds"]) for one in json.loads(file.read_text())] == [
        ("vllm", True),
        ("in-process", True),
    ]


@pytest.mark.parametrize("content", ['{"engine"', "{}", "[1, null]"])
def test_a_damaged_certificate_is_replaced(tmp_path, content):
    (tmp_path / "certificate.json").write_text(content)
    command.write_certificate(EngineOutcome("vllm", "1", "float32", ALLOWED["float32"]), tmp_path)
    assert certificate_in(tmp_path)["engine"] == "vllm"


def test_a_folder_is_served_by_transformers_and_a_gguf_by_llama_cpp_by_default(adapter, monkeypatch):
    for check in ("refuse_without_transformers_serve", "refuse_without_llama_cpp"):
        monkeypatch.setattr(command, check, lambda: None)
    gguf = adapter / "model.gguf"
    gguf.touch()
    for served, engine in ((adapter, "transformers"), (gguf, "llama.cpp")):
        assert command.engines_for(served, [], setting="--served") == [engine]


def test_the_certificate_of_one_engine_is_kept_if_the_next_does_not_start(adapter, monkeypatch, capsys):
    def broken(*arguments: object, **more: object) -> None:
        raise RunFailed("vLLM ended while it was starting.")

    monkeypatch.setattr(command, "refuse_without_vllm", lambda: None)
    monkeypatch.setattr(command, "VllmServe", broken)
    assert certify(adapter, None, "--engine", "vllm", "--prompts", "2") == 3
    assert "vLLM ended while it was starting." in told(capsys)
    assert certificate_in(adapter)["engine"] == "in-process"


@pytest.mark.slow
def test_an_answer_whose_stop_token_reaches_the_token_limit_passes(by_heart, adapter):
    """Engines that stop at the limit report that, even if the last token was the stop token: the certificate failed."""
    tokenizer = load_tokenizer(str(by_heart), trust_remote_code=False)
    answer = DIALOGUES[1]["output"]
    limit = len(tokenizer(answer, add_special_tokens=False).input_ids) + 1
    for more in (0, 1, -1):
        assert certify(adapter, None, "--max_new_tokens", str(limit + more)) == 0
        entry = certificate_in(adapter)
        assert entry["stops"] == entry["should_stop"]


def test_an_unwritable_certificate_folder_is_refused_before_loading(adapter, monkeypatch, capsys):
    def read_only(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert certify(adapter) == 2
    assert f"--adapter_path {adapter}: its certificate cannot be written there: Read-only" in (text := told(capsys))
    assert "Copy the model to a folder that can be written." in text
    assert not (adapter / "certificate.json").exists()


def test_an_engine_is_asked_for_no_more_context_than_the_base_has_positions(adapter):
    # vLLM refuses to start with more: an adapter trained on records of the full length could not be certified there.
    positions = json.loads((Path(base_of(adapter, None)) / "config.json").read_text())["max_position_embeddings"]
    for longest, context in ((256, 256 + 40), (positions, positions)):
        metadata = json.loads((adapter / "atomtune.json").read_text())
        (adapter / "atomtune.json").write_text(json.dumps({**metadata, "max_seq_length": longest}))
        settings = CertifySettings(adapter_path=str(adapter), dtype="float32", max_new_tokens=40)
        assert command.trained_side(settings, Console()).context == context


def test_an_engine_is_asked_for_room_for_the_longest_prompt(adapter):
    # Regression: with a template that begins with a long text, the engine refused our own prompts as too long.
    file = adapter / "chat_template.jinja"
    file.write_text(file.read_text().replace("Human: ", f"{'Think twice. ' * 10}Human: "))
    metadata = json.loads((adapter / "atomtune.json").read_text())
    (adapter / "atomtune.json").write_text(json.dumps({**metadata, "max_seq_length": 64}))
    settings = CertifySettings(adapter_path=str(adapter), dtype="float32", max_new_tokens=8)
    side = command.trained_side(settings, Console())
    longest = max(len(each.prompt.prompt_ids) for each in side.expected)
    assert longest > 64 + 8 and side.context == longest + 8


def prompts_of(adapter: Path, monkeypatch) -> set[str]:
    """Origins of the prompts that certify chooses for an adapter."""
    chosen, choose = [], command.choose_prompts

    def watched(*arguments: object, **more: object) -> list[CertPrompt]:
        chosen.extend(choose(*arguments, **more))
        return chosen

    with monkeypatch.context() as within:
        within.setattr(command, "choose_prompts", watched)
        certify(adapter, None, "--max_new_tokens", "1")  # an adapter of one step may have no effect
    return {prompt.origin for prompt in chosen}


def trained_on(models, folder: Path, *more: str) -> Path:
    words = ["--model_path", str(models("llama")), *more, "--output_dir", str(folder / "out"), "--dtype", "float32"]
    assert main(["train", *words, "--max_steps", "1"]) == 0
    return folder / "out"


@pytest.mark.slow
def test_held_out_records_are_asked_although_two_sources_have_the_same_file_name(models, tmp_path, monkeypatch):
    """Regression: their origins have a part of the path, and none was found under the file name alone."""
    paths = []
    for place, records in (("a", DIALOGUES[:4]), ("b", DIALOGUES[4:])):
        (tmp_path / place).mkdir()
        paths.append(str(write_jsonl(tmp_path / place / "train.jsonl", records)))
    run = trained_on(models, tmp_path, "--dataset_path", *paths, "--eval_size", "3")
    held_out = set(json.loads((run / "run.json").read_text())["records_held_out"])
    assert held_out and prompts_of(run, monkeypatch) - {OUR_OWN} == held_out


@pytest.mark.slow
def test_prompts_of_our_own_are_announced_if_the_runs_records_are_gone(models, tmp_path, capsys, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    run = trained_on(models, tmp_path, "--dataset_path", str(data), "--eval_size", "2")
    capsys.readouterr()
    assert len(prompts_of(run, monkeypatch) - {OUR_OWN}) == 2
    assert "atomtune's own" not in capsys.readouterr().out
    data.write_bytes(b"PK\x03\x04 now something else")
    prompts_of(run, monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{data} cannot be read, so none of its records is among the prompts: " in said
    data.unlink()
    assert prompts_of(run, monkeypatch) == {OUR_OWN}
    said = " ".join(capsys.readouterr().out.split())
    assert f"{data} is no longer there, so none of its records is among the prompts." in said
    assert "none of the prompts is from the training's records; all are atomtune's own." in said
    record = run / "run.json"
    record.write_text(record.read_text().replace(str(data), "owner/no-such-records"))  # of the hub, which is not asked
    prompts_of(run, monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert "owner/no-such-records cannot be read, so none of its records is among the prompts: " in said


def test_resumed_training_removes_the_outdated_certificate(models, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", DIALOGUES)
    out = tmp_path / "out"
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(data), "--output_dir", str(out)]
    words += ["--dtype", "float32", "--save_steps", "1"]
    assert main([*words, "--max_steps", "1"]) == 0
    (out / "certificate.json").write_text('[{"engine": "vllm", "holds": true}]')
    assert main([*words, "--max_steps", "2", "--resume"]) == 0
    assert not (out / "certificate.json").exists()


def test_suggested_next_commands_include_the_given_model_path(by_heart, adapter, models, tmp_path, capsys):
    """The base had moved, and the command that certify advised had no --model_path, so it failed at once."""
    base = shutil.copytree(models("llama"), tmp_path / "my base")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/nowhere"}))
    merged = tmp_path / "merged"
    words = ["--adapter_path", str(adapter), "--model_path", str(base), "--output_dir", str(merged)]
    assert main(["merge", *words]) == 0
    assert certify(adapter, None, "--model_path", str(base), "--prompts", "2") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " certify " in line or " serve " in line]
    assert len(said) == 2 and all(f"--model_path '{base}'" in line for line in said)
