"""Run: one training run from settings to adapter; every step is printed and recorded.

The main path through the code: data.cache → batch.collate → model → trainer → run.json.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch.distributed.fsdp import StateDictType
from transformers import PrinterCallback, set_seed

from atomtune.batch.collate import Collator
from atomtune.choices import Dtype
from atomtune.console import Console, print_json
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import AtomtuneError, BadSettings, RunFailed, Stopped, UserError
from atomtune.export.model_card import model_card
from atomtune.folders import held
from atomtune.model import liger
from atomtune.model.adapter import has_expert_layers
from atomtune.model.adapter_folder import AdapterMetadata
from atomtune.model.fingerprint import fingerprint
from atomtune.model.load import dtype_name, embedding_rows, load_tokenizer, pad_id_of, quiet_libraries
from atomtune.model.memory import StepShape, is_out_of_memory, peak_bytes, remedies
from atomtune.model.recompute import recompute_first
from atomtune.model.rotary import refuse_mixed
from atomtune.model.step_graphs import StepGraphs
from atomtune.model.token_rows import guard_embedding, refuse_tokens_without_row, say_untrained_stop
from atomtune.settings.environment import is_first_process
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.arguments import lengths, lengths_set, trainer_arguments
from atomtune.train.callbacks import BeforeFirstStep, Stop
from atomtune.train.checkpoint.atomic import clear_staging, facts_in
from atomtune.train.checkpoint.best import best_to_keep
from atomtune.train.checkpoint.start import Finished, Resumed, Start, beginning, find_start
from atomtune.train.dataset import Data, read_data
from atomtune.train.defaults import with_defaults, with_sequence_limit
from atomtune.train.disk_space import check_space
from atomtune.train.ending import figures, finish, title_of
from atomtune.train.layout import check_equal, choose_layout
from atomtune.train.model import fuse, keep_or_recompute, load_model, step_graphs
from atomtune.train.progress import LossPicture, RecordedProgress, TrainingBar
from atomtune.train.ranks import lost_processes
from atomtune.train.rehearsal import check_last_batch, rehearse
from atomtune.train.resume_command import how_to_resume
from atomtune.train.run_context import RunContext
from atomtune.train.run_errors import told_to_user
from atomtune.train.run_identity import day_of, identity, refuse_another_run, with_downloaded_weights
from atomtune.train.run_notices import say_changed_length, say_contradictions, say_length
from atomtune.train.run_report import RunRecord, read_record
from atomtune.train.samples import Samples
from atomtune.train.streaming import Stream
from atomtune.train.trainer import LoraTrainer


def train(settings: TrainSettings) -> int:
    """Run `atomtune train`; returns 0. Raises AtomtuneError, which has the exit code."""
    folder = train_into_folder(settings)
    if settings.json and is_first_process():
        print_json(read_record(folder))
    return 0


def train_into_folder(settings: TrainSettings, *, speaks: bool = True) -> Path:
    """Make one run and return its folder, which then holds the adapter and run.json.

    speaks  False: print nothing; notices are still in run.json
    """
    began = time.monotonic()
    args = trainer_arguments(settings)
    rehearse(settings, args)
    is_first = args.process_index == 0
    console = Console(speaks=is_first and speaks, stderr=settings.json)
    _quiet(settings)
    folder = Path(args.output_dir)
    with held(folder, "run") if is_first else contextlib.nullcontext():
        if is_first:
            clear_staging(folder)
        start = _decided_by_first_rank(args, lambda: _find_start(settings, args, console))
        if start.message:
            console.say(start.message)
        if isinstance(start, Finished):
            return folder
        # If a resumed run fails before training, the run.json of the earlier run stays.
        record = RunRecord(folder, writes=is_first, waits=isinstance(start, Resumed))
        before = facts_in(start.checkpoint, "derived") if isinstance(start, Resumed) else {}
        run = RunContext(settings, args, start, read_record(folder), console, record, derived_before=before)
        try:
            record.update(settings=settings.resolved(), start=beginning(start, folder))
            _run(run, began)
        except BaseException as error:
            answer = _recorded_failure(run, error)
            if answer is error:
                raise
            raise answer from error
        finally:
            liger.leave_files()
    return folder


def _find_start(settings: TrainSettings, args: Any, console: Console) -> Start | Finished:
    flags = settings.run
    return find_start(
        Path(args.output_dir),
        resume=flags.resume,
        resume_from_checkpoint=flags.resume_from_checkpoint,
        checkpoint=flags.checkpoint,
        lengths=lengths_set(settings),
        notice=console.notice,
    )


def _decided_by_first_rank(args: Any, decide: Callable[[], Start | Finished]) -> Start | Finished:
    """The decision of the first rank, for all: other ranks might see a folder that the first has begun to fill."""
    if args.world_size <= 1:
        return decide()
    outcome: list[Any] = [None]
    if args.process_index == 0:
        try:
            outcome[0] = decide()
        except AtomtuneError as error:
            torch.distributed.broadcast_object_list([str(error)])
            raise
    try:
        torch.distributed.broadcast_object_list(outcome)
    except RuntimeError as error:
        if lost := lost_processes(error, args):
            raise RunFailed(lost) from error
        raise
    if isinstance(outcome[0], str):
        raise UserError(outcome[0])
    return cast(Start | Finished, outcome[0])


def _recorded_failure(run: RunContext, error: BaseException) -> BaseException:
    """The error to show to the user, after it is recorded in run.json."""
    answer = told_to_user(error, run.args, again=how_to_resume(run))
    with contextlib.suppress(OSError):  # on a full disk, run.json may not fit either
        run.record.update(
            status="preempted" if isinstance(answer, Stopped) else "failed",
            reason=str(answer) or type(answer).__name__,
            notices=run.console.notices,
        )
    if isinstance(error, Stopped) and run.args.world_size > 1:
        with contextlib.suppress(RuntimeError):  # the other ranks stopped too, or are gone
            torch.distributed.barrier()  # a launcher ends the other ranks as soon as one has ended
    return answer


@dataclass(frozen=True)
class _Prepared:
    """A run before its model is loaded.

    run       with the settings that follow from the records
    identity  values that a resumed run must share with the original one
    best      the best checkpoint so far of a resumed run
    """

    run: RunContext
    tokenizer: Tokenizer
    template: Template
    data: Data
    identity: dict[str, Any]
    best: Path | None


def _run(run: RunContext, began: float) -> None:
    """Prepare, train and finish one run."""
    prepared = _prepare(run)
    run, data = prepared.run, prepared.data
    trainer = _load_trainer(prepared, began)
    _refuse_unused_settings(run, trainer)
    say_length(run, data.size.records)
    say_contradictions(run)
    if run.args.should_save:
        check_space(run, trainer.model, prepared.tokenizer)

    samples = Samples.of_run(run, trainer.model, prepared.template, data)
    run.record.begin()
    picture = LossPicture(Path(run.args.output_dir), title=title_of(run))
    _fit(run, trainer, data, picture)
    finish(run, trainer, samples, picture, data.ledger)


def _prepare(run: RunContext) -> _Prepared:
    """Read the records; compare a resumed run with the original one."""
    model = run.settings.model
    tokenizer = load_tokenizer(str(model.model_path), trust_remote_code=model.trust_remote_code)
    template = _template(run, tokenizer)
    tokenizer.chat_template = template.source  # the model is served with the template it was trained with
    run, shape = with_sequence_limit(run)
    data = read_data(run, template)
    run = with_defaults(run, data.size, shape)
    run.record.update(settings=run.settings.resolved(), lengths=lengths(run.args))
    _refuse_mixed_rotary(run, data, shape.rotary_limit)
    if not isinstance(data.train, Stream):
        check_last_batch(run.args, len(data.train))
        _refuse_tokens_without_row(run, tokenizer, data)
    run_identity = identity(run, template, data)
    refuse_another_run(run, run_identity)
    best = None
    if run.resumed:
        anyway = run.settings.run.resume_anyway
        best = best_to_keep(run.resumed.checkpoint, run.args, anyway=anyway, notice=run.console.notice)
    say_changed_length(run)
    if run.settings.run.verify:
        check_equal(run, data, pad_id=pad_id_of(tokenizer))
    return _Prepared(run, tokenizer, template, data, run_identity, best)


def _load_trainer(prepared: _Prepared, began: float) -> LoraTrainer:
    """The model with its adapter, its layout, and the Trainer."""
    run, tokenizer, data = prepared.run, prepared.tokenizer, prepared.data
    set_seed(run.args.seed)
    longest_tokens = _longest_tokens(run, data)
    model = load_model(run, longest_tokens=longest_tokens)
    prepared = replace(prepared, identity=with_downloaded_weights(run, prepared.identity))
    if "ddp_find_unused_parameters" not in run.settings.origins and has_expert_layers(model):
        run.args.ddp_find_unused_parameters = True
    guard_embedding(model, tokenizer, path=str(run.settings.model.model_path))
    say_untrained_stop(model, tokenizer, prepared.template.stop, notice=run.console.notice)
    fuse(run, model)
    layout = choose_layout(run, model, tokenizer, data, longest_tokens=longest_tokens)
    share = keep_or_recompute(run, model, layout=layout.collator.layout, heaviest_tokens=layout.heaviest_tokens)
    trainer = _trainer(prepared, model, layout.collator, step_graphs(run, model), began)
    if 0 < share < 1:  # the Trainer turns recomputing on for all layers when training begins
        trainer.add_callback(BeforeFirstStep(partial(recompute_first, model, share)))
    return trainer


def _refuse_mixed_rotary(run: RunContext, data: Data, limit: int | None) -> None:
    """Raise BadSettings if a batch could mix records above and below the base's rotary limit (model/rotary.py)."""
    if limit is None:
        return
    longest, batches = _longest_tokens(run, data), {"per_device_train_batch_size": run.args.per_device_train_batch_size}
    if data.evaluate is not None:
        longest = max(longest, *map(len, data.evaluate["ids"]))
        batches["per_device_eval_batch_size"] = run.args.per_device_eval_batch_size
    refuse_mixed(limit, longest, batches=batches, accumulated=run.args.gradient_accumulation_steps)


def _refuse_tokens_without_row(run: RunContext, tokenizer: Tokenizer, data: Data) -> None:
    """Raise BadData for tokens without an embedding, before the model is loaded; streams are checked batch by batch."""
    model = run.settings.model
    rows = embedding_rows(str(model.model_path), trust_remote_code=model.trust_remote_code)
    tables = [table for table in (data.train, data.evaluate) if isinstance(table, datasets.Dataset)]
    records = ((row["origin"], row["ids"]) for table in tables for row in table)
    if rows is not None:
        refuse_tokens_without_row(tokenizer, rows, records, path=str(model.model_path), notice=run.console.notice)


def _template(run: RunContext, tokenizer: Tokenizer) -> Template:
    """The run's template. If it prints a date, a resumed run uses the date of the original one."""
    options = run.settings.data.template_options()
    if options["day"] is None and run.resumed is not None:
        options["day"] = day_of(run.resumed.checkpoint)
    return load_template(run.settings.data.template, tokenizer, **options)


def _longest_tokens(run: RunContext, data: Data) -> int:
    """Tokens of the longest example; for a stream, the limit."""
    settings = run.settings.data
    return settings.max_tokens if settings.streaming else data.ledger.longest_tokens


def _metadata(run: RunContext, template: Template, data: Data, dtype: Dtype) -> AdapterMetadata:
    settings = run.settings
    return AdapterMetadata(
        template=template.name,
        instruction_role=template.instruction_role,
        stop=template.stop,
        template_variables=dict(template.variables),
        template_date=template.day.isoformat() if template.names_the_day else "",
        instruction=data.ledger.shared_instruction,
        data_hash=data.data_hash,
        max_seq_length=settings.data.max_tokens,
        base=fingerprint(str(settings.model.model_path)) or "",
        quantize=settings.model.quantize,
        dtype=dtype,
    )


def _trainer(
    prepared: _Prepared, model: Any, collator: Collator, graphs: StepGraphs | None, began: float
) -> LoraTrainer:
    run, data = prepared.run, prepared.data
    metadata = _metadata(run, prepared.template, data, dtype_name(model.config.dtype))
    minutes = run.settings.run.max_minutes
    stop = Stop(deadline=began + 60 * minutes if minutes else None, limit=f"--max_minutes {minutes:g}")
    try:
        return LoraTrainer(
            tokenizer=prepared.tokenizer,
            metadata=metadata,
            facts={
                "identity": prepared.identity,
                "versions": run.record.values["versions"],
                "derived": dict(run.derived),
            },
            stop=stop,
            graphs=graphs,
            skip_nonfinite=run.settings.run.skip_nonfinite,
            patience=run.settings.run.early_stopping_patience,
            resumed_from=run.resumed.checkpoint if run.resumed else None,
            best=prepared.best,
            card=partial(model_card, run.record.values, metadata),
            notice=run.console.notice,
            model=model,
            args=run.args,
            train_dataset=data.train,
            eval_dataset=data.evaluate,
            data_collator=collator,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # for example a tracker that is not installed
        if is_out_of_memory(error):
            raise
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error


def _refuse_unused_settings(run: RunContext, trainer: LoraTrainer) -> None:
    """Raise BadSettings for settings that the library would silently ignore; warn about DeepSpeed's pickles."""
    if run.args.fsdp and not trainer.is_fsdp_enabled:
        raise BadSettings(["--fsdp is not used here: it needs several processes on GPUs. Leave it out."])
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
            raise BadSettings(
                ["--fsdp_config: an adapter is small and saved in full: state_dict_type FULL_STATE_DICT."]
            )
    if trainer.is_deepspeed_enabled and run.resumed:
        run.console.notice("DeepSpeed's own states hold pickles; resume from checkpoints of your own making only.")


def _fit(run: RunContext, trainer: LoraTrainer, data: Data, picture: LossPicture) -> None:
    """Train. Raises Stopped if the run was stopped, RunFailed or BadSettings with the cause of a failure."""
    trainer.remove_callback(PrinterCallback)
    bar = TrainingBar(run.console, trainer.work)
    trainer.add_callback(bar)
    trainer.add_callback(RecordedProgress(run.record))
    trainer.add_callback(picture)
    if run.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.args.device)
    try:
        _train_steps(run, trainer)
    except ImportError as error:  # an optimizer whose package is not installed
        raise BadSettings([f"The Trainer refuses these settings: {error}"]) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(remedies(_step_shape(run, data))) from error
    finally:
        bar.close()
        trainer.stop.restore()
        run.record.update(**figures(trainer), **data.read_meanwhile(run.console), notices=run.console.notices)
        if trainer.graphs is not None:
            run.record.update(cuda_graphs=trainer.graphs.figures())
    _raise_if_stopped(run, trainer)


def _train_steps(run: RunContext, trainer: LoraTrainer) -> None:
    if run.resumed is None:
        trainer.train()
    elif trainer.no_step_is_left(run.resumed.checkpoint):
        trainer.finish_at(run.resumed.checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            patience = trainer.early_stopping.patience
            run.console.say(
                f"Nothing is left to train: --early_stopping_patience {patience} has ended the run. The adapter that "
                "the run keeps is saved."
            )
        else:
            run.console.say("Nothing is left to train: all steps are done. The adapter that the run keeps is saved.")
    else:
        trainer.train(resume_from_checkpoint=str(run.resumed.checkpoint))


def _step_shape(run: RunContext, data: Data) -> StepShape:
    """The settings and lengths that decide the memory of one step."""
    args = run.args
    return StepShape(
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_seq_length=run.settings.data.max_tokens,
        longest_tokens=data.ledger.longest_tokens,
        checkpointing=run.record.values.get("share_of_layers_recomputed") == 1,
        quantize=run.settings.model.quantize,
        on_gpu=args.device.type == "cuda",
        peak=peak_bytes(args.device),
    )


def _raise_if_stopped(run: RunContext, trainer: LoraTrainer) -> None:
    if trainer.is_stopped_early:
        state = trainer.state
        raise Stopped(
            f"{trainer.stop.reason}; stopped after step {state.global_step:,} with a checkpoint.\n{how_to_resume(run)}"
        )


def _quiet(settings: TrainSettings) -> None:
    if "log_level" not in settings.trainer:  # with --log_level, the libraries print their own messages
        quiet_libraries()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
