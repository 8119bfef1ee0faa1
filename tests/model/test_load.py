"""Loading: published tokenizers, dtypes that fit the device, and errors that say what to do."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import QuantizationMethod

from atomtune.errors import BadModel, BadSettings
from atomtune.model import load
from atomtune.model.base_shape import base_shape
from atomtune.model.load import (
    BaseSpec,
    device_in_use,
    load_base,
    load_dequantized,
    load_tokenizer,
    resolve_dtype,
)
from tests import tiny
from tests.tiny import CAPPED, texts

CPU = torch.device("cpu")


def test_a_lone_tokenizer_model_file_tokenizes_like_sentencepiece(models):
    """Atom is published as tokenizer.model; transformers' own conversion of such a lone file drops the leading ▁."""
    folder = models("lone")
    assert sorted(path.name for path in folder.glob("tokenizer*")) == ["tokenizer.model"]
    tokenizer = load_tokenizer(str(folder))
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*texts(), "  two  spaces ", "你好 Human", "龘😀", "a\nb", " lead", "trail ", ""]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == truth.encode(text), text
        assert tokenizer.decode(ids) == truth.decode(ids), text


def test_decoding_keeps_the_spaces_of_the_tokens(tmp_path):
    # A streamed answer lost characters too: the text so far changed with the next token.
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    answer = "I keep the light , he said . Don 't ask !"
    backend.train_from_iterator([answer, *texts()], trainers.UnigramTrainer(vocab_size=400, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=True, chat_template=tiny.CHATML
    )
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) != answer
    assert load_tokenizer(str(tmp_path)).decode(ids) == answer


def test_the_lone_tokenizer_survives_saving(models, tmp_path):
    tokenizer = load_tokenizer(str(models("lone")))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    for text in texts():
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_control_tokens_of_the_lone_tokenizer_are_single_ids(models):
    tokenizer = load_tokenizer(str(models("lone")))
    ids = tokenizer("<s>Human: 你\n</s><s>Assistant:", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1]


def test_nf4_weights_are_four_bits(models):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = load_base(BaseSpec(path=str(models("llama")), dtype=torch.bfloat16, device=CPU, quantize="nf4"))
    layer = base.model.layers[0].mlp.gate_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.numel() * 2 == 32 * 64, "two weights lie in each byte"


def test_a_base_applies_the_attention_soft_caps_of_its_config(tmp_path):
    # transformers 5.17 uses sdpa for Gemma 2 without the caps, unlike every program that serves it.
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **CAPPED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    base = load_base(BaseSpec(path=str(tmp_path), dtype=torch.float32, device=CPU)).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, ours = model(input_ids=ids).logits, base(input_ids=ids).logits
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = model(input_ids=ids).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    assert not torch.allclose(uncapped, expected, atol=0.1)


def test_fp16_on_a_cpu_falls_back_to_another_dtype_with_a_notice():
    notices: list[str] = []
    dtype = resolve_dtype("auto", CPU, fp16=True, bf16=False, notice=notices.append)
    assert dtype in (torch.bfloat16, torch.float32)
    assert len(notices) == 1
    assert "--fp16" in notices[0]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert device_in_use() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadSettings, match="--nproc_per_node 1"):
        device_in_use()


def test_a_cpu_run_does_not_query_the_gpu(models, monkeypatch):
    def refuses(*_arguments):
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # a torch for CUDA finds none here
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuses)
    assert base_shape(str(models("llama")), use_cpu=True).longest > 0
    with pytest.raises(AssertionError, match="the GPU was asked"):
        base_shape(str(models("llama")))


def test_a_requested_dtype_is_used():
    for name in ("float64", "float32", "bfloat16", "float16"):
        assert resolve_dtype(name, CPU, fp16=False, bf16=False, notice=print) == getattr(torch, name)


def rewritten(base, folder, change):
    """A copy of a base with its weights changed by `change`."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return BaseSpec(path=str(folder), dtype=torch.float32, device=CPU)


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_missing_weight_is_named_and_not_randomly_initialized(models, tmp_path):
    spec = rewritten(models("llama"), tmp_path / "m", lambda w: {n: t for n, t in w.items() if n != DOWN})
    with pytest.raises(BadModel, match=rf"{DOWN}: not in the weight files"):
        load_base(spec)


def test_a_renamed_weight_is_reported_as_missing_and_unexpected(models, tmp_path):
    spec = rewritten(models("llama"), tmp_path / "m", lambda w: {n.replace("down_proj", "w2"): t for n, t in w.items()})
    with pytest.raises(BadModel) as raised:
        load_base(spec)
    assert f"{DOWN}: not in the weight files" in str(raised.value)
    assert f"{DOWN.replace('down_proj', 'w2')}: in the weight files, but the model has no place" in str(raised.value)


def test_a_weight_of_the_wrong_shape_is_reported_with_both_shapes(models, tmp_path):
    # Once this was a traceback that asked for a bug report.
    spec = rewritten(models("llama"), tmp_path / "m", lambda w: {**w, DOWN: w[DOWN][:5].contiguous()})
    with pytest.raises(BadModel, match=rf"{DOWN}: \(5, 64\) in the weight files, \(32, 64\) in the model"):
        load_base(spec)


def test_buffers_of_older_versions_are_not_refused_as_unknown_weights(models, tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "x.attn.masked_bias": torch.ones(1)}
    load_base(rewritten(models("llama"), tmp_path / "m", lambda w: {**w, **buffers}))


def test_tied_weights_are_stored_once(tmp_path):
    from tests.tiny import build

    folder = build("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    base = load_base(BaseSpec(path=str(folder), dtype=torch.float32, device=CPU))
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


def test_a_git_lfs_pointer_in_place_of_weights_is_reported(models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models("llama"), folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 269060552\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(BadModel, match="git-lfs pointer"):
        load_base(BaseSpec(path=str(folder), dtype=torch.float32, device=CPU))


@pytest.mark.parametrize("path", ["nowhere/", "./nowhere", "a/b/c", Path("/nowhere")], ids=str)
def test_a_path_that_can_only_be_a_folder_is_not_looked_up_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModel, match="no such folder"):
        load_tokenizer(path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked safely on Linux only")
@pytest.mark.parametrize("key", ["continuing_subword_prefix", r"continuin\u0067_subword_prefix"])
def test_a_tokenizer_that_crashes_the_process_loading_it_is_refused(models, tmp_path, key):
    # Found by ten thousand alterations: Rust panics in a destructor, so no exception can be caught.
    folder = tmp_path / "base"
    shutil.copytree(models("llama"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["continuing_subword_prefix"] = "x"
    text = json.dumps(tokenizer).replace("continuing_subword_prefix", key)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadModel, match="crashed the process that tried it"):
        load_tokenizer(str(folder))


def test_evaluating_a_4_bit_base_leaves_its_gradients_unchanged(tmp_path, monkeypatch):
    # A CPU with AVX-512's bfloat16 packs such layers at their first evaluation, and packed layers pass no gradient.
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    folder = tiny.build("llama", tmp_path, hidden_size=64, intermediate_size=128)
    base = load_base(BaseSpec(path=str(folder), dtype=torch.float32, device=CPU, quantize="nf4"))
    embeddings = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.arange(5)[None]

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(base.train()(inputs_embeds=embeddings, labels=ids).loss, embeddings)
        return found

    before = gradient()
    base.eval()
    with torch.no_grad():
        base(inputs_embeds=embeddings)
    assert torch.equal(gradient(), before)


def test_a_base_that_cannot_be_dequantized_is_refused_naming_its_format(monkeypatch):
    def dequantize(dtype):
        raise NotImplementedError

    config = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=QuantizationMethod.TORCHAO))
    stored = SimpleNamespace(is_quantized=True, dequantize=dequantize, config=config)
    monkeypatch.setattr(load, "load_base", lambda spec: stored)  # torchao itself is not installed for tests
    with pytest.raises(BadModel, match="stored as torchao, which cannot be dequantized"):
        load_dequantized(BaseSpec(path="base", dtype=torch.float32, device=CPU))
