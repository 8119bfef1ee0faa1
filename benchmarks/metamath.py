"""The PEFT project's comparison of adapters: learn MetaMathQA, answer the test questions of GSM8K.

    python -m benchmarks.metamath --base meta-llama/Llama-3.2-3B --out metamath.jsonl
    python -m benchmarks.metamath --table metamath.jsonl

The settings are those of `method_comparison/MetaMathQA` in peft's repository (lora/llama-3.2-3B-rank32): 5,000 updates
of 4 records, rank 32 on q_proj and v_proj, AdamW with weight decay 0.1, a rate of 1e-4 with warm-up and cosine, records
of at most 1,300 characters and 768 tokens, greedy answers of at most 300 tokens. Two things differ there: the records
come in the file's order, by length within each 80, and prompts are learned too.

Contenders: atomtune, and plain transformers + PEFT with padded batches. Both learn the same token ids of the same
records in the same order. The accuracy is the share of questions whose number is right, with its 95 % interval.
The records are downloaded from the hub, or are files of JSON Lines or Parquet: --train, --test.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import device, encoded, finish, peak_memory_mb, run_apart, run_benchmark
from benchmarks.replay import padded_loss

CONTENDERS = ("atomtune", "peft")
BATCH, RANK, ALPHA, RATE, DECAY, TARGETS = 4, 32, 64, 1e-4, 0.1, ("q_proj", "v_proj")
MOST_CHARACTERS, MOST_TOKENS, LONGEST_ANSWER, WARM_UP = 1300, 768, 300, 0.1
#: The format of the comparison as a chat template of one question and its answer.
TEMPLATE = """\
{{- bos_token or '' -}}
{{- 'Question: ' + messages[0]['content'] + ' Think step by step.\\nAnswer:' -}}
{%- if messages[1] -%}{{- messages[1]['content'] + eos_token -}}{%- endif -%}
"""
_BEFORE_A_NUMBER = re.compile(r"[Aa]nswer is:?|####")


def rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of a dataset on the hub (`openai/gsm8k:main`)."""
    from datasets import load_dataset

    if Path(source).is_file():
        kind = "parquet" if source.endswith(".parquet") else "json"
        yield from load_dataset(kind, data_files=source, split="train")
    else:
        name, _, config = source.partition(":")
        yield from load_dataset(name, config or None, split=split)


def to_learn(source: str, number: int, *, seed: int) -> list[dict[str, str]]:
    """So many records, drawn without replacement and in random order, as instruction and output."""
    short = [
        {"instruction": row["query"], "output": row["response"].strip()}
        for row in rows(source, "train")
        if len(f"{row['query']} {row['response']}") <= MOST_CHARACTERS
    ]
    if len(short) < number:
        raise SystemExit(f"{source}: {len(short)} records have at most {MOST_CHARACTERS} characters; {number} needed.")
    return random.Random(seed).sample(short, number)


def number_in(text: str) -> Fraction | str | None:
    """The number after the last "answer is:" or "####"; the text there if it is no number, None if nothing is there."""
    _, *answers = _BEFORE_A_NUMBER.split(text)
    if not answers:
        return None
    answer = answers[-1].strip().partition("\n")[0].strip(" .!?$%").replace(",", "")
    try:
        return Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return answer


def train_atomtune(options: argparse.Namespace, data: Path, template: Path, out: Path) -> float:
    """Train into `out`; seconds of the training loop."""
    from atomtune.cli import main

    code = main(
        [
            *("train", "--model_path", options.base, "--dataset_path", str(data), "--output_dir", str(out)),
            *("--template", str(template), "--max_seq_length", str(MOST_TOKENS), "--dtype", options.dtype),
            *("--max_steps", str(options.steps), "--per_device_train_batch_size", str(BATCH)),
            *("--train_sampling_strategy", "sequential", "--seed", str(options.seed)),
            *("--learning_rate", str(RATE), "--lr_scheduler_type", "cosine", "--weight_decay", str(DECAY)),
            *("--warmup_steps", str(int(WARM_UP * options.steps)), "--lora_rank", str(RANK)),
            *("--lora_alpha", str(ALPHA), "--lora_dropout", "0", "--lora_targets", *TARGETS),
            *("--eval_size", "0", "--save_strategy", "no"),
        ]
    )
    assert code == 0, f"atomtune ended with exit code {code}"
    seconds: float = json.loads((out / "run.json").read_text(encoding="utf-8"))["seconds"]
    return seconds


def train_peft(options: argparse.Namespace, data: Path, template: Path, out: Path) -> float:
    """The comparison's own loop: padded batches in the order of the file; seconds of the loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

    examples = encoded(Path(options.base), data, template=str(template), max_tokens=MOST_TOKENS)
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
    model = get_peft_model(model, config).to(device()).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * options.steps), options.steps)
    finish()
    began = time.perf_counter()
    for step in range(options.steps):
        padded_loss(model, examples[step * BATCH : (step + 1) * BATCH]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    finish()
    seconds = time.perf_counter() - began
    model.save_pretrained(str(out))
    return seconds


@torch.inference_mode()
def answers(options: argparse.Namespace, adapter: Path, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of plain transformers and PEFT to the prompts, in batches padded on the left."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(options.base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    model = PeftModel.from_pretrained(base, str(adapter)).to(device()).eval()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    greedy = GenerationConfig(max_new_tokens=LONGEST_ANSWER, **ends)
    texts: list[str] = []
    for first in range(0, len(prompts), options.test_batch):
        batch = list(prompts[first : first + options.test_batch])
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        written = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender and ask it the test questions."""
    from transformers import AutoTokenizer

    from atomtune.data.encoding.choose_template import load_template
    from atomtune.evaluate.intervals import share

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, template, out = folder / "learned.jsonl", folder / "metamath.jinja", folder / "run"
        template.write_text(TEMPLATE, encoding="utf-8")
        learned = to_learn(options.train, options.steps * BATCH, seed=options.seed)
        data.write_text("".join(json.dumps(record) + "\n" for record in learned), encoding="utf-8")
        train = train_atomtune if options.one == "atomtune" else train_peft
        seconds, peak = train(options, data, template, out), peak_memory_mb()
        asked = [*rows(options.test, "test")][: options.questions]
        loaded = load_template(str(template), AutoTokenizer.from_pretrained(options.base))
        prompts = [loaded.render([{"role": "user", "content": row["question"]}]) for row in asked]
        began = time.perf_counter()
        texts = answers(options, out, prompts)
        numbers = [(number_in(text), number_in(row["answer"])) for text, row in zip(texts, asked, strict=True)]
        accuracy = share([ours is not None and ours == right for ours, right in numbers], [1] * len(numbers))
        assert accuracy is not None, f"{options.test}: no questions"
        return {
            "name": options.one,
            "base": options.base,
            "seed": options.seed,
            "steps": options.steps,
            "accuracy": accuracy.as_list() if math.isfinite(accuracy.low) else [accuracy.value],
            "without a number": sum(ours is None for ours, _ in numbers),
            "questions": len(numbers),
            "seconds": seconds,
            "seconds of the answers": time.perf_counter() - began,
            "peak_memory_mb": peak,
            "device": torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }


def run_all(options: argparse.Namespace) -> None:
    """Run the contenders in turn, each in its own process; write a line of JSON when one ends."""
    shared = [word for name in _SHARED for word in (f"--{name}", str(getattr(options, name)))]
    for name in options.contenders:
        run_apart("benchmarks.metamath", [*shared, "--one", name], what=name, out=options.out)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row for each run."""
    head = ["| | accuracy on GSM8K, % | no number | training, s | peak, MB |", "|---|---|---|---|---|"]
    for line in lines:
        value, *ends = (f"{100 * share:.1f}" for share in line["accuracy"])
        head.append(
            f"| {line['name']}, seed {line['seed']} | {value} ({' to '.join(ends)}) | {line['without a number']} of "
            f"{line['questions']} | {line['seconds']:,.0f} | {line['peak_memory_mb']:,.0f} |"
        )
    return "\n".join(head)


_SHARED = ("base", "train", "test", "steps", "questions", "test_batch", "seed", "dtype")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a folder, or a name on the hub")
    parser.add_argument("--train", default="meta-math/MetaMathQA", help="rows of query and response")
    parser.add_argument("--test", default="openai/gsm8k:main", help="rows of question and answer")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--questions", type=int, default=10**9, help="ask only the first N test questions")
    parser.add_argument("--test_batch", type=int, default=50, help="questions answered at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--out", type=Path, default=Path("metamath.jsonl"))
    run_benchmark(parser, CONTENDERS, needed=["base"], run_one=run_one, run_all=run_all, table=table)


if __name__ == "__main__":
    main()
