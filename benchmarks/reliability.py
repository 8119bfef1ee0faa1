"""`make reliability`: the same faults for atomtune and for transformers' own Trainer with PEFT, and their outcomes.

Every row is measured on a tiny Llama that is created here. The process really dies, the files are really damaged, and
the disk is really full (if this machine allows mounting a small one).
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import faults, workloads
from benchmarks.faults import SAVE_STEPS, STEPS, adapter, forked, outcome

Step = Callable[[int, Any, Callable[[], torch.Tensor]], torch.Tensor]


class Trial:
    """One runner with its base, its data, and an undisturbed run."""

    def __init__(self, name: str, base: Path, data: Path, folder: Path) -> None:
        self.name, self.runner, self.base, self.data, self.folder = name, faults.RUNNERS[name], base, data, folder
        self.whole = folder / "whole"
        self.points = faults.points_of_a_save(self.runner, base, data, self.whole)
        self.expected = adapter(self.whole) or b""
        self._count = 0

    def copy(self) -> Path:
        """A copy of the undisturbed run's folder as it was after the last save but one."""
        self._count += 1
        out = self.folder / f"copy-{self._count}"
        shutil.copytree(self.whole, out)
        shutil.rmtree(out / f"checkpoint-{STEPS}")
        (out / "adapter_model.safetensors").unlink()
        if (out / "run.json").is_file():
            (out / "run.json").write_text(json.dumps({"status": "running"}))
        return out

    def newest(self, out: Path) -> Path:
        return out / f"checkpoint-{STEPS - SAVE_STEPS}"

    def resumed(self, out: Path, *, data: Path | None = None) -> str:
        return outcome(self.runner, self.base, data or self.data, out, expected=self.expected)


def _counted(outcomes: Iterator[str]) -> str:
    counts = collections.Counter(outcomes)
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common())


def killed_while_saving(trial: Trial, size: int) -> str:
    stride = max(1, trial.points // size)
    points = list(range(1, trial.points + 1, stride))
    outcomes = faults.killed_at_points(
        trial.runner, trial.base, trial.data, trial.folder, points=points, expected=trial.expected
    )
    return f"{len(points)} of {trial.points} points: {_counted(what for _, what in outcomes)}"


def killed_at_any_moment(trial: Trial, size: int) -> str:
    began = time.perf_counter()
    forked(lambda: trial.runner(trial.base, trial.data, trial.folder / "timed", resume=False))
    longest, draw = time.perf_counter() - began, random.Random(0)

    def killed(number: int) -> str:
        out = trial.folder / f"moment-{number}"
        code = forked(
            lambda: trial.runner(trial.base, trial.data, out, resume=True), kill_after=draw.uniform(0, longest)
        )
        return "done before" if code == 0 else trial.resumed(out)

    return _counted(killed(number) for number in range(size))


def flipped_bits(trial: Trial, size: int) -> str:
    draw = random.Random(0)

    def flipped() -> str:
        out = trial.copy()
        file = draw.choice(sorted(path for path in trial.newest(out).iterdir() if path.is_file()))
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        what = trial.resumed(out)
        shutil.rmtree(out)
        return what

    return _counted(flipped() for _ in range(size))


def missing_optimizer(trial: Trial, size: int) -> str:
    out = trial.copy()
    for file in trial.newest(out).glob("optimizer*"):
        file.unlink()
    return trial.resumed(out)


def changed_data(trial: Trial, size: int) -> str:
    out, other = trial.copy(), trial.folder / trial.data.name
    other.write_text(
        "".join(sorted(trial.data.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8"
    )
    what = trial.resumed(out, data=other)
    return "refused" if what == "cannot resume" else what


def with_steps(trial: Trial, out: Path, step: Step) -> int:
    """The exit code of a new run in which each training step is `step(number, model, plain_step)`."""

    def run() -> int:
        from transformers import Trainer

        plain, numbers = Trainer.training_step, itertools.count(1)

        def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return step(next(numbers), self.model, lambda: plain(self, *args, **kwargs))

        Trainer.training_step = training_step
        return trial.runner(trial.base, trial.data, out, resume=False)

    return forked(run)


def not_finite(trial: Trial, size: int) -> str:
    """The third step's loss and gradients are NaN."""
    out = trial.folder / "nan"

    def step(number: int, model: Any, plain_step: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = plain_step()
        if number != 3:
            return loss
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.fill_(float("nan"))
        return loss * float("nan")

    code = with_steps(trial, out, step)
    saved = [file for file in sorted(out.rglob("adapter_model.safetensors")) if _is_spoiled(file)]
    logged = []
    for file in sorted(out.glob("checkpoint-*/trainer_state.json")):
        logged += [entry["loss"] for entry in json.loads(file.read_text())["log_history"] if entry.get("step") == 3]
    shown = f"; step 3 logged as {logged[-1]}" if logged else ""
    return f"exit code {code}, {len(saved)} adapters with NaN saved{shown}"


def _is_spoiled(file: Path) -> bool:
    from safetensors.torch import load_file

    return any(not bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def told_to_stop(trial: Trial, size: int) -> str:
    """The fourth step gets SIGTERM."""
    out = trial.folder / "term"

    def step(number: int, model: Any, plain_step: Callable[[], torch.Tensor]) -> torch.Tensor:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return plain_step()

    code = with_steps(trial, out, step)
    left = "a final adapter" if adapter(out) is not None else "no final adapter"
    return f"exit code {code}, {left}; resumed: {trial.resumed(out)}"


def a_folder_of_the_users(trial: Trial, size: int) -> str:
    out = trial.folder / "users"
    (out / "checkpoint-final").mkdir(parents=True)
    (out / "checkpoint-final" / "mine").write_text("x")
    os.utime(out / "checkpoint-final", (0, 0))
    code = forked(lambda: trial.runner(trial.base, trial.data, out, resume=False))
    return f"exit code {code}, checkpoint-final {'kept' if (out / 'checkpoint-final' / 'mine').exists() else 'deleted'}"


def another_base(trial: Trial, size: int) -> str:
    """Use the adapter on a base with the same shape and other weights."""
    from safetensors.torch import load_file, save_file

    other = trial.folder / "other-base"
    shutil.copytree(trial.base, other)
    weights = {name: tensor * 1.1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    def use() -> int:
        if trial.name == "atomtune":
            from atomtune.cli import main

            chat = ["chat", "--adapter_path", str(trial.whole), "--model_path", str(other), "--prompt", "x"]
            return main([*chat, "--max_new_tokens", "1"])
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(other), str(trial.whole))
        return 0

    return "refused" if forked(use) else "loaded in silence"


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)


def full_disk(trial: Trial, size: int) -> str:
    """The disk has room for two and a half saves; then it gets more room and the run is resumed."""
    room = sum(path.stat().st_size for path in trial.newest(trial.whole).iterdir())
    with _small_disk(trial.folder, f"{int(2.6 * room) // 1024}k") as disk:
        if disk is None:
            return "not measured: this machine does not let us mount"
        out = disk / "out"
        code = forked(lambda: trial.runner(trial.base, trial.data, out, resume=False))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        return f"exit code {code}; then with room: {trial.resumed(out)}"


FAULTS: dict[str, Callable[[Trial, int], str]] = {
    "kill -9 at a point of a save, then resume": killed_while_saving,
    "kill -9 at a random moment, then resume": killed_at_any_moment,
    "one bit flipped in the newest checkpoint, then resume": flipped_bits,
    "the newest checkpoint's optimizer is gone, then resume": missing_optimizer,
    "the disk fills up during a save": full_disk,
    "the data file changed, then resume": changed_data,
    "a loss and its gradient are NaN": not_finite,
    "SIGTERM during a step": told_to_stop,
    "a folder `checkpoint-final` of the user's own": a_folder_of_the_users,
    "the adapter is used on another base of the same shape": another_base,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=40, help="how many points, moments and bits; 40")
    parser.add_argument("--faults", nargs="+", type=int, default=list(range(1, len(FAULTS) + 1)), help="their numbers")
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"), help="table.md; runs/reliability")
    options = parser.parse_args()
    import atomtune.train.run  # noqa: F401  # imported once, before the forks

    lines = ["| fault | atomtune | transformers' Trainer + PEFT |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = workloads.read(workloads.PERSONA, 40)
        base = workloads.build_base(folder / "base", records, "toy")
        data = workloads.write("short", records, folder / "records.jsonl")
        trials = []
        for runner in faults.RUNNERS:
            (folder / runner).mkdir()
            trials.append(Trial(runner, base, data, folder / runner))
        for number, (fault, tried) in enumerate(FAULTS.items(), 1):
            if number not in options.faults:
                continue
            outcomes = []
            for trial in trials:
                outcomes.append(tried(trial, options.size))
                print(f"{number:2} {fault}  {trial.name}: {outcomes[-1]}", flush=True)
            lines.append(f"| {fault} | {' | '.join(outcomes)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "atomtune"))
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "table.md"
    table.write_text("\n".join([*lines, "", f"{versions}; `--size {options.size}`.", ""]), encoding="utf-8")
    print(f"\nThe table lies in {table}.")


if __name__ == "__main__":
    main()
