"""Trial process: one trial as `atomtune train` in its own process.

If the system kills a trial for its memory, the sweep goes on; no GPU memory stays occupied; and a trial is exactly the
run that its command gives. The price is a few seconds a trial for starting Python and importing the libraries.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from atomtune.choices import RUN_RECORD
from atomtune.disk import read_json_object
from atomtune.errors import ExitCode
from atomtune.process import end_with_parent
from atomtune.sweep.trials import Trial

#: Seconds between two checks of a trial's progress.
LOOK_EVERY = 0.5
#: Seconds that a trial gets to end after it was stopped a second time; then it is killed.
ENDS_WITHIN = 20


@dataclass(frozen=True)
class Progress:
    """A trial's progress, read from its run.json."""

    steps: int = 0
    steps_planned: int = 0
    eval_history: tuple[tuple[int, float], ...] = ()

    @property
    def last_loss(self) -> float | None:
        return self.eval_history[-1][1] if self.eval_history else None


def run_trial(trial: Trial, folder: Path, *, watch: Callable[[Progress], bool]) -> Trial:
    """Run a trial to its end and return it with its result.

    folder  the sweep's folder, which holds the trial's settings file
    watch   gets the progress; returns True to stop a trial that is clearly worse than the others
    Raises KeyboardInterrupt after the trial has saved its checkpoint and ended.
    """
    began, pruned = time.monotonic(), False
    log = folder / f"{trial.name}.log"
    with log.open("ab") as output:
        attempt = output.tell()
        with _process(["train", str(folder / f"{trial.name}.yaml"), "--resume"], output) as process:
            while process.poll() is None:
                if watch(progress_of(folder / trial.name)) and not pruned:
                    pruned = True
                    process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY)
        code = process.returncode
    trial = replace(trial, seconds=round(trial.seconds + time.monotonic() - began, 1))
    return result_of(trial, folder, code=code, pruned=pruned, said=_text_from(log, attempt))


@contextlib.contextmanager
def _process(words: Sequence[str], output: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """`atomtune WORDS` in its own session: a Ctrl-C reaches it only once, through us. It ends with the block."""
    # In English, because `_reason` searches its log.
    environment = {**os.environ, "ATOMTUNE_LANGUAGE": "en"}
    process = subprocess.Popen(
        [sys.executable, "-m", "atomtune", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=os.name == "posix",
        preexec_fn=end_with_parent,  # noqa: PLW1509  # safe: see there
    )
    try:
        yield process
    except BaseException:
        _end(process)
        raise


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Let it save a checkpoint and end; a second Ctrl-C ends it at once."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(ENDS_WITHIN)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def progress_of(folder: Path) -> Progress:
    """The progress in a trial's run.json; all zero before the trial has begun."""
    record = _record_of(folder)
    with contextlib.suppress(TypeError, KeyError, ValueError):
        history = tuple((int(entry["step"]), float(entry["loss"])) for entry in record.get("eval_history", ()))
        return Progress(int(record.get("steps", 0)), int(record.get("steps_planned", 0)), history)
    return Progress()


def _record_of(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(folder / RUN_RECORD)
    except (OSError, ValueError):
        return {}


def result_of(trial: Trial, folder: Path, *, code: int, pruned: bool, said: str) -> Trial:
    """The trial with its result.

    code    its exit code; negative: the signal that killed it
    pruned  whether it was stopped because it was clearly worse than the others
    said    its output
    """
    record, progress = _record_of(folder / trial.name), progress_of(folder / trial.name)
    after_steps = {step: loss for step, loss in progress.eval_history if step > 0}
    trial = replace(
        trial,
        eval_history=progress.eval_history,
        loss_before=dict(progress.eval_history).get(0),
        best_step=min(after_steps, key=after_steps.__getitem__, default=None),
        eval_loss=min(after_steps.values(), default=None),
        reason=None,
    )
    if code == ExitCode.STOPPED:
        return replace(trial, status="pruned" if pruned else "stopped")
    if code != ExitCode.DONE:
        return replace(trial, status="failed", eval_loss=None, best_step=None, reason=_reason(code, said))
    loss = record.get("eval_loss")
    if not isinstance(loss, int | float):
        return replace(trial, status="failed", reason="it finished without a held-out loss")
    return replace(trial, status="finished", eval_loss=float(loss), best_step=record.get("eval_step", trial.best_step))


def _reason(code: int, said: str) -> str:
    """Why the run failed, in one line of its output; for a killed run, the signal."""
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return f"{killed}; most likely there was too little memory" if -code == 9 else killed
    before, marker, words = said.rpartition("atomtune train: ")
    if code == ExitCode.BUG and before.strip():  # the last line before "this is a bug" names the error
        words, marker = before, ""
    lines = [line for line in words.splitlines() if line.strip()]
    if not lines:
        return f"exit code {code}"
    return lines[0] if marker else f"exit code {code}: {lines[-1].strip()}"


def _text_from(log: Path, offset: int) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", "replace")
