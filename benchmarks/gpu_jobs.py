"""The jobs of the GPU's benchmark: each returns its figures as plain numbers.

machine     the card, versions, the rate of large matrix products and copies
files       what the others read; in a process of its own, because a tokenizer's threads do not outlive a fork
attention   every way of a row's attention against a dense float32 softmax, and its time a layer
equality    loss and gradients of the fast path against plain PEFT, one record at a time
throughput  a contender's steps
"""

import importlib.util
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_workloads
from benchmarks.gpu_meter import Meter, wait

RANK, ALPHA, RATE = 8, 32, 1e-4


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def import_everything() -> None:
    """What the jobs need, once, before they are forked."""
    import peft  # noqa: F401
    from transformers import Qwen2ForCausalLM, Trainer  # noqa: F401

    import atomtune.cli
    import atomtune.train.run
    import atomtune.verify  # noqa: F401

    if has("trl"):
        from trl import SFTTrainer  # noqa: F401


def memory_figures() -> dict[str, float]:
    """Gigabytes, of the device or of this process."""
    if has_gpu():
        used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gb": used / 1e9, "reserved_gb": reserved / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gb": peak / 1e9, "reserved_gb": peak / 1e9}


# --- machine ---------------------------------------------------------------------------------------------------------


def machine(job: dict[str, Any], base: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    size = 256 if job["dry_run"] else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    products = seconds_of(lambda: a @ b, times=2 if job["dry_run"] else 20)
    source = torch.empty(2**16 if job["dry_run"] else 2**31, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copies = seconds_of(lambda: target.copy_(source), times=10)
    not_finite = [torch.tensor([1.0, float(bad)], device=device()) for bad in ("nan", "inf")]
    return {
        "card": torch.cuda.get_device_name() if has_gpu() else "a CPU",
        "matmul_tflops": 2 * size**3 / products / 1e12,
        "copy_tb_s": 2 * len(source) / copies / 1e12,
        "versions": ", ".join(
            f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "trl", "liger_kernel")
        ),
        "python": sys.version.split()[0],
        # What the trainer asks of all gradients at once must see each of these.
        "largest_of_nan_and_inf": [
            str(torch.nn.utils.get_total_norm([torch.ones(9, device=device()), bad], float("inf")).item())
            for bad in not_finite
        ],
    }


def files(job: dict[str, Any], base: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    gpu_workloads.write_base(base, job["shape"])
    gpu_workloads.write_all(folder, dry_run=job["dry_run"])
    return {"files": sorted(path.name for path in folder.glob("*.jsonl"))}


def seconds_of(work: Callable[[], Any], *, times: int = 10) -> float:
    """Mean seconds of a call, the first three left out."""
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


# --- attention -------------------------------------------------------------------------------------------------------

Case = dict[str, Any]


def rows(*, small: bool) -> Iterator[tuple[str, Any]]:
    """(name, Row) as the workloads make them; small ones for the check."""
    from atomtune.batch.pack import pack
    from atomtune.batch.tree import graft
    from atomtune.data.records import Example

    draw = random.Random(0)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1_000) for _ in range(number))

    def examples(records: list[tuple[int, ...]]) -> list[Example]:
        return [Example(record, (0,) * len(record), "") for record in records]

    if small:
        prefix, middles = ids(75), [ids(33) for _ in range(3)]
        yield "tree", graft(examples([prefix + ids(draw.randint(5, 60)) for _ in range(9)]))
        yield "two levels", graft(examples([prefix + middles[n % 3] + ids(draw.randint(5, 60)) for n in range(9)]))
        yield "packed", pack(examples([ids(draw.randint(3, 90)) for _ in range(9)]))
        return
    style = ids(225)
    yield "style 16, tree", graft(examples([style + ids(draw.randint(20, 100)) for _ in range(16)]))
    yield "style 64, tree", graft(examples([style + ids(draw.randint(20, 100)) for _ in range(64)]))
    yield "short 64, packed", pack(examples([ids(draw.randint(25, 95)) for _ in range(64)]))
    yield "long 1", pack(examples([ids(3_072)]))
    yield "long 4, packed", pack(examples([ids(draw.randint(2_200, 3_800)) for _ in range(4)]))


#: Heads, heads of keys, their width, the values' width, window, soft cap, sinks.
CASES: dict[str, Case] = {
    "Qwen2.5-7B": {"heads": 28, "key_heads": 4, "width": 128},
    "all heads have keys": {"heads": 8, "key_heads": 8, "width": 64},
    "width 80": {"heads": 8, "key_heads": 2, "width": 80},
    "window 40": {"heads": 8, "key_heads": 2, "width": 64, "window": 40},
    "latent attention, 192 and 128": {"heads": 8, "key_heads": 8, "width": 192, "value_width": 128},
    "sinks": {"heads": 8, "key_heads": 2, "width": 64, "sinks": True},
    "sinks and a window": {"heads": 8, "key_heads": 2, "width": 64, "sinks": True, "window": 40},
    "soft cap": {"heads": 8, "key_heads": 2, "width": 64, "softcap": 1.0},
}


class Layer:
    """One layer's inputs over a row, and its attention by the ways there are."""

    def __init__(self, row: Any, case: Case, dtype: torch.dtype) -> None:
        from atomtune.batch.attention_plan import padded_length, plan_attention

        tokens = padded_length(len(row))
        self.window, self.softcap = case.get("window"), case.get("softcap")
        cut = {"windows": (None, self.window), "width": tokens}
        self.spans = plan_attention(row, **cut, cut="spans").to(device())
        self.blocks = plan_attention(row, **cut).to(device())
        draw = torch.Generator(device()).manual_seed(0)
        heads, width, value_width = case["heads"], case["width"], case.get("value_width", case["width"])

        def normal(count: int, wide: int) -> torch.Tensor:
            x = torch.randn(1, tokens, count, wide, generator=draw, device=device(), dtype=torch.float32)
            return x.to(dtype)

        self.inputs = [
            normal(count, wide).transpose(1, 2).requires_grad_()
            for count, wide in ((heads, width), (case["key_heads"], width), (case["key_heads"], value_width))
        ]
        self.grad = normal(heads, value_width)
        self.grad[:, len(row) :] = 0
        self.real = len(row)
        self.sinks = torch.randn(heads, generator=draw, device=device()).to(dtype) if case.get("sinks") else None

    def result(self, way: str) -> list[torch.Tensor]:
        """[out, dq, dk, dv] of the row's own tokens, by attend with its choice of a way overruled."""
        out = self.output(way)
        grads = torch.autograd.grad(out, self.inputs, self.grad)
        return [out.detach()[:, : self.real], *(grad[:, :, : self.real] for grad in grads)]

    def output(self, way: str) -> torch.Tensor:
        from atomtune.model import row_attention

        row_attention.way_of = lambda *_, **__: way  # type: ignore[assignment]
        plan = self.blocks if way == "blocks" else self.spans
        keywords = {"sliding_window": self.window, "softcap": self.softcap, "s_aux": self.sinks}
        out, _ = row_attention.attend(
            torch.nn.Module(), *self.inputs, None, **keywords, **{row_attention.ROW_PLAN: plan}
        )
        return out

    def dense(self) -> list[torch.Tensor]:
        """The same by a dense softmax in float32, as a textbook has it."""
        q, k, v = (x.detach().float().requires_grad_() for x in self.inputs)
        groups = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~self.spans.visible(self.window), -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float()[None, :, None, None].expand(1, -1, scores.shape[2], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)
        grads = torch.autograd.grad(out, (q, k, v), self.grad.float())
        return [out.detach()[:, : self.real], *(grad[:, :, : self.real] for grad in grads)]


def attention(job: dict[str, Any], base: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    """Errors first: a wrong kernel is seen in the first seconds."""
    worst: dict[str, float] = {}
    wrong: list[str] = []
    small_rows = list(rows(small=True))[1:2] if job["dry_run"] else rows(small=True)
    cases = {name: case for name, case in CASES.items() if not job["dry_run"] or case["heads"] < 28}
    for name, row in small_rows:
        for case_name, case in cases.items():
            for dtype in (torch.bfloat16, torch.float32):
                layer = Layer(row, case, dtype)
                reference = layer.dense()
                beside_a_mask = case.get("sinks") or case.get("softcap")
                for way in ("spans", "blocks") if beside_a_mask else ("spans", "mask", "blocks"):
                    label = f"{name}, {case_name}, {way}, {str(dtype).removeprefix('torch.')}"
                    try:
                        apart = [_apart(*pair) for pair in zip(layer.result(way), reference, strict=True)]
                    except Exception as error:  # noqa: BLE001  # the other ways are still to be seen
                        wrong.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
                        continue
                    kind = f"{way} {str(dtype).removeprefix('torch.')}"
                    worst[kind] = max(worst.get(kind, 0.0), *apart)
                    if not max(apart) < (1e-4 if dtype == torch.float32 else 2e-2):
                        wrong.append(f"{label}: out, dq, dk, dv differ by {apart}")
    times = {} if job["dry_run"] else _times_a_layer()
    return {"right": not wrong, "worst": worst, "wrong": wrong[:12], "ms_a_layer": times}


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 norm of the difference."""
    return float(f"{((ours.float() - theirs).norm() / theirs.norm()).item():.2e}")


def _times_a_layer() -> dict[str, dict[str, Any]]:
    """Milliseconds of one layer's attention, forward and backward, of a Qwen2.5-7B in bfloat16."""
    times: dict[str, dict[str, Any]] = {}
    for name, row in rows(small=False):
        layer = Layer(row, CASES["Qwen2.5-7B"], torch.bfloat16)
        tokens = layer.grad.shape[1]
        times[name] = {"tokens": tokens}
        for way in ("spans", "mask") if tokens <= 8_192 else ("spans",):

            def both(way: str = way, layer: Layer = layer) -> None:
                torch.autograd.grad(layer.output(way), layer.inputs, layer.grad)

            times[name][way] = round(1e3 * seconds_of(both, times=20), 3)
    return times


# --- equality --------------------------------------------------------------------------------------------------------


def equality(job: dict[str, Any], base: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    """Relative differences of loss and worst LoRA gradient, by dtype and way; `padded` is plain PEFT's own noise."""
    from atomtune.model import row_attention

    examples = _encoded_examples(base, folder / "style.jsonl", 5 if job["dry_run"] else 24)
    chosen = row_attention.way_of
    figures: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        alone = _loss_and_gradients(None, examples, dtype, tiny=job["dry_run"])
        kind = str(dtype).removeprefix("torch.")
        for layout, way in (("padded", ""), ("packed", ""), ("tree", ""), ("tree", "spans"), ("tree", "mask")):
            row_attention.way_of = (lambda *_, way=way, **__: way) if way else chosen  # type: ignore[assignment]
            found = _loss_and_gradients(layout, examples, dtype, tiny=job["dry_run"])
            loss = abs(found[0] - alone[0]) / alone[0]
            worst = max(_apart(found[1][name], gradient) for name, gradient in alone[1].items())
            figures[f"{kind} {layout} {way}".strip()] = {"loss": float(f"{loss:.1e}"), "gradient": worst}
    return figures


def _encoded_examples(base: Path, data: Path, count: int) -> list[Any]:
    from atomtune.data.cache import Rules, as_examples, examples_of
    from atomtune.data.encoding.chat_template import load_template
    from atomtune.model.load import load_tokenizer

    template = load_template("atom", load_tokenizer(str(base)))
    rules = Rules(max_tokens=gpu_workloads.LENGTHS[data.stem], learn="last")
    stored = examples_of(data, template, rules, cache_dir=data.parent / "store").examples
    return [example for row in stored.select(range(min(count, len(stored)))) for example in as_examples(row)]


def _loss_and_gradients(
    layout: Any, examples: list[Any], dtype: torch.dtype, *, tiny: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a small base with an adapter that has learned; without a layout one record at a time through plain PEFT."""
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atomtune.batch.collate import Collator
    from atomtune.model.fused_lora import compute_together
    from atomtune.model.layout_support import cut_of, why_padded, windows_of
    from atomtune.model.loss import target_nats

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8_000, hidden_size=64 if tiny else 512, intermediate_size=1_376, num_hidden_layers=2 if tiny else 4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2_048, use_cache=False,
    )  # fmt: skip
    with torch.device(device()):
        model = get_peft_model(Qwen2ForCausalLM(config).to(dtype), lora(alpha=16))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
    total = 0.0
    if layout is None:
        for example in examples:
            ids = torch.tensor([example.ids], device=device())
            surprise = -model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            nats = (surprise * torch.tensor(example.learn[1:], device=device())).sum()
            nats.backward()
            total += nats.item()
    else:
        if layout != "padded":
            assert why_padded(model) is None
            compute_together(model, input_ids=torch.zeros(1, 2, dtype=torch.long, device=device()))
        windows = windows_of(model) if layout != "padded" else (None,)
        collator = Collator(layout=layout, pad_id=0, as_examples=lambda row: [], windows=windows, cut=cut_of(model))
        batch = collator.lay(examples)
        on_device = {
            name: value.to(device()) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        nats, _ = target_nats(model, on_device)
        nats.backward()
        total = nats.item()
    return total, {name: w.grad.float() for name, w in model.named_parameters() if w.grad is not None}


def lora(alpha: int = ALPHA) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


# --- throughput ------------------------------------------------------------------------------------------------------


def throughput(job: dict[str, Any], base: Path, folder: Path, scratch: Path) -> dict[str, Any]:
    """A contender's steps."""
    contender = job["contender"]
    if contender.startswith("trl") and not has("trl"):
        return {"error": "TRL is not installed"}
    if "liger" in contender and not (has("liger_kernel") and (has_gpu() or has("triton"))):
        return {"error": "Liger is not installed"}
    meter = Meter(dry_run=job["dry_run"], profile=job["profile"])
    data = folder / f"{job['workload']}.jsonl"
    run = atomtune if contender.startswith("atomtune") else trl if contender.startswith("trl") else plain
    notes = run(job, meter, base, data, scratch)
    figures = meter.figures | memory_figures() | notes
    weights = _weights_of_layers(base)
    rate = 1e12 * job.get("matmul_tflops", float("inf"))
    return figures | {"share_of_matmul": 4 * weights * figures["tokens_per_s"] / rate}


def _weights_of_layers(base: Path) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return sum(weight.numel() for name, weight in model.named_parameters() if ".layers." in name)


def random_model(base: Path, dtype: torch.dtype = torch.bfloat16, **keywords: Any) -> Any:
    """A base of random weights, made where it computes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype, **keywords)


def atomtune(job: dict[str, Any], meter: Meter, base: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """The command a user types, with its defaults."""
    import json

    import transformers

    from atomtune.cli import main
    from atomtune.train import run

    def from_pretrained(
        path: str, *_: Any, dtype: torch.dtype = torch.bfloat16, **__: Any
    ) -> tuple[Any, dict[str, Any]]:
        return random_model(Path(path), dtype), {"missing_keys": [], "unexpected_keys": []}

    transformers.AutoModelForCausalLM.from_pretrained = staticmethod(from_pretrained)

    class Metered(run.LoraTrainer):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.add_callback(meter)

        def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
            batches, targets = super().get_batch_samples(*arguments, **keywords)
            if batches:
                meter.count(
                    tokens=sum(batch["input_ids"].numel() for batch in batches),
                    examples=sum(batch["examples"] for batch in batches),
                )
            return batches, targets

    run.LoraTrainer = Metered  # type: ignore[misc]
    liger = ["--use_liger_kernel", "true", "--liger_kernel_config", '{"fused_linear_cross_entropy": false}']
    code = main(
        [
            *("train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", f"{scratch}/run"),
            *("--template", "atom", "--learn", "last", "--max_seq_length", str(gpu_workloads.LENGTHS[data.stem])),
            *("--num_train_epochs", "1", "--per_device_train_batch_size", str(job["batch"])),
            *(
                "--learning_rate",
                str(RATE),
                "--lora_rank",
                str(RANK),
                "--lora_alpha",
                str(ALPHA),
                "--lora_dropout",
                "0",
            ),
            *("--dtype", "bfloat16", "--save_strategy", "no", "--logging_steps", "1" if job["dry_run"] else "5"),
            *(liger if "liger" in job["contender"] else []),
        ]
    )
    record = json.loads((scratch / "run" / "run.json").read_text())
    recomputed = ", recomputed" if record.get("activations_recomputed") else ""
    return {"loss": record["train_loss"], "note": f"{record['layout']}{recomputed}", "exit": code}


def encoded(base: Path, data: Path) -> list[dict[str, list[int]]]:
    """Every record as ids and learned positions, by atomtune's own encoding."""
    examples = _encoded_examples(base, data, 10**9)
    return [{"input_ids": list(example.ids), "completion_mask": list(example.learn)} for example in examples]


def trainer_arguments(scratch: Path) -> dict[str, Any]:
    return {
        "output_dir": str(scratch),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": has_gpu(),
        "use_cpu": not has_gpu(),
    }


def trl(job: dict[str, Any], meter: Meter, base: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """TRL's SFTTrainer; packed, a row holds about as many records as the others' batch.

    Activations are kept if they fit.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    records = encoded(base, data)
    mean = sum(len(record["input_ids"]) for record in records) / len(records)
    packed = "packed" in job["contender"]
    tokens_a_step = job["batch"] * mean
    trainer = SFTTrainer(
        model=random_model(base),
        args=SFTConfig(
            **trainer_arguments(scratch),
            per_device_train_batch_size=1 if packed else job["batch"],
            max_length=int(tokens_a_step) if packed else gpu_workloads.LENGTHS[data.stem],
            packing=packed,
            completion_only_loss=True,
            gradient_checkpointing=tokens_a_step > 7_000,  # 6.3 MB a token and an H100's 80 GB
            use_liger_kernel="liger" in job["contender"],
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(),
        callbacks=[meter],
    )
    _count_batches(trainer, meter, records_a_token=1 / mean)
    result = trainer.train()
    return {"loss": result.training_loss, "note": "recomputed" if tokens_a_step > 7_000 else ""}


def plain(job: dict[str, Any], meter: Meter, base: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """transformers' Trainer and PEFT, one record a row, padded to the batch's longest."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = random_model(base)
    model.config.use_cache = False
    records = encoded(base, data)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(record["input_ids"]) for record in batch)
        ids, labels, mask = [], [], []
        for record in batch:
            padding = longest - len(record["input_ids"])
            learned = zip(record["input_ids"], record["completion_mask"], strict=True)
            ids.append(record["input_ids"] + [0] * padding)
            labels.append([token if times else -100 for token, times in learned] + [-100] * padding)
            mask.append([1] * len(record["input_ids"]) + [0] * padding)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}

    trainer = Trainer(
        model=get_peft_model(model, lora()),
        train_dataset=records,
        args=TrainingArguments(
            **trainer_arguments(scratch), per_device_train_batch_size=job["batch"], remove_unused_columns=False
        ),
        data_collator=collate,
        callbacks=[meter],
    )
    _count_batches(trainer, meter)
    return {"loss": trainer.train().training_loss}


def _count_batches(trainer: Any, meter: Meter, records_a_token: float | None = None) -> None:
    """Let a Trainer's own batches be counted; packed rows hold as many records as their tokens say."""
    fetch = trainer.get_batch_samples

    def counted(*arguments: Any, **keywords: Any) -> Any:
        batches, items = fetch(*arguments, **keywords)
        if batches:
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            of_rows = sum(len(batch["input_ids"]) for batch in batches)
            packed = of_rows == len(batches) and records_a_token is not None
            meter.count(
                tokens=tokens, examples=round(tokens * records_a_token) if packed and records_a_token else of_rows
            )
        return batches, items

    trainer.get_batch_samples = counted


KINDS: dict[str, Callable[[dict[str, Any], Path, Path, Path], dict[str, Any]]] = {
    "machine": machine,
    "files": files,
    "attention": attention,
    "equality": equality,
    "throughput": throughput,
}
