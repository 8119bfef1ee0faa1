"""With longrope, a batch's longest record sets the positions of all, so short and long records are kept apart."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atomtune.batch.collate import Collator
from atomtune.cli import main
from atomtune.data.records import Example
from atomtune.errors import BadSettings
from atomtune.evaluate.likelihood import score_targets
from atomtune.model.greedy_batch import generate_answers
from atomtune.model.rotary import refuse_mixed, rotary_limit, split_at_limit
from tests.tiny import SIZE

LIMIT = 40


def longrope(**more):
    """The config of a tiny Phi-3."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 24.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": LIMIT, **factors}
    more = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "original_max_position_embeddings": LIMIT, **more}
    return AutoConfig.for_model("phi3", **{**SIZE, "rope_parameters": rope, **more})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(longrope(vocab_size=300), dtype=torch.float64).eval()


def ids_of(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def test_the_limit_is_the_one_of_the_config():
    assert rotary_limit(longrope()) == LIMIT
    assert rotary_limit(AutoConfig.for_model("llama", **SIZE)) is None
    assert rotary_limit(AutoConfig.for_model("gemma3_text", **SIZE)) is None  # it has one rope per kind of layer


def test_records_below_and_above_the_limit_are_grouped_separately():
    assert split_at_limit([3, 41, 40, 90], LIMIT) == [[0, 2], [1, 3]]
    assert split_at_limit([41], LIMIT) == [[0]]
    assert split_at_limit([3, 41], None) == [[0, 1]]


def test_a_record_batched_with_a_longer_one_is_scored_as_alone(model):
    records = [(Example(ids_of(n), (0,) * (n - 4) + (1,) * 4, f"a:{n}"),) for n in (12, 50, 30)]
    collator = Collator(layout="padded", pad_id=0, as_examples=lambda row: ())
    scores = score_targets(model, records, collator)
    for record, score in zip(records, scores, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([record[0].ids])).logits[0].log_softmax(-1)
        nats = -sum(float(logits[place - 1, record[0].ids[place]]) for place in range(-4, 0))
        assert score.nats == pytest.approx(nats, rel=1e-5)  # the library's RMSNorm is float32


def test_a_prompt_batched_with_a_longer_one_is_answered_as_alone(model):
    def answers(prompts):
        return generate_answers(model, prompts, stop_ids=[2], pad_id=0, max_new_tokens=8)

    prompts = [ids_of(12), ids_of(50), ids_of(30)]
    assert answers(prompts) == [answer for prompt in prompts for answer in answers([prompt])]


def test_mixing_is_refused_only_where_short_and_long_records_may_meet():
    batches = {"per_device_train_batch_size": 8}
    refuse_mixed(None, 90, batches=batches)
    refuse_mixed(LIMIT, LIMIT, batches=batches)
    refuse_mixed(LIMIT, 90, batches={"per_device_train_batch_size": 1}, accumulated=8)
    with pytest.raises(BadSettings, match="--gradient_accumulation_steps 16,"):
        refuse_mixed(LIMIT, 90, batches=batches, accumulated=2)


@pytest.mark.parametrize(("command", "evaluates"), [("train", False), ("train", True), ("verify", False)])
def test_records_beyond_the_rotary_limit_are_refused_with_the_flags_to_change(
    models, tmp_path, capsys, command, evaluates
):
    base, data, short = tmp_path / "base", tmp_path / "d.jsonl", tmp_path / "short.jsonl"
    shutil.copytree(models("llama"), base)
    config = longrope(vocab_size=AutoConfig.from_pretrained(base).vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    lines = [json.dumps({"instruction": text, "output": "yes"}) for text in ("short", *["a word more " * 30] * 3)]
    data.write_text("\n".join(lines))
    short.write_text(lines[0])
    flags = ["--model_path", str(base), "--dataset_path", str(short if evaluates else data), "--template", "atom"]
    if command == "train":
        flags += ["--output_dir", str(tmp_path / "out")]
        flags += ["--eval_path", str(data)] if evaluates else ["--eval_size", "0"]
    assert main([command, *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"more than {LIMIT}" in said and f"--max_seq_length {LIMIT}" in said
    assert ("--gradient_accumulation_steps" in said) is (command == "train")
    assert ("--per_device_eval_batch_size 1" in said) is evaluates
