"""Samples: the greedy answers of base and tuned model to held-out prompts, within a time limit."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomtune.cli import main
from atomtune.train import samples
from atomtune.train.samples import Samples
from tests.conftest import write_jsonl

LONGEST = 24


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ([10, 10, 5], ["1", "2", "3"]),
        ([20, 20, 20], ["1"]),  # the second is cut short
        ([40, 20, 20], ["1"]),
    ],
    ids=["in time", "second late", "first late"],
)
def test_an_answer_cut_by_the_time_limit_is_omitted_if_another_exists(monkeypatch, answers, shown):
    durations, now = iter(answers), 0.0

    def answer(self, prompt, *, seconds: float):
        nonlocal now
        now += min(next(durations), seconds)
        return str(prompt[0]), False

    monkeypatch.setattr(samples.time, "monotonic", lambda: now)
    monkeypatch.setattr(Samples, "_answer", answer)
    of_run = Samples(None, nn.Identity(), None, prompts=[[1], [2], [3]])
    assert [text for text, _ in of_run._answers()] == shown


def conversation(name: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"I am {name}."},
        {"role": "assistant", "content": f"Good evening, {name}."},
        {"role": "user", "content": f"What burns for {name}?"},
        {"role": "assistant", "content": f"The lamp burns, {name}."},
    ]


@torch.no_grad()
def plainly(model, tokenizer, messages: list[dict[str, str]]) -> str:
    """The greedy answer by transformers' own generate, as a sample shows it."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenize=True, return_tensors="pt"
    )
    answer = model.eval().generate(ids, max_new_tokens=LONGEST, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return text if tokenizer.eos_token_id in answer else text.rstrip("\ufffd") + " …"


def test_a_resumed_run_shows_the_greedy_answers_of_base_and_tuned_model(models, tmp_path, monkeypatch):
    """The oracle is transformers' generate, in float32. The adapter has much dropout, which answers must not have."""
    trained = ["Ann", "Bela", "Chloe", "Dora", "Emil", "Fritz", "Gerda", "Hugo"]
    new = ["Ishmael of the sea", "Quentin the old miller", "Wilhelmina, who is late"]
    too_long = "Zeno " * 40
    base, out = models("qwen3"), tmp_path / "out"
    data, held_out = (
        write_jsonl(tmp_path / f"{n}.jsonl", [{"messages": conversation(name)} for name in names])
        for n, names in enumerate((trained, [*trained[:4], *new, too_long]))
    )
    monkeypatch.setattr(samples, "LONGEST_ANSWER", LONGEST)
    monkeypatch.setattr(samples, "LONGEST_PROMPT", 150)
    monkeypatch.setattr(samples, "SECONDS", 1000.0)
    words = ["train", "--model_path", str(base), "--dataset_path", str(data), "--eval_path", str(held_out)]
    words += ["--output_dir", str(out), "--dtype", "float32", "--learning_rate", "5e-2", "--lora_dropout", "0.4"]
    assert main([*words, "--max_steps", "6", "--save_steps", "6"]) == 0
    assert main([*words, "--max_steps", "7", "--save_steps", "6", "--resume"]) == 0

    found = {sample["prompt"]: sample for sample in json.loads((out / "run.json").read_text())["samples"]}
    assert found.keys() == {f"What burns for {name}?" for name in new}, "those not like trained ones, and short enough"
    tokenizer = AutoTokenizer.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = [plainly(plain, tokenizer, conversation(name)[:3]) for name in new]
    tuned = PeftModel.from_pretrained(plain, str(Path(out)))
    for name, base_answer in zip(new, before, strict=True):
        sample = found[f"What burns for {name}?"]
        assert sample["reference"] == f"The lamp burns, {name}."
        assert sample["before"] == base_answer
        assert sample["after"] == plainly(tuned, tokenizer, conversation(name)[:3]) != base_answer
