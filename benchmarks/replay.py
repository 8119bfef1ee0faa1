"""One run by two programs: `atomtune train`, then transformers + PEFT with the same first weights and order of records.

    python -m benchmarks.replay --base FOLDER --data RECORDS.jsonl --held_out OTHERS.jsonl

Two runs may differ because of their seeds or because of the programs. Here the seeds are the same: float32, no dropout,
the base's own template, and all other settings as `atomtune train` chooses them. The plain side pads and steps with
torch's AdamW. Prints both held-out losses (nats per answer token) after each epoch, with six decimals.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import MAX_TOKENS, encoded, lora, plain_model
from benchmarks.quality import mean_nats

Encoded = dict[str, list[int]]


class Recorded:
    """A run of `atomtune train` with what repeats it: settings, first weights, and the records of each step."""

    def __init__(self, base: Path, data: Path, held_out: Path, out: Path, flags: Sequence[str]) -> None:
        from transformers import TrainerCallback

        from atomtune.cli import main
        from atomtune.train import run

        recorded = self
        self.steps: list[list[int]] = []

        class Watch(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                recorded.rate = args.learning_rate
                recorded.first_weights = {name: weight.detach().clone() for name, weight in trained(model).items()}

        class Recording(run.LoraTrainer):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.add_callback(Watch())

            def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
                batches, targets = super().get_batch_samples(*args, **kwargs)
                origins = [origin for batch in batches for origin in batch["origins"]]
                recorded.steps.append([int(origin.rpartition(":")[2]) - 1 for origin in origins])
                return batches, targets

        plain_trainer, run.LoraTrainer = run.LoraTrainer, Recording  # type: ignore[misc]
        try:
            code = main(
                [
                    *("train", "--model_path", str(base), "--dataset_path", str(data), "--eval_path", str(held_out)),
                    *("--output_dir", str(out), "--dtype", "float32", "--lora_dropout", "0"),
                    *("--max_seq_length", str(MAX_TOKENS), "--eval_strategy", "epoch", *flags),
                ]
            )
        finally:
            run.LoraTrainer = plain_trainer  # type: ignore[misc]
        assert code == 0, f"atomtune ended with exit code {code}"
        history = json.loads((out / "run.json").read_text(encoding="utf-8"))["eval_history"]
        self.losses = [entry["loss"] for entry in history if entry["step"]]


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def replayed(base: Path, recorded: Recorded, learned: Sequence[Encoded], held_out: Sequence[Encoded]) -> list[float]:
    """The held-out loss after each epoch of the same run in plain transformers and PEFT."""
    from peft import get_peft_model

    model = plain_model(base, torch.float32)
    model = get_peft_model(model, lora(model))
    weights = trained(model)
    assert weights.keys() == recorded.first_weights.keys(), "other layers are adapted"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(recorded.first_weights[name])
    optimizer = torch.optim.AdamW(weights.values(), lr=recorded.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(recorded.steps))
    steps_an_epoch = len(recorded.steps) // len(recorded.losses)
    losses = []
    for number, step in enumerate(recorded.steps, 1):
        padded_loss(model, [learned[record] for record in step]).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % steps_an_epoch == 0:
            losses.append(mean_nats(model.eval(), held_out))
            model.train()
    return losses


def padded_loss(model: Any, examples: Sequence[Encoded]) -> torch.Tensor:
    """Mean nats of an answer token in the batch, padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)
    ids, learned = (
        torch.tensor([one[name] + [0] * (longest - len(one[name])) for one in examples], device=model.device)
        for name in ("input_ids", "completion_mask")
    )
    labels = ids.masked_fill(learned == 0, -100)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def compare(base: Path, data: Path, held_out: Path, flags: Sequence[str]) -> list[tuple[float, float]]:
    """(atomtune's, the plain loop's) held-out loss after each epoch."""
    learned, others = encoded(base, data), encoded(base, held_out)
    lines = data.read_text(encoding="utf-8").splitlines()
    assert len(learned) == len(lines), "a record that is no single example has no line of its own"
    with tempfile.TemporaryDirectory() as out:
        recorded = Recorded(base, data, held_out, Path(out) / "run", flags)
    return list(zip(recorded.losses, replayed(base, recorded, learned, others), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="records to learn, one JSON object a line")
    parser.add_argument("--held_out", type=Path, required=True, help="records to evaluate on")
    options, flags = parser.parse_known_args()  # other flags go to `atomtune train`, for example --seed 1
    losses = compare(options.base, options.data, options.held_out, flags)
    print("| epoch | atomtune train | transformers + PEFT |\n|---|---|---|")
    for epoch, (ours, plain) in enumerate(losses, 1):
        print(f"| {epoch} | {ours:.6f} | {plain:.6f} |")


if __name__ == "__main__":
    main()
