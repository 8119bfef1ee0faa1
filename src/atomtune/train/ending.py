"""Ending: what a finished run saves and prints: the adapter, whether training worked, and what to do next."""

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from atomtune.console import program
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import printable
from atomtune.durations import duration
from atomtune.folders import publish
from atomtune.hub_reach import endpoint_shown
from atomtune.model.adapter import refuse_empty
from atomtune.model.adapter_folder import CERTIFICATE, WEIGHTS
from atomtune.model.memory import peak_bytes
from atomtune.train.checkpoint.atomic import staged
from atomtune.train.hub_upload import HubUpload
from atomtune.train.outcome import Outcome, outcome
from atomtune.train.progress import LossPicture
from atomtune.train.report_page import write_page
from atomtune.train.run_context import RunContext
from atomtune.train.run_report import histories, logged
from atomtune.train.samples import Sample, Samples, all_as_before, table_of, to_run_json
from atomtune.train.split import like_trained_ones
from atomtune.train.trainer import LoraTrainer


def finish(run: RunContext, trainer: LoraTrainer, samples: Samples, picture: LossPicture, ledger: Ledger) -> None:
    """Save the adapter, record the run, and print how it went."""
    _save_adapter(run, trainer)
    run.record.update(status="finished", train_loss=trainer.mean_loss(), **figures(trainer))
    if run.settings.data.streaming:
        _say_waiting(run, trainer, ledger)
    # The adapter is saved, so an interrupted report is no failure: a scheduler that reads "stopped" or "failed" would
    # start the run again for nothing.
    try:
        _report(run, trainer, samples, picture, ledger)
    except KeyboardInterrupt as stop:
        _say_no_report(run, f"{stop} received while the report was written")
    except OSError as error:
        _say_no_report(run, f"the report could not be written ({error})")
    if trainer.upload is not None:
        _upload(run, trainer.upload, trainer.adapter_files)


def _upload(run: RunContext, upload: HubUpload, adapter_files: list[str]) -> None:
    """Upload the adapter to the hub, and say where it is or how to try again."""
    folder, repo = run.args.output_dir, upload.repo
    run.console.say(f"uploading the adapter to {repo} …")
    try:
        arrived = upload.finish(Path(folder), adapter_files)
    except KeyboardInterrupt as stop:
        run.console.notice(f"{stop} received during the upload.")
        arrived = False
    if arrived:
        run.console.say(f"uploaded: {endpoint_shown()}/{repo}")
    else:
        again = shlex.join(["hf", "upload", repo, folder, ".", *(f"--include={name}" for name in adapter_files)])
        run.console.notice(f"The adapter is saved here, but is not on the hub. Upload it: {again}")
    run.record.update(notices=run.console.notices)


def _say_waiting(run: RunContext, trainer: LoraTrainer, ledger: Ledger) -> None:
    """Give a notice about records that a stream read but did not train on; its ledger counts all that it read."""
    args = run.args
    # A row is a record, even if it has several examples.
    drawn = trainer.state.global_step * args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    waiting = max(ledger.records_used - drawn, 0)
    run.record.update(records_waiting=waiting)
    if waiting:
        run.console.notice(
            f"the stream read {ledger.records_used:,} records; {waiting:,} of these were still waiting to be shuffled "
            "at the end, and so not learned. A larger --max_steps includes them; a smaller --shuffle_buffer holds "
            "fewer back."
        )


def _say_no_report(run: RunContext, why: str) -> None:
    run.console.notice(
        f"{why}: the adapter is saved and complete; report.html and the answers in run.json may be missing."
    )
    with contextlib.suppress(OSError):  # the disk is full; everything but this notice is recorded
        run.record.update(notices=run.console.notices)


def _report(run: RunContext, trainer: LoraTrainer, samples: Samples, picture: LossPicture, ledger: Ledger) -> None:
    """Write the report, the loss picture and the last entries of run.json, and print the outcome."""
    answered = _answered(run, samples)
    result = replace(
        _outcome_of(run, trainer),
        answers=len(answered),
        as_before=all_as_before(answered),
        broken=sum(sample.is_broken for sample in answered),
    )
    history = trainer.state.log_history
    run.record.update(
        **_held_out_loss(result, logged(history, "eval_loss")),
        **histories(history),
        outcome=result.to_run_json(),
        samples=to_run_json(answered),
        notices=run.console.notices,
    )
    commands = next_commands(run)
    if run.args.process_index == 0:
        picture.draw(trainer.state)
        write_page(run.record.values, Path(run.args.output_dir), title=title_of(run), commands=commands)
    if answered:
        run.console.print()
        run.console.print(table_of(answered))
    _say(run, trainer, result)
    run.console.next_steps(commands)
    if ledger.shared_instruction is not None:
        run.console.say(
            "Other servers need the shared instruction (instruction in atomtune.json) with every request, "
            f"{samples.template.instruction_place}, as in training."
        )


def _held_out_loss(result: Outcome, held_out: Mapping[int, float]) -> dict[str, Any]:
    """The held-out loss of the kept adapter, else that of the last evaluation, and its step; empty if there is none."""
    step = result.kept_step if result.kept_step in held_out else result.last_step
    return {} if step is None else {"eval_loss": held_out[step], "eval_step": step}


def _answered(run: RunContext, samples: Samples) -> list[Sample]:
    """The answers after training; empty if the user interrupts them, so that the outcome is still printed."""
    try:
        return samples.answer_after()
    except KeyboardInterrupt as stop:
        run.console.notice(f"{stop} received while the tuned model answered: its answers are left out.")
        return []


def title_of(run: RunContext) -> str:
    """The names of the run and its data, as the title of a picture or a page."""
    files = ", ".join(Path(path).name for path in run.settings.data.dataset_paths)
    return printable(f"{Path(run.args.output_dir).name}: {files}")


def figures(trainer: LoraTrainer) -> dict[str, Any]:
    """The work and pace of the whole run; seconds is 0 if an earlier process had made all steps."""
    work = trainer.work
    seconds = work.elapsed() if trainer.state.global_step > trainer.first_step else 0.0
    return {
        "steps": trainer.state.global_step,
        "tokens_padded": work.tokens_padded,
        "tokens_computed": work.tokens_computed,
        "seconds": seconds,
        "skipped_steps": work.skipped_steps,
        "steps_without_gradient": work.steps_without_gradient,
        "examples_per_second": work.examples / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes(trainer.args.device),
    }


def _save_adapter(run: RunContext, trainer: LoraTrainer) -> None:
    """Save the adapter in the run's folder, complete or not at all."""
    refuse_empty(trainer.accelerator.unwrap_model(trainer.model))
    folder, is_first = Path(run.args.output_dir), run.args.process_index == 0
    if is_first:
        trainer.refuse_replaced_folder()
    with staged(folder / "adapter", clears=is_first) as staging:
        trainer.save_model(str(staging), _internal_call=True)  # otherwise the Trainer uploads its own choice of files
        if is_first:
            (folder / CERTIFICATE).unlink(missing_ok=True)  # it certifies the weights that are now replaced
            publish(staging, folder, last=WEIGHTS)


def _outcome_of(run: RunContext, trainer: LoraTrainer) -> Outcome:
    state, evaluated = trainer.state, trainer.eval_dataset
    return outcome(
        state.log_history,
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        kept_step=trainer.kept_step,
        in_steps=trainer.args.max_steps > 0,
        has_held_out=evaluated is not None,
        are_trained=evaluated is not None and 2 * len(like_trained_ones(run)) > len(evaluated),
    )


def _say(run: RunContext, trainer: LoraTrainer, result: Outcome) -> None:
    """Print the run's figures, whether it worked, and where the adapter is."""
    work, steps = trainer.work, trainer.state.global_step
    pace = ", all done before"
    if steps > trainer.first_step:
        pace = f" in {duration(work.elapsed())}, {work.examples / max(work.elapsed(), 1e-9):.1f} examples/s"
    done = f"Done: {steps:,} steps{pace}."
    patience = run.settings.run.early_stopping_patience
    if patience and steps < trainer.state.max_steps:
        done += f"\nEnded before step {trainer.state.max_steps:,}: --early_stopping_patience {patience}."
    run.console.say(f"\n{done}")
    run.console.say("\n".join(result.sentences()), style="bold")
    run.console.say(f"In {run.args.output_dir}: the adapter, report.html (the run as a page), run.json (all figures).")


def next_commands(run: RunContext) -> list[str]:
    """Commands for the next steps with a finished run, ready to copy."""
    atomtune, folder = program(), shlex.quote(run.args.output_dir)
    commands = [f"chat --adapter_path {folder}"]
    if run.settings.data.eval_size or run.settings.data.eval_path:
        commands.append(f"evaluate --adapter_path {folder}")
    commands.append(f"merge --adapter_path {folder} --output_dir {folder}/merged")
    if run.settings.demo:
        commands.append("train --model_path YOUR_MODEL --dataset_path YOUR.jsonl")
    return [f"{atomtune} {command}" for command in commands]
