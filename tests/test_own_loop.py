"""Law: a training loop with shared prefixes learns what the same loop learns from padded batches.

The oracle is plain transformers with its own padding and loss, and without code of ours.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from atomtune import share_prefixes
from atomtune.errors import BadData, BadSettings

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_once(model_path: Path) -> None:
    """Load the family once: its first import draws random numbers, so two seeded loops would start differently."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(target_modules="all-linear"))


def example_module(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examples_with_a_shared_beginning(vocabulary: int = 300, n: int = 12) -> list[dict]:
    """Examples of 24 shared tokens, a question, and an answer, which alone is the target."""
    draw = torch.Generator().manual_seed(3)
    beginning = torch.randint(5, vocabulary, (24,), generator=draw).tolist()
    examples = []
    for i in range(n):
        question = torch.randint(5, vocabulary, (3 + i % 4,), generator=draw).tolist()
        answer = torch.randint(5, vocabulary, (2 + i % 5,), generator=draw).tolist()
        labels = [-100] * (len(beginning) + len(question)) + answer
        examples.append({"input_ids": beginning + question + answer, "labels": labels})
    return examples


def padded(examples: list[dict]) -> dict:
    """Padding as in every tutorial."""
    columns = {}
    for name, filler in (("input_ids", 0), ("labels", -100)):
        columns[name] = pad_sequence([torch.tensor(e[name]) for e in examples], batch_first=True, padding_value=filler)
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    columns["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return columns


def train_padded(model_path, examples, *, batch_size: int, learning_rate: float, **model_settings):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path, **model_settings),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=padded):
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]  # the library's own loss rounds them to float32
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def assert_equal_adapters(model, other, rel: float) -> None:
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.linalg.norm(tensor - theirs[name]) <= rel * (torch.linalg.norm(theirs[name]) + 1e-6), name


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_the_plain_loop_of_the_examples_learns_what_a_padded_one_learns(models, family):
    """In float64 only the order of sums differs; but the library's norms compute in float32."""
    examples = examples_with_a_shared_beginning()
    how = {"batch_size": 4, "learning_rate": 1e-3, "dtype": torch.float64}
    train = example_module("share_prefixes_peft").train
    load_once(models(family))
    set_seed(0)
    model, losses = train(models(family), examples, **how)
    set_seed(0)
    other, expected = train_padded(models(family), examples, **how)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert_equal_adapters(model, other, rel=1e-3)  # AdamW makes full steps even for near-zero gradients


def test_shared_prefixes_appear_once_in_a_batch(models):
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    sharing = share_prefixes(model)
    examples = examples_with_a_shared_beginning(n=8)
    batch = sharing.collate(examples)
    alone = sum(len(example["input_ids"]) - 24 for example in examples)
    assert sharing.layout == "tree" and sharing.reason is None
    assert 24 + alone <= batch["input_ids"].numel() < 24 + alone + 32  # filled up to a whole block
    learned = sum(label != -100 for example in examples for label in example["labels"])
    assert (batch["labels"] != -100).sum() == learned


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_program_that_computes_without_gradients_here_can_share_prefixes_too(models, mode):
    # Regression: in inference mode LoRA was said to get no gradient, with the advice to leave its layers out.
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with mode():
        sharing = share_prefixes(model)
    assert (sharing.layout, sharing.reason) == ("tree", None)
    assert sharing.loss(model, sharing.collate(examples_with_a_shared_beginning())).requires_grad


def test_padding_that_a_tokenizer_added_is_taken_out(models):
    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float64)
    sharing = share_prefixes(model)
    examples = examples_with_a_shared_beginning(n=4)
    columns = padded(examples)
    rows = [{name: columns[name][i] for name in columns} for i in range(4)]
    with torch.no_grad():
        expected = sharing.loss(model, sharing.collate(examples))
        assert sharing.loss(model, sharing.collate(rows)) == pytest.approx(expected.item(), rel=1e-12)


def test_a_model_that_cannot_share_is_padded_with_a_reason(models):
    model = AutoModelForCausalLM.from_pretrained(models("baichuan_like"), trust_remote_code=True, dtype=torch.float64)
    sharing = share_prefixes(model)
    examples = [{k: [i % 90 for i in v] if k == "input_ids" else v for k, v in e.items()} for e in some_copies()]
    batch = sharing.collate(examples)
    assert sharing.layout == "padded" and "position_ids" in sharing.reason
    assert batch["input_ids"].shape[0] == len(examples)


def some_copies() -> list[dict]:
    return [{"input_ids": example["input_ids"]} for example in examples_with_a_shared_beginning(n=3)]


@pytest.mark.parametrize(
    ("labels", "said"), [([1, 2], r"3 input_ids and 2 labels"), ([-100, 7, 9], r"label at token 1 is 7")]
)
def test_labels_that_do_not_match_the_tokens_are_refused(models, labels, said):
    sharing = share_prefixes(AutoModelForCausalLM.from_pretrained(models("llama")))
    with pytest.raises(BadData, match=said):
        sharing.collate([{"input_ids": [5, 6, 9], "labels": labels}])


def test_a_packed_row_is_split_into_its_examples(models):
    # TRL's packing passes rows of several examples; taken for one text, each would see the ones before it.
    examples = examples_with_a_shared_beginning(n=5)
    row = {name: [token for example in examples for token in example[name]] for name in ("input_ids", "labels")}
    row["seq_lengths"] = [len(example["input_ids"]) for example in examples]
    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float64)
    sharing = share_prefixes(model)
    losses = [sharing.loss(model, sharing.collate(batch)).item() for batch in ([row], examples)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    with pytest.raises(BadData, match="seq_lengths of 3 tokens"):
        sharing.collate([{**row, "seq_lengths": [3]}])


def test_neftune_noise_on_a_shared_row_is_refused(models):
    model = AutoModelForCausalLM.from_pretrained(models("llama")).train()
    sharing = share_prefixes(model)
    batch = sharing.collate(examples_with_a_shared_beginning(n=2))
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers' Trainer does
    with pytest.raises(BadSettings, match="neftune_noise_alpha"):
        sharing.loss(model, batch)
    sharing.loss(model.eval(), batch)  # an evaluation has no noise


_TRAINED_BY_RANKS = """
import sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
import trl
from tests.test_own_loop import examples_with_a_shared_beginning, example_module, load_once

base, out, kind = sys.argv[1:]
load_once(base)
kinds = {"own": trl.SFTTrainer, "sharing": example_module("share_prefixes_trl").SharingSFTTrainer}
set_seed(0)
trainer = kinds[kind](
    model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64),
    args=trl.SFTConfig(
        output_dir=out, per_device_train_batch_size=2, max_steps=2, learning_rate=0.1, optim="sgd", max_grad_norm=0,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, seed=1, lr_scheduler_type="constant",
    ),
    train_dataset=Dataset.from_list(examples_with_a_shared_beginning()),
    processing_class=AutoTokenizer.from_pretrained(base),
    peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(out)
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="without TRL")
def test_the_trl_trainer_with_sharing_learns_the_same_on_two_ranks(models, tmp_path):
    # Catches a loss that is half of what it should be. Plain SGD shows it; Adam and clipping would hide it.
    (tmp_path / "train.py").write_text(_TRAINED_BY_RANKS, encoding="utf-8")
    for kind in ("own", "sharing"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launcher, str(tmp_path / "train.py"), str(models("qwen3")), str(tmp_path / kind), kind],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("sharing", "own"))
    for name, tensor in theirs.items():
        if "lora_B" in name:
            assert (ours[name] - tensor).norm() < 1e-4 * tensor.norm(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_trls_trainer_learns_what_it_learns_without_sharing(models, tmp_path, label_smoothing):
    trl = pytest.importorskip("trl")
    rows = examples_with_a_shared_beginning()
    dataset = Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(models("qwen3"))
    histories, trained = [], []
    load_once(models("qwen3"))
    for kind in (trl.SFTTrainer, example_module("share_prefixes_trl").SharingSFTTrainer):
        base = AutoModelForCausalLM.from_pretrained(models("qwen3"), dtype=torch.float64)
        set_seed(0)
        trainer = kind(
            model=base,
            args=trl.SFTConfig(
                output_dir=str(tmp_path / kind.__name__),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=5,
                learning_rate=1e-3,
                label_smoothing_factor=label_smoothing,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                seed=1,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trained.append(trainer.model)
    assert len(histories[0]) == 5
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)  # logged with few digits
    assert_equal_adapters(trained[1], trained[0], rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_other_trl_loss_types_are_refused_and_not_ignored(models, tmp_path):
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match="loss_type 'dft'"):
        example_module("share_prefixes_trl").SharingSFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(models("qwen3")),
            args=trl.SFTConfig(output_dir=str(tmp_path), loss_type="dft", use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list(examples_with_a_shared_beginning()),
            processing_class=AutoTokenizer.from_pretrained(models("qwen3")),
        )
