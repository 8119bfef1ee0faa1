"""Models: the base and its adapters, with one copy of the base in memory."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomtune.choices import BASE
from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.errors import BadSettings
from atomtune.model.adapter import answering_as, load_another, load_trained, refuse_damaged
from atomtune.model.adapter_folder import AdapterMetadata, base_of, repeated, short_names, templates_of
from atomtune.model.base_as_trained import base_spec, quantize_as_trained
from atomtune.model.base_shape import base_shape
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.load import dtype_name, load_base, load_tokenizer
from atomtune.model.token_rows import guard_embedding
from atomtune.settings.command_settings import EvaluateSettings

#: Tokens of the longest example, if no training of ours set a limit.
LONGEST = 2048


@dataclass(frozen=True)
class Subject:
    """One model that is evaluated: the base, or one adapter on it."""

    name: str
    adapter: str | None  # its name in PEFT; None: the base
    template: Template  # the one that it was trained with
    instruction: str = ""  # that its training records shared


@dataclass(frozen=True)
class Models:
    """The base with all adapters loaded, and which of them answers."""

    model: Any  # a PeftModel if there is an adapter
    base_path: str
    subjects: tuple[Subject, ...]

    @contextlib.contextmanager
    def answering_as(self, subject: Subject) -> Iterator[CausalLM]:
        """The model with this subject's adapter switched on; for the base, with none."""
        if len(self.subjects) == 1 and subject.adapter is None:
            yield self.model
        else:
            with answering_as(self.model, subject.adapter):
                yield self.model


@dataclass(frozen=True)
class Candidates:
    """What is known of the models before any weights are loaded: the base, the adapters, their templates."""

    base_path: str
    folders: tuple[Path, ...]  # of the adapters
    metadata: tuple[AdapterMetadata, ...]  # of the adapters
    subjects: tuple[Subject, ...]
    max_seq_length: int


def candidates_of(settings: EvaluateSettings, console: Console) -> Candidates:
    """The base and every adapter of --adapter_path, before they are loaded.

    Raises BadModel for a folder without an adapter, BadSettings when two adapters were trained on different bases.
    """
    if not settings.adapter_path:
        return _base_alone(settings)
    folders = [Path(path) for path in settings.adapter_path]
    _refuse_repeated(folders)
    trained = templates_of(
        folders,
        model_path=settings.model_path,
        trust_remote_code=settings.trust_remote_code,
        notice=console.notice,
    )
    for folder in folders:
        refuse_damaged(folder)
    templates, metadata = zip(*trained, strict=True)
    base_path = _common_base(settings, folders, metadata)
    # PEFT allows no dots in a name, and calls the first adapter "default".
    adapters = ["default", *(f"adapter_{i}" for i in range(1, len(folders)))]
    instructions = [each.instruction or "" for each in metadata]
    own = zip(short_names(folders), adapters, templates, instructions, strict=True)
    subjects = (Subject(BASE, None, templates[0], instructions[0]), *(Subject(*values) for values in own))
    longest = settings.max_seq_length or max(_lengths(settings, metadata, base_path))
    return Candidates(base_path, tuple(folders), metadata, subjects, longest)


def _base_alone(settings: EvaluateSettings) -> Candidates:
    """A base without an adapter, with the template that the settings name."""
    assert settings.model_path, "evaluate refuses a command without a model"
    tokenizer = load_tokenizer(settings.model_path, trust_remote_code=settings.trust_remote_code)
    variables = json.loads(settings.chat_template_kwargs) if settings.chat_template_kwargs else {}
    template = load_template(settings.template, tokenizer, variables=variables)
    longest = settings.max_seq_length or _longest(settings, settings.model_path)
    return Candidates(settings.model_path, (), (), (Subject(BASE, None, template),), longest)


def _lengths(settings: EvaluateSettings, metadata: Sequence[AdapterMetadata], base_path: str) -> Iterator[int]:
    """The longest example of each adapter's training; LONGEST where another tool trained it and did not say."""
    for each in metadata:
        yield each.max_seq_length or _longest(settings, base_path)


def _longest(settings: EvaluateSettings, base_path: str) -> int:
    """LONGEST, or fewer tokens if that is all that the base or the memory allows."""
    return min(LONGEST, base_shape(base_path, trust_remote_code=settings.trust_remote_code).longest)


def load_models(settings: EvaluateSettings, candidates: Candidates, console: Console) -> Models:
    """The base with every adapter. Raises BadModel for an adapter that does not fit."""
    quantize = settings.quantize
    if candidates.folders:
        quantize = quantize_as_trained(
            candidates.base_path,
            [each.quantize for each in candidates.metadata],
            requested=settings.quantize,
            stored=settings.stored_base,
            trust_remote_code=settings.trust_remote_code,
            notice=console.notice,
        )
    base = {**settings.base(), "path": candidates.base_path, "quantize": quantize}
    spec = base_spec(candidates.metadata, **base, dtype=settings.dtype, notice=console.notice)
    console.say(f"loading {spec.path} in {dtype_name(spec.dtype)} on {spec.device} …")
    model: Any = load_base(spec)
    for each in candidates.metadata:
        refuse_other_base(candidates.base_path, each.base, anyway=settings.other_base, notice=console.notice)
    guard_embedding(model, candidates.subjects[0].template.tokenizer, path=candidates.base_path)
    adapters = [subject.adapter for subject in candidates.subjects if subject.adapter is not None]
    for number, (folder, adapter) in enumerate(zip(candidates.folders, adapters, strict=True)):
        if number == 0:
            model = load_trained(model, folder)
        else:
            load_another(model, folder, adapter)
    return Models(model.eval(), candidates.base_path, candidates.subjects)


def _refuse_repeated(folders: Sequence[Path]) -> None:
    """Raise BadSettings if a folder is named twice: both would get the same name, and their figures would be mixed."""
    if twice := repeated(folders):
        raise BadSettings([f"--adapter_path names {twice[0]} more than once. Name each adapter once."])


def _common_base(settings: EvaluateSettings, folders: Sequence[Path], metadata: Sequence[AdapterMetadata]) -> str:
    """The path of the adapters' base. Bases with the same fingerprint are one, wherever they are."""
    paths = [base_of(folder, settings.model_path) for folder in folders]
    bases = {each.base or path for each, path in zip(metadata, paths, strict=True)}
    if len(set(paths)) > 1 and len(bases) > 1:
        raise BadSettings(
            [
                f"These adapters name different bases: {', '.join(sorted(set(paths)))}.",
                "Evaluate them separately, or pass --model_path.",
            ]
        )
    return paths[0]
