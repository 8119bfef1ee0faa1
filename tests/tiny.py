"""Tiny real models of many families, each with its own kind of tokenizer.

Tokenizers: `sentencepiece` (like Llama's: BPE, ▁, byte fallback), `lone` (the same saved only as tokenizer.model),
`bytes` (byte-level BPE with ChatML, like Qwen's), `characters` (one token per character).
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.exchanges import as_one_piece, exchange_at
from atomtune.data.records import Piece, Record
from tests.conftest import DIALOGUES

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # With the usual 0.02, a frozen output matrix allows no logit above 1; with 0.3 an adapter can learn an answer.
    "initializer_range": 0.3,
}
#: Gemma 2. Scores of a model this small reach about 2, so this cap changes them; the published cap of 50 hardly would.
CAPPED = {
    **SIZE,
    "vocab_size": 97,
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 1.0,
    "query_pre_attn_scalar": 8,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: family → (kind of tokenizer, chat template or None, config values beyond SIZE)
FAMILIES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("sentencepiece", None, {}),
    "qwen3": ("bytes", CHATML, {"head_dim": 8}),
    "gemma3_text": ("sentencepiece", GEMMA, {"head_dim": 8, "sliding_window": 16}),
    "mistral": ("sentencepiece", None, {"sliding_window": 24}),
    "gpt2": ("bytes", None, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}),
    "baichuan_like": ("characters", None, {}),
    "lone": ("lone", None, {}),
}


def texts() -> list[str]:
    """The texts that the tokenizers are trained on."""
    every = [text for record in DIALOGUES for text in record.values()]
    return [*every, "Human: 请回答用户问题: \nAssistant:", "你好，世界。 Hello, world! 1234567890"] * 3


def tokenizer_of(
    kind: str, chat_template: str | None = None, corpus: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A trained tokenizer of this kind (not `lone`, which is a file), with 900 words; with a corpus, 8,000."""
    if kind == "sentencepiece":
        more = ["<start_of_turn>", "<end_of_turn>"] if chat_template else []
        backend = _sentencepiece_like(more, corpus or texts(), vocab_size=8000 if corpus else 900)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif kind == "bytes":
        backend = _byte_level()
        special = {"eos_token": "<|im_end|>" if chat_template else "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        backend = _characters()
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)


def pieces(template: Template, record: Record, at: int = -1) -> tuple[Piece, Piece]:
    """The prompt, which is no target, and the answer after it: the turn at `at`."""
    exchange = exchange_at(template, record, at % len(record.turns))
    return as_one_piece(exchange.prompt), exchange.answer


def _sentencepiece_like(more: list[str], corpus: list[str], vocab_size: int) -> Tokenizer:
    """Like Llama's tokenizer.json: a ▁ before every text between control tokens, and bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>", *more]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        initial_alphabet=["▁"],
        max_token_length=3,  # otherwise each of the few texts would become one token
    )
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(corpus, trainer)
    # Bytes are tokens of the model, not control tokens, so rebuild the tokenizer with the trained vocabulary.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if not one["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, max_token_length=6, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts(), trainer)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return backend


def _characters() -> Tokenizer:
    known = sorted({character for text in texts() for character in text})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *known])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def build(family: str, folder: Path, **sizes: Any) -> Path:
    """Save a model of this family to the folder."""
    kind, template, more = FAMILIES[family]
    if kind == "lone":
        vocabulary, special = lone_sentencepiece(folder), {"bos_token_id": 1, "eos_token_id": 2}
    else:
        tokenizer = tokenizer_of(kind, template)
        tokenizer.save_pretrained(folder)
        vocabulary = len(tokenizer)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(7)
    values = {**SIZE, **more, "vocab_size": vocabulary, **special, "pad_token_id": None, **sizes}
    if family == "baichuan_like":
        return _remote_code_model(folder, values)
    if family == "gpt2":
        values = {k: v for k, v in values.items() if k in FAMILIES[family][2] or k not in SIZE}
    config = AutoConfig.for_model("llama" if family == "lone" else family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def lone_sentencepiece(folder: Path) -> int:
    """Train a SentencePiece tokenizer and keep only tokenizer.model; returns the vocabulary's size."""
    import sentencepiece

    source = folder / "texts.txt"
    source.write_text("\n".join(text.replace("\n", " ") for text in texts() * 10), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    source.unlink()
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def _remote_code_model(folder: Path, values: dict[str, Any]) -> Path:
    """A model with its own code beside the weights, with Baichuan's joint W_pack and no logits_to_keep."""
    import sys

    (folder / "configuration_tiny.py").write_text(REMOTE_CONFIG, encoding="utf-8")
    (folder / "modeling_tiny.py").write_text(REMOTE_MODEL, encoding="utf-8")
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {k: values[k] for k in keep} | {
        "model_type": "tiny_remote",
        "architectures": ["TinyForCausalLM"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    auto = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(auto, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sys.modules.pop("modeling_tiny", None)
    return folder


REMOTE_CONFIG = """
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"

    def __init__(self, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 vocab_size=100, **kwargs):
        self.hidden_size, self.intermediate_size, self.vocab_size = hidden_size, intermediate_size, vocab_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**kwargs)
"""

REMOTE_MODEL = """
import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyConfig


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.W_pack = nn.Linear(d, 3 * d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.gate_proj = nn.Linear(d, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(d, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, d, bias=False)
        self.before, self.after = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x, allowed):
        b, t, d = x.shape
        q, k, v = self.W_pack(self.before(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(b, t, d))
        y = self.after(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig
    supports_gradient_checkpointing = False

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None, **kwargs):
        b, t = input_ids.shape
        allowed = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
            allowed = allowed | torch.eye(t, dtype=torch.bool, device=input_ids.device)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, allowed)
        return CausalLMOutput(logits=self.lm_head(x))
"""
