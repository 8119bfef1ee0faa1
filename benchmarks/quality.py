"""Quality after the same number of updates: does atomtune train as well as TRL, and how long does each take?

    python -m benchmarks.quality --base FOLDER --data RECORDS.jsonl --seeds 1 2 3 --out quality.jsonl
    python -m benchmarks.quality --table quality.jsonl

Both get the same base, token ids, targets, batches of 16 and settings, so they make the same number of updates. TRL
pads, because packing would change the updates. Plain transformers and PEFT then score the adapters in float32 on
records that neither has seen: `loss` is the mean nats of an answer token. The runs take turns, each in its own process.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import (
    ALPHA,
    BATCH,
    MAX_TOKENS,
    RANK,
    common,
    encoded,
    finish,
    lora,
    peak_memory_mb,
    plain_model,
    run_apart,
    run_benchmark,
    stopwatch,
)

CONTENDERS = ("atomtune", "trl")
HELD_OUT = 100


def split(data: Path, *, seed: int, records: int, folder: Path) -> tuple[Path, Path]:
    """(training records, held-out records), split by the seed; all records of one question go to the same side."""
    by_question: dict[str, list[str]] = {}
    for line in data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_question.setdefault(f"{record['instruction']}\n{record.get('input', '')}", []).append(line)
    questions = list(by_question)
    random.Random(seed).shuffle(questions)
    held_out_lines: list[str] = []
    while len(held_out_lines) < HELD_OUT:
        held_out_lines += by_question[questions.pop()]
    learned_lines = [line for question in questions for line in by_question[question]][:records]
    learned, held_out = folder / "learned.jsonl", folder / "held-out.jsonl"
    learned.write_text("\n".join(learned_lines) + "\n", encoding="utf-8")
    held_out.write_text("\n".join(held_out_lines) + "\n", encoding="utf-8")
    return learned, held_out


def train_atomtune(base: Path, data: Path, out: Path, options: argparse.Namespace) -> float:
    """Train into `out`; seconds of the training loop."""
    from atomtune.cli import main

    code = main(
        [
            *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)),
            *("--max_seq_length", str(MAX_TOKENS), "--num_train_epochs", str(options.epochs), "--dtype", "bfloat16"),
            *("--per_device_train_batch_size", str(BATCH), "--learning_rate", str(options.rate)),
            *("--warmup_steps", "0", "--lr_scheduler_type", "linear", "--lora_dropout", "0", "--eval_size", "0"),
            *("--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--seed", str(options.seed)),
            *("--gradient_checkpointing", "false", "--logging_steps", "10000", "--save_strategy", "no"),
        ]
    )
    assert code == 0, f"atomtune ended with exit code {code}"
    seconds: float = json.loads((out / "run.json").read_text(encoding="utf-8"))["seconds"]
    return seconds


def train_trl(base: Path, data: Path, out: Path, options: argparse.Namespace) -> float:
    """Train into `out`; seconds of the training loop."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock, model = stopwatch(), plain_model(base, torch.bfloat16)
    settings = {**common(str(out)), "num_train_epochs": options.epochs, "learning_rate": options.rate}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **settings,
            per_device_train_batch_size=BATCH,
            max_length=MAX_TOKENS,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=True,
            seed=options.seed,
        ),
        train_dataset=Dataset.from_list(encoded(base, data)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(model),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(out))
    return float(clock.seconds)


def held_out_loss(base: Path, adapter: Path, data: Path) -> float:
    """Mean nats of an answer token with a saved adapter."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain_model(base, torch.float32), str(adapter)).eval()
    return mean_nats(model, encoded(base, data))


@torch.no_grad()
def mean_nats(model: Any, examples: Sequence[dict[str, list[int]]]) -> float:
    """Mean nats of an answer token, computed one record at a time."""
    nats, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        learned = torch.tensor(example["completion_mask"][1:], dtype=torch.bool)
        log_probabilities = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)  # [T - 1, V]
        of_targets = log_probabilities.gather(1, ids[0, 1:, None])[:, 0]
        nats -= of_targets[learned].sum().item()
        tokens += int(learned.sum())
    return nats / tokens


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        learned, held_out = split(options.data, seed=options.seed, records=options.records, folder=folder)
        out = folder / "run"
        train = train_atomtune if options.one == "atomtune" else train_trl
        seconds = train(options.base, learned, out, options)
        finish()
        return {
            "name": options.one,
            "data": options.data.stem,
            "records": sum(1 for _ in learned.open(encoding="utf-8")),
            "epochs": options.epochs,
            "rate": options.rate,
            "seed": options.seed,
            "loss": held_out_loss(options.base, out, held_out),
            "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        }


def run_all(options: argparse.Namespace) -> None:
    """Run both contenders for each seed, each run in its own process; write a line of JSON when one ends."""
    shared = [
        *("--base", str(options.base), "--data", str(options.data), "--records", str(options.records)),
        *("--epochs", str(options.epochs), "--rate", str(options.rate)),
    ]
    for number, seed in enumerate(options.seeds):
        for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
            words = [*shared, "--one", name, "--seed", str(seed)]
            run_apart("benchmarks.quality", words, what=f"{name}, seed {seed}", out=options.out)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown by data set: both held-out losses, their difference for each seed, and TRL's seconds over ours."""
    rows = [
        "| records of | seeds | updates | held-out loss | TRL's | difference, by seed | TRL's seconds over ours |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for data in dict.fromkeys(line["data"] for line in lines):
        of: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in CONTENDERS}
        for line in lines:
            if line["data"] == data:
                of[line["name"]][line["seed"]] = line
        seeds = sorted(of["atomtune"].keys() & of["trl"].keys())
        if not seeds:
            continue
        ours, theirs = ([of[name][seed] for seed in seeds] for name in CONTENDERS)
        losses = [statistics.mean(line["loss"] for line in side) for side in (ours, theirs)]
        apart = ", ".join(f"{a['loss'] - b['loss']:+.4f}" for a, b in zip(ours, theirs, strict=True))
        faster = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True))
        updates = int(ours[0]["epochs"] * -(-ours[0]["records"] // BATCH))
        rows.append(
            f"| {data} | {len(seeds)} | {updates} | {losses[0]:.4f} | {losses[1]:.4f} | {apart} | {faster:.1f} × |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path, help="instruction/input/output records, one JSON object a line")
    parser.add_argument("--records", type=int, default=400, help="records to learn (default 400)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    run_benchmark(parser, CONTENDERS, needed=["base", "data"], run_one=run_one, run_all=run_all, table=table)


if __name__ == "__main__":
    main()
