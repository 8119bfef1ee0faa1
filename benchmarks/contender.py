"""Train one contender for one epoch on one workload, in its own process, and print its figures as a line of JSON.

All contenders get the same base, the same token ids (encoded by atomtune) and the same target tokens: LoRA of rank 8 on
all linear layers, dropout 0, one epoch in batches of 16 records. `share_of_floor` compares the time with a lower bound:
4 x non-embedding weights x computed tokens, at the matmul rate measured in this process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from atomtune.choices import Learn
from atomtune.data.records import Example

BATCH, MAX_TOKENS, RATE, RANK, ALPHA = 16, 512, 1e-4, 8, 32

CONTENDERS = {
    "tutorial": "the tutorial's loop: padded, float32, gradient checkpointing",
    "trl-padded-fp32": "TRL SFTTrainer, padded, float32",
    "trl-packed-fp32": "TRL SFTTrainer, packed, float32",
    "trl-padded-bf16": "TRL SFTTrainer, padded, bfloat16",
    "trl-packed-bf16": "TRL SFTTrainer, packed, bfloat16",
    "atomtune-fp32": "atomtune, --layout auto, float32",
    "atomtune-bf16": "atomtune, --layout auto, bfloat16",
    "atomtune-padded-fp32": "atomtune, --layout padded, float32",
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of the fastest of eight square matrix products on the device."""
    size = 8192 if device().type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        finish()
        began = time.perf_counter()
        a @ b
        finish()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def finish() -> None:
    """Wait until the device has finished all queued work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def peak_memory_mb() -> float:
    """Peak memory of the GPU if there is one, else of the process."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def non_embedding_weights(base: Path) -> int:
    """Number of weights in the layers, without embedding and output matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def stopwatch() -> Any:
    """A Trainer callback that measures the `seconds` of the training loop, without loading and set-up."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            finish()
            self.began = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            finish()
            self.seconds = time.perf_counter() - self.began

    return Stopwatch()


def examples_in(base: Path, data: Path, *, template: str, max_tokens: int, learn: Learn) -> list[Example]:
    """Every record of a file as atomtune encodes it, the same for all contenders."""
    from atomtune.data.cache import examples_of
    from atomtune.data.encoded_source import Rules
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.data.example_table import as_examples
    from atomtune.model.load import load_tokenizer

    loaded = load_template(template, load_tokenizer(str(base)))
    rules = Rules(max_tokens=max_tokens, learn=learn)
    stored = examples_of(data, loaded, rules, cache_dir=data.parent / "store").examples
    return [example for row in stored for example in as_examples(row)]


def encoded(
    base: Path, data: Path, *, template: str = "auto", max_tokens: int = MAX_TOKENS, learn: Learn = "all"
) -> list[dict[str, list[int]]]:
    """Every record as token ids and a mask of the target tokens, by default with the base's own template."""
    examples = examples_in(base, data, template=template, max_tokens=max_tokens, learn=learn)
    return [{"input_ids": list(example.ids), "completion_mask": list(example.learn)} for example in examples]


def padded(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """ids, labels (-100 for tokens that are not targets) and mask, each [B, longest]."""
    longest = max(len(record["input_ids"]) for record in batch)
    ids, labels, mask = [], [], []
    for record in batch:
        tokens, learned = record["input_ids"], record["completion_mask"]
        filling = longest - len(tokens)
        ids.append(tokens + [0] * filling)
        answers = [token if times else -100 for token, times in zip(tokens, learned, strict=True)]
        labels.append(answers + [-100] * filling)
        mask.append([1] * len(tokens) + [0] * filling)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def plain_model(base: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def lora(model: Any) -> Any:
    """LoRA on the layers that atomtune adapts, because PEFT's own all-linear also adapts routers and experts."""
    from peft import LoraConfig

    from atomtune.model.lora_targets import all_linear

    targets = list(all_linear(model).adapted)
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def figures_of(module: str, words: Sequence[str], *, what: str) -> Any:
    """Run a benchmark's module in a process of its own; the last line of its output is its figures, as JSON."""
    ended = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{what} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def run_apart(module: str, words: Sequence[str], *, what: str, out: Path) -> None:
    """Run a benchmark's module in a process of its own; print its figures, and append them to a file."""
    line = json.dumps(figures_of(module, words, what=what))
    print(line, flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def run_benchmark(
    parser: argparse.ArgumentParser,
    contenders: Sequence[str],
    *,
    needed: Sequence[str],
    run_one: Callable[[argparse.Namespace], dict[str, Any]],
    run_all: Callable[[argparse.Namespace], None],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Do what a benchmark's command line asks for: train all contenders or one of them, or print a table of runs.

    needed   flags without which nothing can be trained
    run_one  trains the contender of --one in this process, as run_apart calls it; its figures are printed as JSON
    run_all  trains all of them
    """
    parser.add_argument("--table", type=Path, help="print the table of such a file and train nothing")
    parser.add_argument("--one", choices=contenders, help=argparse.SUPPRESS)
    options = parser.parse_args()
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
    elif missing:
        parser.error(f"missing: {', '.join(missing)}")
    elif options.one:
        print(json.dumps(run_one(options)))
    else:
        run_all(options)


def common(out: str) -> dict[str, Any]:
    return {
        "output_dir": out,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "logging_steps": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device().type == "cpu",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def plain(base: Path, data: Path, out: str, *, dtype: torch.dtype, checkpointing: bool) -> dict[str, Any]:
    """Train with transformers' Trainer, PEFT and the tutorial's padding collator; the loss is the model's own."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = plain_model(base, dtype)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = get_peft_model(model, lora(model))
    computed = 0

    def counted(features: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        nonlocal computed
        batch = padded(features)
        computed += batch["input_ids"].numel()
        return batch

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            # Without the mask, as in the tutorial: padding stands on the right, and has no labels
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    clock = stopwatch()
    trainer = Plain(
        model=model,
        train_dataset=encoded(base, data, template="atom", learn="last"),
        args=TrainingArguments(**common(out), per_device_train_batch_size=BATCH, remove_unused_columns=False),
        data_collator=counted,
        callbacks=[clock],
    )
    result = trainer.train()
    return {"seconds": clock.seconds, "computed_tokens": computed, "loss": result.training_loss}


def trl(base: Path, data: Path, out: str, *, packing: bool, dtype: torch.dtype, liger: bool) -> dict[str, Any]:
    """Train with TRL's SFTTrainer.

    With packing, a step takes as many rows as hold about 16 records, so that the number of updates is close to the
    others'. On a CPU these rows are computed one at a time (gradient accumulation), which is TRL's fastest way there.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = encoded(base, data, template="atom", learn="last")
    per_row = max(1, MAX_TOKENS * len(rows) // sum(len(row["input_ids"]) for row in rows))
    rows_a_step = max(1, BATCH // per_row) if packing else BATCH
    micro = 1 if packing and device().type == "cpu" else rows_a_step
    clock, model = stopwatch(), plain_model(base, dtype)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common(out),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows_a_step // micro,
            max_length=MAX_TOKENS,
            packing=packing,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_liger_kernel=liger,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(model),
        callbacks=[clock],
    )
    computed = 0
    collate = trainer.data_collator

    def counted(features: Any) -> Any:
        nonlocal computed
        batch = collate(features)
        computed += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counted
    result = trainer.train()
    return {"seconds": clock.seconds, "computed_tokens": computed, "loss": result.training_loss}


def atomtune(base: Path, data: Path, out: str, *, dtype: str, layout: str) -> dict[str, Any]:
    """Train with `atomtune train`, called like a user would."""
    from atomtune.cli import main

    code = main(
        [
            *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", f"{out}/run"),
            *("--template", "atom", "--learn", "last", "--max_seq_length", str(MAX_TOKENS), "--num_train_epochs", "1"),
            *("--per_device_train_batch_size", str(BATCH), "--learning_rate", str(RATE), "--dtype", dtype),
            *("--layout", layout),
            *("--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--lora_dropout", "0"),
            *("--gradient_checkpointing", "false", "--logging_steps", "10000", "--save_strategy", "no"),
            *("--eval_size", "0"),  # the other contenders hold out no records
        ]
    )
    assert code == 0, f"atomtune ended with exit code {code}"
    run = json.loads((Path(out) / "run" / "run.json").read_text())
    return {
        "seconds": run["seconds"],
        "computed_tokens": run["tokens_computed"],
        "loss": run["train_loss"],
        "layout": run["layout"],
    }


def train(name: str, base: Path, data: Path, out: str) -> dict[str, Any]:
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    if name == "tutorial" or name.startswith("plain"):
        return plain(base, data, out, dtype=dtype, checkpointing=name == "tutorial")
    if name.startswith("trl"):
        return trl(base, data, out, packing="packed" in name, dtype=dtype, liger="liger" in name)
    layout = "padded" if "padded" in name else "auto"
    return atomtune(base, data, out, dtype=str(dtype).removeprefix("torch."), layout=layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    rate = matmul_rate(torch.bfloat16 if options.name.endswith("bf16") else torch.float32)
    with tempfile.TemporaryDirectory() as out:
        figures = train(options.name, options.base, options.data, out)
    count = sum(1 for _ in options.data.open(encoding="utf-8"))
    floor = 4 * non_embedding_weights(options.base) * figures["computed_tokens"] / rate
    figures |= {
        "name": options.name,
        "workload": options.data.stem,
        "records": count,
        "examples_per_second": count / figures["seconds"],
        "tokens_per_second": figures["computed_tokens"] / figures["seconds"],
        "peak_memory_mb": peak_memory_mb(),
        "matmul_gflops": rate / 1e9,
        "share_of_floor": floor / figures["seconds"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
