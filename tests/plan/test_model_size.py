"""The counts of a model's shape are those of the model; for a published size, those that a run printed."""

import json

import pytest
from transformers import AutoModelForCausalLM

from atomtune.errors import BadModel, BadSettings
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.plan.model_size import measure

ALL_LINEAR = LoraSpec(rank=8, alpha=32, dropout=0.1, targets=["all-linear"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_the_shape_has_as_many_weights_as_the_model(models, family):
    base = AutoModelForCausalLM.from_pretrained(models(family))
    weights = sum(weight.numel() for weight in base.parameters())
    embeddings, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    tied = embeddings is head
    size = measure(str(models(family)), ALL_LINEAR)
    assert size.weights == weights
    assert size.head == head.numel()
    assert size.body == weights - embeddings.numel() - (0 if tied else head.numel())
    base.requires_grad_(False)
    assert size.trained == new_adapter(base, ALL_LINEAR).get_nb_trainable_parameters()[0]


def test_the_counts_of_a_published_7b_match_its_run(tmp_path):
    """A Qwen2.5-7B shape on a GPU trained 20,185,088 of 7,635,801,600 parameters (benchmarks/README.md)."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = measure(str(tmp_path), ALL_LINEAR)
    assert (size.trained, size.weights + size.trained) == (20_185_088, 7_635_801_600)


def test_only_the_experts_chosen_per_token_count_as_work(tmp_path):
    """A token uses 2 of 8 experts; the other 6 cost no work."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = measure(str(tmp_path), LoraSpec(rank=2, alpha=4, dropout=0.0, targets=["q_proj"]))
    an_expert = 3 * 32 * 16  # gate, up and down
    unchosen = 2 * 6 * an_expert
    assert size.body == size.weights - 2 * 100 * 32 - unchosen  # without embedding and output matrix


def test_a_missing_model_and_an_unmatched_target_are_user_errors(models, tmp_path):
    with pytest.raises(BadModel):
        measure(str(tmp_path), ALL_LINEAR)
    with pytest.raises(BadSettings, match="W_pack"):
        measure(str(models("llama")), LoraSpec(rank=8, alpha=32, dropout=0.0, targets=["W_pack"]))


def test_nothing_is_allocated_for_weights(tmp_path):
    """A model with 10^12 weights takes no memory, because its matrices are only shapes."""
    config = {"model_type": "llama", "hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    size = measure(str(tmp_path), LoraSpec(rank=1, alpha=1, dropout=0.0, targets=["q_proj"]))
    assert size.weights > 10**12
