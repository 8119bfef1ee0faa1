"""Contenders on a GPU, all with the same token ids, targets, base and LoRA; each returns its figures as plain numbers.

atomtune           `atomtune train` with its defaults (Liger's kernels, steps replayed as CUDA graphs)
atomtune-eager     the same without CUDA graphs
atomtune-noliger   the same without Liger
atomtune-padded    the same with one record per row
trl-packed         TRL's SFTTrainer with rows of its default length, about as many as hold the others' batch
trl-padded         the same with one record per row
plain              transformers' Trainer and PEFT, one record per row, padded to the longest of the batch
trl-…-liger        with Liger's kernels

All except atomtune keep every activation if they fit into memory, which is their fastest way.
"""

import importlib.util
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atomtune.model.memory import activation_bytes
from benchmarks import gpu_workloads
from benchmarks.contender import ALPHA, RANK, RATE, encoded, lora, padded
from benchmarks.gpu_meter import Meter
from benchmarks.gpu_workloads import LENGTHS, device, has_gpu, random_model

#: Steps until CUDA graphs exist for most shapes of a workload, by (workload, batch). They are not measured, so that the
#: result holds for runs of a few hundred steps and more.
REPLAYED_WARM_UP = {("style", 16): 180, ("long", 1): 60, ("short", 64): 50, ("style", 64): 45}
#: Tokens of TRL's packed rows: its default. Longer rows are slower, because without flash-attn each has a dense mask.
TRL_ROW = 1_024
#: Share of the card's memory for a peer's weights and activations; above it, the peer recomputes activations.
USABLE = 0.9

Figures = dict[str, Any]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing(contender: str) -> str | None:
    """What this machine lacks for a contender; None if nothing."""
    if contender.startswith("trl") and not has("trl"):
        return "TRL is not installed"
    if contender.endswith("-liger") and not (has("liger_kernel") and has_gpu()):
        return "Liger needs its package and a GPU"
    return None


def throughput(job: Figures, base: Path, folder: Path, scratch: Path) -> Figures:
    """The figures of one contender on one workload."""
    contender = job["contender"]
    lacks = missing(contender)
    if lacks:
        return {"left_out": lacks}
    if job["shape"] in gpu_workloads.KINDS:
        gpu_workloads.take_kernels_untuned()
    warm_up = REPLAYED_WARM_UP.get((job["workload"], job["batch"]), 4) if contender == "atomtune" else 4
    meter = Meter(dry_run=job["dry_run"], profile=job["profile"], warm_up=warm_up)
    data = folder / f"{job['workload']}.jsonl"
    run = RUNS[contender.split("-")[0]]
    notes = run(job, meter, base, data, scratch)
    figures = meter.figures | memory_figures() | notes
    if "tokens_per_s" not in figures:
        return figures | {"error": "it ended before its warm-up did"}
    rate = 1e12 * job.get("matmul_tflops", float("inf"))
    return figures | {"share_of_matmul": 4 * _weights_a_token_meets(base) * figures["tokens_per_s"] / rate}


def memory_figures() -> dict[str, float]:
    """Peak gigabytes of the GPU if there is one, else of this process."""
    if has_gpu():
        used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gb": used / 1e9, "reserved_gb": reserved / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gb": peak / 1e9, "reserved_gb": peak / 1e9}


def _weights_a_token_meets(base: Path) -> float:
    """Weights that a token passes in the layers; of the experts only the chosen ones count."""
    from atomtune.model.adapter import LoraSpec
    from atomtune.plan.model_size import measure

    return measure(str(base), LoraSpec(rank=RANK, alpha=ALPHA, dropout=0.0, targets=("all-linear",))).body


def atomtune(job: Figures, meter: Meter, base: Path, data: Path, scratch: Path) -> Figures:
    """Train with `atomtune train` and its defaults."""
    from atomtune.cli import main
    from atomtune.train import run

    gpu_workloads.load_random_weights()

    class Metered(run.LoraTrainer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.add_callback(meter)

        def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
            batches, targets = super().get_batch_samples(*arguments, **keywords)
            if batches:
                meter.count(
                    tokens=sum(batch["input_ids"].numel() for batch in batches),
                    examples=sum(batch["records"] for batch in batches),
                )
            return batches, targets

    run.LoraTrainer = Metered  # type: ignore[misc]
    flags = {
        "model_path": base, "dataset_path": data, "output_dir": scratch / "run", "template": "atom", "learn": "last",
        "max_seq_length": LENGTHS[data.stem], "num_train_epochs": 1, "per_device_train_batch_size": job["batch"],
        "learning_rate": RATE, "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "dtype": "bfloat16",
        "save_strategy": "no", "logging_steps": 1 if job["dry_run"] else 5, "eval_size": 0,
    }  # fmt: skip
    if job["contender"] == "atomtune-eager":
        flags |= {"cuda_graphs": "false"}
    if job["contender"] == "atomtune-noliger":
        flags |= {"use_liger_kernel": "false"}
    if job["contender"] == "atomtune-padded":
        flags |= {"layout": "padded"}
    code = main(["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    record = json.loads((scratch / "run" / "run.json").read_text())
    recomputed = ", recomputed" if record.get("activations_recomputed") else ""
    return {
        "loss": record.get("train_loss"),
        "note": f"{record.get('layout')}{recomputed}",
        "exit": code,
        "notices": record.get("notices"),
        "cuda_graphs": record.get("cuda_graphs"),
        "liger": record.get("liger_kernels"),
        **({} if code == 0 else {"error": f"exit code {code}: {record.get('reason')}"}),
    }


def trl(job: Figures, meter: Meter, base: Path, data: Path, scratch: Path) -> Figures:
    """Train with TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    records = _records(base, data)
    lengths = [len(record["input_ids"]) for record in records]
    packed = "packed" in job["contender"]
    row_tokens = max(128 if job["dry_run"] else TRL_ROW, *lengths) if packed else LENGTHS[data.stem]
    rows = job["batch"]
    if packed:
        rows = max(1, round(job["batch"] * sum(lengths) / len(lengths) / row_tokens))
    model = random_model(base)
    recompute = _must_recompute(model, rows * (row_tokens if packed else max(lengths)))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_trainer_arguments(scratch),
            per_device_train_batch_size=rows,
            max_length=row_tokens,
            packing=packed,
            completion_only_loss=True,
            gradient_checkpointing=recompute,
            use_liger_kernel="liger" in job["contender"],
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(model),
        callbacks=[meter],
    )
    trainer.data_collator = _counted(trainer.data_collator, meter)
    result = trainer.train()
    return {"loss": result.training_loss, "note": "recomputed" if recompute else ""}


def plain(job: Figures, meter: Meter, base: Path, data: Path, scratch: Path) -> Figures:
    """Train with transformers' Trainer and PEFT."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    records = _records(base, data)
    model = random_model(base)
    model.config.use_cache = False
    recompute = _must_recompute(model, job["batch"] * max(len(record["input_ids"]) for record in records))
    trainer = Trainer(
        model=get_peft_model(model, lora(model)),
        train_dataset=records,
        args=TrainingArguments(
            **_trainer_arguments(scratch),
            per_device_train_batch_size=job["batch"],
            remove_unused_columns=False,
            gradient_checkpointing=recompute,
        ),
        data_collator=_counted(padded, meter),
        callbacks=[meter],
    )
    loss = trainer.train().training_loss
    return {"loss": loss, "note": "recomputed" if recompute else ""}


RUNS: dict[str, Callable[[Figures, Meter, Path, Path, Path], Figures]] = {
    "atomtune": atomtune,
    "trl": trl,
    "plain": plain,
}


def _records(base: Path, data: Path) -> list[dict[str, list[int]]]:
    return encoded(base, data, template="atom", max_tokens=LENGTHS[data.stem], learn="last")


def _must_recompute(model: Any, tokens: int) -> bool:
    if not has_gpu():
        return False
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    kept = activation_bytes(model.config, tokens=tokens, element_bytes=2)
    return weights + kept > USABLE * torch.cuda.get_device_properties(0).total_memory


def _trainer_arguments(scratch: Path) -> Figures:
    return {
        "output_dir": str(scratch),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": has_gpu(),
        "use_cpu": device().type == "cpu",
    }


def _counted(collate: Callable[[Any], Any], meter: Meter) -> Callable[[Any], Any]:
    """The same collator, which also reports each batch to the meter. A packed row lists the lengths of its records."""

    def counted(features: list[dict[str, Any]]) -> Any:
        batch = collate(features)
        examples = sum(len(feature["seq_lengths"]) if "seq_lengths" in feature else 1 for feature in features)
        meter.count(tokens=batch["input_ids"].numel(), examples=examples)
        return batch

    return counted
