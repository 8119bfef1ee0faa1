"""Loading: tokenizers as published, dtypes as the device can, and errors that say what to do."""

import sentencepiece
import torch

from atomtune.model.load import BaseSpec, load_base, load_tokenizer, resolve_dtype
from tests.tiny import texts

CPU = torch.device("cpu")


def test_a_lone_tokenizer_model_reads_as_sentencepiece_does(models):
    """Atom is published as tokenizer.model; transformers' own conversion of a lone file drops the leading ▁."""
    folder = models("lone")
    assert sorted(path.name for path in folder.glob("tokenizer*")) == ["tokenizer.model"]
    tokenizer = load_tokenizer(str(folder))
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*texts(), "  two  spaces ", "你好 Human", "龘😀", "a\nb", " lead", "trail ", ""]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == truth.encode(text), text
        assert tokenizer.decode(ids) == truth.decode(ids), text


def test_the_lone_tokenizer_survives_saving(models, tmp_path):
    tokenizer = load_tokenizer(str(models("lone")))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    for text in texts():
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_control_tokens_of_the_lone_tokenizer_are_one_id(models):
    tokenizer = load_tokenizer(str(models("lone")))
    ids = tokenizer("<s>Human: 你\n</s><s>Assistant:", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1]


def test_nf4_weights_are_four_bits(models):
    import pytest

    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = load_base(BaseSpec(path=str(models("llama")), dtype=torch.bfloat16, device=CPU, quantize="nf4"))
    layer = base.model.layers[0].mlp.gate_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.numel() * 2 == 32 * 64, "two weights lie in each byte"


def test_fp16_on_a_cpu_takes_the_nearest_and_says_so():
    notices: list[str] = []
    dtype = resolve_dtype("auto", CPU, fp16=True, bf16=False, notice=notices.append)
    assert dtype in (torch.bfloat16, torch.float32)
    assert len(notices) == 1
    assert "--fp16" in notices[0]


def test_a_dtype_that_is_asked_for_is_given():
    for name in ("float64", "float32", "bfloat16", "float16"):
        assert resolve_dtype(name, CPU, fp16=False, bf16=False, notice=print) == getattr(torch, name)
