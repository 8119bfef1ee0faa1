"""lm-eval tasks: benchmarks of EleutherAI's lm-evaluation-harness, for the base and every adapter, through its own API.

Questions, data sets, metrics and standard errors are its own. The training template writes its prompts, after the
instruction that the training records shared; their token ids are those that training would give.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Message
from atomtune.data.records import Piece, Turn
from atomtune.errors import BadData, BadSettings
from atomtune.evaluate.metrics import Score
from atomtune.evaluate.models import Models, Subject

#: Resamples for the standard error of a metric without a formula, for example a median or BLEU; lm-eval takes 100,000.
RESAMPLES = 1000
#: What lm-eval and `datasets` raise for a task that they cannot read, or whose data are missing.
_TASK_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data sets are loaded."""

    manager: TaskManager
    names: list[str]  # or paths of .yaml files
    sizes: list[int]  # questions of each task; a name may be a group of tasks
    limit: int  # highest number of questions per task; 0: all


def load_tasks(wanted: Sequence[str], *, limit: int) -> Tasks:
    """Load lm-eval's tasks with their data, so that anything missing is reported before the models are loaded.

    wanted  names that lm-eval knows; a .yaml file of a task of your own, or a folder of such files
    limit   questions of each task; 0: all
    Raises BadSettings for an unknown task, BadData where its data cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [task for task in wanted if Path(task).is_dir()]
    files = [task for task in wanted if Path(task).is_file()]
    names = [task for task in wanted if task not in folders and task not in files]
    # Reading lm-eval's own 14,000 tasks takes seconds; a folder needs none of them.
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    _refuse_unknown(names, manager.all_tasks)
    names += files
    for folder in folders:
        tasks = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not tasks:
            raise BadSettings([f"--lm_eval_tasks {folder}: no task in this folder: no .yaml file with a `task:` name."])
        names += tasks
    sizes: list[int] = []
    for name in names:
        try:
            loaded = manager.load(name)["tasks"].values()
            sizes += [len(task.eval_docs) for task in loaded]
        except _TASK_ERRORS as error:
            raise BadData(
                f"--lm_eval_tasks {name}: it cannot be loaded: {type(error).__name__}: {str(error)[:500]}\n"
                "lm-eval's own tasks take their data from the hub; a task of your own (a .yaml file) may name files."
            ) from None
    return Tasks(manager, names, [min(size, limit) if limit else size for size in sizes], limit)


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    problems: list[str] = []
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(similar)}?" if similar else "`lm-eval ls tasks` lists its tasks."
            problems.append(f"--lm_eval_tasks {name}: neither a task of lm-eval nor a file or folder. {hint}")
    if problems:
        raise BadSettings(problems)


class ChatModel(HFLM):
    """lm-eval's class for models of transformers, with prompts from the template that the adapter was trained with."""

    def __init__(self, model: Any, subject: Subject, *, batch_size: int) -> None:
        self.template, self.instruction = subject.template, subject.instruction
        super().__init__(
            pretrained=model.get_base_model() if isinstance(model, PeftModel) else model,  # its LoRA layers stay in it
            tokenizer=subject.template.tokenizer,
            batch_size=batch_size,
            add_bos_token=False,  # the template writes it
        )

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A prompt as the training template writes it, then the beginning of the answer if the task has one."""
        messages: list[Message] = []
        for message in chat_history:
            if message["role"] == "user" and self.instruction:
                messages += self.template.messages([Turn("user", self.instruction, message["content"])])
            else:
                messages.append(message)
        if add_generation_prompt:
            return self.template.render(messages)
        return self.template.render(messages[:-1]) + str(messages[-1]["content"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer after it, each encoded separately as in training.

        An answer without thoughts begins as in training: for Qwen3, after an empty block of thoughts.
        """
        form = self.template.form
        if form is not None and form.lead.strip() and context.endswith(self.template.asks):
            context += form.lead
        context_ids, answer_ids = self.template.tokens.ids_of(
            [Piece(context, learn=False), Piece(continuation, learn=True)]
        )
        return context_ids, answer_ids

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        token_id: int = self.tokenizer.convert_tokens_to_ids(self.template.stop)
        return token_id


def score_tasks(
    models: Models, tasks: Tasks, *, batch_size: int, scores: dict[str, dict[str, Score]], console: Console
) -> None:
    """Fill `scores` (model → task and metric → score), one model after another; Ctrl-C keeps the finished models."""
    for subject in models.subjects:
        console.say(f"lm-eval asks {subject.name} {sum(tasks.sizes):,} questions of {', '.join(tasks.names)}.")
        with models.answering_as(subject) as model:
            results = simple_evaluate(
                ChatModel(model, subject, batch_size=batch_size),
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=tasks.limit or None,
                bootstrap_iters=RESAMPLES if min(tasks.sizes) > 1 else 0,  # one question has no standard error
                log_samples=False,
                apply_chat_template=True,
            )
        scores[subject.name] = scores_in(results["results"])


def scores_in(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one score; a filter other than none becomes part of the name."""
    scores: dict[str, Score] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{answer_filter}")
            name = f"{task} {metric}" if answer_filter == "none" else f"{task} {metric} ({answer_filter})"
            scores[name] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    return scores
