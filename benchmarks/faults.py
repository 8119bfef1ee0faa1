"""Faults for a real training process: kill it at a chosen point of a save, or at a random moment.

A process that has imported everything forks one child per run, so that a hundred runs take minutes. Two runners get the
same faults: `atomtune`, and `stock`, which is transformers' Trainer with PEFT used like in its examples.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

#: Short runs with several saves, dropout, and a schedule whose state matters.
STEPS, SAVE_STEPS = 8, 2


def atomtune(base: Path, data: Path, out: Path, *, resume: bool) -> int:
    """Run `atomtune train` once and return its exit code."""
    from atomtune.cli import main

    command = ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out)]
    command += ["--dtype", "float32", "--per_device_train_batch_size", "4", "--learning_rate", "5e-3"]
    command += ["--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--logging_steps", "1", "--eval_size", "0"]
    return main([*command, *(["--resume"] if resume else [])])


def stock(base: Path, data: Path, out: Path, *, resume: bool) -> int:
    """The same run with transformers' own Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(f"{record['instruction']}\n{record['output']}").input_ids[:64] for record in records]

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora),
        args=TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            max_steps=STEPS,
            save_steps=SAVE_STEPS,
            logging_steps=1,
            save_total_limit=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **({"enable_jit_checkpoint": True} if "enable_jit_checkpoint" in known else {}),
        ),
        train_dataset=[{"input_ids": row} for row in rows],
        data_collator=collate,
    )
    last = get_last_checkpoint(str(out)) if resume and out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    return 0


RUNNERS: dict[str, Callable[..., int]] = {"atomtune": atomtune, "stock": stock}


def forked(action: Callable[[], int], *, kill_after: float | None = None) -> int:
    """Run an action in a silent child process; its exit code, or minus the number of the signal that killed it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        code = 1
        try:
            code = action()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001  # the exit code reports it
            pass
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(point: int, out: Path, action: Callable[[], int], *, report_to: int | None = None) -> int:
    """Run the action and kill this process at the given file operation of its second checkpoint.

    report_to  a file descriptor that gets the number of operations if the action ends by itself
    """
    reached = 0
    begins = f"checkpoint-{2 * SAVE_STEPS}"
    begun = False

    def operation(path: object) -> None:
        nonlocal reached, begun
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        begun = begun or begins in text
        if not begun or not text.startswith(str(out)) or f"checkpoint-{3 * SAVE_STEPS}" in text:
            return
        reached += 1
        if reached == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            operation(arguments[0])

    sys.addaudithook(heard)
    _around_writers(operation)
    code = action()
    if report_to is not None:
        os.write(report_to, str(reached).encode())
    return code


def _around_writers(operation: Callable[[object], None]) -> None:
    """Count writers in native code, whose file operations Python does not see: once before and once after each call."""
    import peft.peft_model

    def around(module: Any, name: str, path_at: int) -> None:
        real = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            operation(args[path_at])
            done = real(*args, **kwargs)
            operation(args[path_at])
            return done

        setattr(module, name, counted)

    around(torch, "save", 1)
    around(peft.peft_model, "safe_save_file", 1)


def points_of_a_save(runner: Callable[..., int], base: Path, data: Path, out: Path) -> int:
    """How many file operations the second checkpoint takes."""
    reader, writer = os.pipe()
    code = forked(lambda: dying_at(-1, out, lambda: runner(base, data, out, resume=False), report_to=writer))
    os.close(writer)
    with os.fdopen(reader) as report:
        count = int(report.read() or 0)
    if code:
        raise RuntimeError(f"the undisturbed run ended with {code}")
    return count


def adapter(out: Path) -> bytes | None:
    """The adapter in a run's folder, or None."""
    file = out / "adapter_model.safetensors"
    return file.read_bytes() if file.is_file() else None


def killed_at_points(
    runner: Callable[..., int], base: Path, data: Path, folder: Path, *, points: list[int], expected: bytes
) -> Iterator[tuple[int, str]]:
    """(point, outcome) for each point: kill the run there, then resume it once."""
    for point in points:
        out = folder / f"killed-{point}"
        code = forked(lambda out=out, point=point: dying_at(point, out, lambda: runner(base, data, out, resume=False)))
        if code != -signal.SIGKILL:
            raise RuntimeError(f"point {point} was not reached: exit code {code}")
        yield point, outcome(runner, base, data, out, expected=expected)


def outcome(runner: Callable[..., int], base: Path, data: Path, out: Path, *, expected: bytes) -> str:
    """Resume once: `identical`, `another adapter`, or `cannot resume`."""
    if forked(lambda: runner(base, data, out, resume=True)):
        return "cannot resume"
    return "identical" if adapter(out) == expected else "another adapter"


def killed_at_random(
    runner: Callable[..., int], base: Path, data: Path, out: Path, *, seed: int, longest: float
) -> tuple[int, bytes | None]:
    """Kill a run at random moments and resume it until it is done: (number of kills, its adapter)."""
    moments, kills = random.Random(seed), 0
    while True:
        code = forked(lambda: runner(base, data, out, resume=True), kill_after=moments.uniform(0.0, longest * 1.3))
        if code == 0:
            return kills, adapter(out)
        if code != -signal.SIGKILL:
            raise RuntimeError(f"ended with {code} after {kills} kills")
        kills += 1
