"""One run: settings in, adapter out, every step said and recorded.

The walk of the house: data.cache → batch.collate → model → trainer → run.json.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import PrinterCallback, set_seed

from atomtune.console import Console
from atomtune.data.encoding.chat_template import load_template
from atomtune.data.ledger import Ledger
from atomtune.errors import AtomtuneError, BadSettings, RunFailed, Stopped, UserError
from atomtune.model.adapter import refuse_empty
from atomtune.model.adapter_folder import WEIGHTS, AdapterMetadata
from atomtune.model.fingerprint import fingerprint
from atomtune.model.load import load_tokenizer, pad_id_of, quiet_libraries
from atomtune.model.memory import StepShape, is_out_of_memory, peak_bytes, remedies
from atomtune.settings.fields import TrainSettings
from atomtune.train.arguments import CHECKPOINTING, lengths, trainer_arguments
from atomtune.train.callbacks import Stop
from atomtune.train.checkpoint.atomic import clear_staging, publish, staged
from atomtune.train.checkpoint.start import Start, find_start
from atomtune.train.dataset import Data, read_data
from atomtune.train.demo import Samples
from atomtune.train.layout import check_equal, choose_layout
from atomtune.train.model import load_model
from atomtune.train.output_folder import answer, check_space, locked, same_command
from atomtune.train.progress import TrainingBar
from atomtune.train.run_context import Job
from atomtune.train.run_identity import identity, refuse_another_run
from atomtune.train.run_report import RunRecord, draw_loss, read_record
from atomtune.train.streaming import Stream
from atomtune.train.trainer import LoraTrainer

#: More passes over the records than this are probably not meant: the adapter learns them by heart.
MANY_PASSES = 30


def train(settings: TrainSettings) -> int:
    """Run `atomtune train`; the exit code, or an AtomtuneError that holds it."""
    began = time.monotonic()
    args = trainer_arguments(settings)
    first = args.process_index == 0
    console = Console(speaks=first)
    _quiet(settings)
    folder = Path(args.output_dir)
    lock = locked(folder) if first else contextlib.nullcontext()
    with lock:
        if first:
            clear_staging(folder)
        start = _as_the_first_rank(args, lambda: _start(settings, args, console))
        if start.said:
            console.say(start.said)
        if start.kind == "finished":
            return 0
        # A resumed run that does not come to train leaves the record of the run that did.
        record = RunRecord(folder, writes=first, waits=start.kind == "resume")
        job = Job(settings, args, start, read_record(folder), console, record)
        try:
            record.update(settings=settings.resolved(), lengths=lengths(args), start=start.kind)
            _run(job, began)
        except BaseException as error:
            told = answer(error, folder, again=same_command(settings))
            status = "preempted" if isinstance(told, Stopped) else "failed"
            with contextlib.suppress(OSError):  # the record may not fit on a full disk either
                record.update(status=status, reason=str(told) or type(told).__name__, notices=console.notices)
            if isinstance(error, Stopped) and args.world_size > 1:
                torch.distributed.barrier()  # a launcher ends the other ranks as soon as one is gone
            if told is error:
                raise
            raise told from error
    return 0


def _start(settings: TrainSettings, args: Any, console: Console) -> Start:
    asked = settings.run
    return find_start(
        Path(args.output_dir),
        resume=asked.resume,
        resume_from_checkpoint=asked.resume_from_checkpoint,
        checkpoint=asked.checkpoint,
        lengths=lengths(args),
        notice=console.notice,
    )


def _as_the_first_rank(args: Any, decide: Callable[[], Start]) -> Start:
    """What the first rank decides; the others would look into a folder that it has begun to fill."""
    if args.world_size <= 1:
        return decide()
    outcome: list[Any] = [None]
    if args.process_index == 0:
        try:
            outcome[0] = decide()
        except AtomtuneError as error:
            torch.distributed.broadcast_object_list([str(error)])
            raise
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], str):
        raise UserError(outcome[0])
    return cast(Start, outcome[0])


def _run(job: Job, began: float) -> None:
    settings = job.settings
    tokenizer = load_tokenizer(str(settings.model.model_path), trust_remote_code=settings.model.trust_remote_code)
    template = load_template(settings.data.template, tokenizer)
    tokenizer.chat_template = template.source  # what is trained is what is served
    data = read_data(job, template)
    now = identity(job, template, data)
    refuse_another_run(job, now)
    if job.before.get("lengths") and job.start.kind == "resume" and job.before["lengths"] != lengths(job.args):
        job.console.notice(
            "the run's length changed, so the learning-rate schedule is stretched to the new length from here."
        )
    if settings.run.verify:
        check_equal(job, data, pad_id=pad_id_of(tokenizer))
    set_seed(job.args.seed)
    longest = settings.data.max_seq_length if settings.data.streaming else data.ledger.longest_tokens
    model = load_model(job, longest_tokens=longest)
    collator = choose_layout(job, model, tokenizer, data)
    metadata = AdapterMetadata(
        template=template.name,
        instruction_role=template.instruction_role,
        stop=template.stop,
        instruction=data.ledger.shared_instruction,
        data_hash=data.data_hash,
        max_seq_length=settings.data.max_seq_length,
        base=fingerprint(str(settings.model.model_path)) or "",
    )
    minutes = settings.run.max_minutes
    try:
        trainer = LoraTrainer(
            tokenizer=tokenizer,
            metadata=metadata,
            facts={"identity": now, "versions": job.record.values["versions"]},
            stop=Stop(
                deadline=began + 60 * minutes if minutes else None, said=f"the time is over (--max_minutes {minutes:g})"
            ),
            skip_nonfinite=settings.run.skip_nonfinite,
            resumed_from=job.start.path if job.start.kind == "resume" else None,
            notice=job.console.notice,
            model=model,
            args=job.args,
            train_dataset=data.train,
            eval_dataset=data.evaluate,
            data_collator=collator,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # e.g. a tracker that is not installed
        if is_out_of_memory(error):
            raise
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error
    _refuse_what_is_not_used(job, trainer)
    if not isinstance(data.train, Stream):
        _say_length(job, len(data.train))
    if job.args.should_save:
        check_space(job, model, tokenizer)
    samples = Samples.of_demo(settings, model, template)
    job.record.begin()
    loss = _fit(job, trainer, data)
    _save(job, trainer, loss)
    samples.show_after(job.console)
    _say_next(job, trainer, loss, data.ledger)


def _refuse_what_is_not_used(job: Job, trainer: LoraTrainer) -> None:
    """Raise BadSettings where the library would pass a setting by in silence; say what it does by its own ways."""
    if job.args.fsdp and not trainer.is_fsdp_enabled:
        raise BadSettings(["--fsdp is not used here: it needs several processes on GPUs. Leave it out."])
    if trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        raise BadSettings(["--fsdp_config: an adapter is small and is saved whole: state_dict_type FULL_STATE_DICT."])
    if trainer.is_deepspeed_enabled and job.start.kind == "resume":
        job.console.notice("DeepSpeed's own states hold pickles; resume from checkpoints of your own making only.")


def _say_length(job: Job, records: int) -> None:
    """Say how often the records are gone through, where a number of steps hides it."""
    args = job.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = args.max_steps * per_step / records
    if passes > MANY_PASSES:
        job.console.notice(
            f"--max_steps {args.max_steps:,} goes through the {records:,} records {passes:,.0f} times; "
            "two to five passes are usual (--num_train_epochs 3)."
        )


def _fit(job: Job, trainer: LoraTrainer, data: Data) -> float:
    """Train; the mean training loss. Raises Stopped, or RunFailed with the cause."""
    args, device, start, console = job.args, job.args.device, job.start, job.console
    trainer.remove_callback(PrinterCallback)
    bar = TrainingBar(console, trainer.work)
    trainer.add_callback(bar)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        if start.kind == "resume" and start.path and trainer.all_steps_made(start.path):
            console.say("All steps were made before; the adapter is saved from this checkpoint.")
        else:
            trainer.train(resume_from_checkpoint=str(start.path) if start.kind == "resume" else None)
    except ImportError as error:  # an optimizer from a package that is not installed
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shape = StepShape(
            batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            max_seq_length=job.settings.data.max_seq_length,
            longest_tokens=data.ledger.longest_tokens,
            checkpointing=bool(getattr(args, CHECKPOINTING)),
            quantize=job.settings.model.quantize,
            on_gpu=device.type == "cuda",
            peak=peak_bytes(device),
        )
        raise RunFailed(remedies(shape)) from error
    finally:
        bar.close()
        trainer.stop.restore()
        job.record.update(**_figures(trainer), **data.read_meanwhile(console), notices=console.notices)
    owes = trainer.state.global_step < trainer.state.max_steps or trainer.work.owes_evaluation
    if trainer.stop.reason is not None and owes:
        raise Stopped(
            f"{trainer.stop.reason}; stopped after step {trainer.state.global_step:,} with a checkpoint.\n"
            f"{same_command(job.settings)} goes on from there (--output_dir {args.output_dir})."
        )
    return trainer.mean_loss()


def _figures(trainer: LoraTrainer) -> dict[str, Any]:
    work, seconds = trainer.work, trainer.work.elapsed()
    return {
        "steps": trainer.state.global_step,
        "tokens_padded": work.tokens_padded,
        "tokens_computed": work.tokens_computed,
        "seconds": seconds,
        "skipped_steps": work.skipped_steps,
        "examples_per_second": work.examples / seconds if seconds else 0.0,
        "peak_memory_bytes": peak_bytes(trainer.args.device),
    }


def _save(job: Job, trainer: LoraTrainer, loss: float) -> None:
    """The adapter, the picture and the finished record."""
    refuse_empty(trainer.accelerator.unwrap_model(trainer.model))
    folder, first = Path(trainer.args.output_dir), trainer.args.process_index == 0
    with staged(folder / "adapter", clears=first) as staging:
        trainer.save_model(str(staging))
        if first:
            publish(staging, folder, last=WEIGHTS)
    if first:
        draw_loss(trainer.state.log_history, folder / "loss.png")
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    job.record.update(
        status="finished",
        train_loss=loss,
        **({"eval_loss": evaluated[-1]} if evaluated else {}),
        loss_history=[{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e],
        **_figures(trainer),
        notices=job.console.notices,
    )


def _say_next(job: Job, trainer: LoraTrainer, loss: float, ledger: Ledger) -> None:
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    fell = f" (from {history[0]:.3f} to {history[-1]:.3f})" if len(history) > 1 else ""
    work, folder, console = trainer.work, job.args.output_dir, job.console
    # `make demo` runs from an environment that is not activated; what is said to do next must work as it stands.
    atomtune = "atomtune" if shutil.which("atomtune") else f"{sys.executable} -m atomtune"
    console.say(
        f"Done: {trainer.state.global_step:,} steps in {work.elapsed():.0f} s, "
        f"{work.examples / max(work.elapsed(), 1e-9):.1f} examples/s, mean loss {loss:.3f}{fell}.\n"
        f"The adapter lies in {folder} (run.json: every figure; loss.png: the curve).\n\n"
        f"Next:\n  {atomtune} chat --adapter_path {folder}\n"
        f"  {atomtune} merge --adapter_path {folder} --output_dir {folder}/merged"
    )
    if job.settings.demo:
        console.say(f"  {atomtune} train --model_path YOUR_MODEL --dataset_path YOUR.jsonl")
    if ledger.shared_instruction is not None:
        console.say(
            "Other servers need the shared instruction (atomtune.json) with every request, as training had it: as the "
            "system message under atom, else in front of what the user says."
        )


def _quiet(settings: TrainSettings) -> None:
    if "log_level" not in settings.trainer:  # --log_level brings the libraries' own words back
        quiet_libraries()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
