"""Certify: the command, and the certificate that export and serve use."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from atomtune.certify.comparison import EngineOutcome, coarser, compare
from atomtune.certify.prompts import OUR_OWN, CertPrompt, choose_prompts
from atomtune.certify.reference import Expected, expect
from atomtune.choices import ADAPTER_CONFIG, MODEL_CONFIG, EngineName
from atomtune.console import Console, as_command
from atomtune.data.cache import examples_of
from atomtune.data.encoded_source import Rules, records_of
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.template_probes import probed
from atomtune.data.reading.hub import is_hub_name
from atomtune.data.reading.sources import distinct_names
from atomtune.data.records import Record
from atomtune.disk import text_of, why_unwritable, write_text
from atomtune.engines.llama_cpp import LlamaCpp
from atomtune.engines.llama_cpp import refuse_without_packages as refuse_without_llama_cpp
from atomtune.engines.served_folder import ServedFolder, is_whole_model
from atomtune.engines.transformers_in_process import TransformersInProcess
from atomtune.engines.transformers_serve import TransformersServe
from atomtune.engines.transformers_serve import refuse_without_packages as refuse_without_transformers_serve
from atomtune.engines.vllm_serve import ServedAdapter, VllmServe
from atomtune.engines.vllm_serve import refuse_without_packages as refuse_without_vllm
from atomtune.errors import BadData, BadSettings, CheckFailed
from atomtune.evaluate.run_folder import RunRecords, run_records
from atomtune.language import translated
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import CERTIFICATE, AdapterMetadata, base_of
from atomtune.model.base_as_trained import adapter_and_base, base_spec
from atomtune.model.base_shape import positions_of
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import is_at_hand, refuse_other_base
from atomtune.model.generate import stop_ids
from atomtune.model.load import (
    BaseSpec,
    dtype_name,
    load_base,
    load_dequantized,
    quiet_libraries,
    read_config,
    stored_dtype,
)
from atomtune.model.memory import free_memory
from atomtune.settings.command_settings import CertifySettings, base_of_adapter
from atomtune.settings.run_settings import StoredBaseSettings
from atomtune.settings.spelled import base_words

#: How many records are read at most to choose prompts from.
LOOKED_AT = 2000
#: Most tokens of a prompt with its answer, if another tool trained the adapter and did not say.
_OF_ANOTHER_TOOL = 256


@dataclass(frozen=True)
class TrainedSide:
    """The results of our side, computed once and compared with any number of engines.

    context  tokens that an engine has to hold: a prompt with its answer, and no more than the base has positions for,
             which vLLM would refuse
    """

    template: Template
    expected: list[Expected]
    stop_ids: list[int]
    dtype: str
    max_new_tokens: int
    context: int


def certify(settings: CertifySettings) -> int:
    """Run `atomtune certify`. Raises CheckFailed (exit code 4) if an engine does not serve the tuned model."""
    quiet_libraries()
    console = Console()
    served = Path(settings.served or settings.adapter_path)
    setting = "--served" if settings.served else "--adapter_path"
    engines = engines_for(served, settings.engine, setting=setting)
    if why := why_unwritable(_certificate_of(served).parent):
        raise BadSettings(
            [
                f"{setting} {served}: its certificate cannot be written there: {why}. Copy the model to a folder that "
                "can be written."
            ]
        )
    side = trained_side(settings, console)
    outcomes: list[EngineOutcome] = []
    for engine in engines:
        outcomes.append(certify_served(side, served, engine, settings, console))
        write_certificate(outcomes[-1], served)  # a further engine may not start
    refuse_failed([(served, outcome) for outcome in outcomes])
    file = _certificate_of(served)
    console.say(translated(f"The certificate is {file}."))
    console.next_steps([_command_that_serves(settings, outcomes[0].engine)])
    return 0


def _command_that_serves(settings: CertifySettings, engine: str) -> str:
    """`atomtune serve` for what was certified, with the same engine."""
    words = ["serve", "--adapter_path", settings.adapter_path, *base_words(settings, StoredBaseSettings)]
    if settings.served:
        words += ["--served", settings.served]
    if engine != "in-process":  # `serve` cannot start it
        words += ["--engine", engine]
    return as_command(words)


def engines_for(served: Path, wanted: Sequence[EngineName], *, setting: str) -> list[EngineName]:
    """The engines to start: those given, else the one that fits what is served.

    setting  the flag that named `served`, for messages
    Raises BadSettings if an engine cannot serve it or is not installed.
    """
    if not served.exists():
        raise BadSettings([f"{setting} {served}: no such file or folder."])
    is_gguf = served.suffix == ".gguf"
    engines: list[EngineName] = list(wanted) or ["llama.cpp" if is_gguf else "transformers"]
    problems: list[str] = []
    if "llama.cpp" in engines and not is_gguf:
        problems.append(
            f"--engine llama.cpp needs a GGUF; {served} is not one. `atomtune export --to gguf` writes one and "
            "certifies it."
        )
    for engine in engines:
        if engine != "llama.cpp" and is_gguf:
            problems.append(f"--engine {engine} needs a folder; {served} is a GGUF. llama.cpp serves those.")
    if not is_gguf and not served.is_dir():
        problems.append(f"{setting} {served} is a file, and not a .gguf. Pass a folder, or the .gguf.")
    configs = (MODEL_CONFIG, ADAPTER_CONFIG)
    if setting == "--served" and served.is_dir() and not any((served / name).is_file() for name in configs):
        if files := sorted(served.glob("*.gguf")):
            problems.append(f"--served {served} is a folder. Pass the file in it: --served {files[0]}")
        else:
            problems.append(f"--served {served}: no {MODEL_CONFIG} or {ADAPTER_CONFIG} here, so it holds no model.")
    if problems:
        raise BadSettings(problems)
    if "llama.cpp" in engines:
        refuse_without_llama_cpp()
    if "transformers" in engines:
        refuse_without_transformers_serve()
    if "vllm" in engines:
        refuse_without_vllm()
    return engines


def trained_side(settings: CertifySettings, console: Console) -> TrainedSide:
    """Load adapter and base, answer the prompts, and free the model.

    Raises BadSettings if adapter_path is a complete model, because there is no adapter to certify it against.
    """
    adapter = Path(settings.adapter_path)
    _refuse_whole_model(adapter)
    template, metadata, base_path = adapter_and_base(
        adapter,
        **base_of_adapter(settings),
        # Export and serve may have given some of them before
        notice=lambda text: None if text in console.notices else console.notice(text),
    )
    max_tokens = metadata.max_seq_length or _OF_ANOTHER_TOOL
    records = _records(adapter, template, max_tokens, console)
    template = _of_today(template, console)
    positions = positions_of(read_config(base_path, trust_remote_code=settings.trust_remote_code))
    prompts = choose_prompts(records, template, count=settings.prompts, max_tokens=max_tokens, positions=positions)
    if all(prompt.origin == OUR_OWN for prompt in prompts):
        console.notice("none of the prompts is from the training's records; all are atomtune's own.")
    on_device = {**settings.base(), "path": base_path}
    spec = base_spec([metadata], **on_device, dtype=settings.dtype, quantize=None, notice=console.notice)
    dtype = spec.dtype
    console.say(f"{len(prompts)} prompts ({_kinds(prompts)}), answered by {adapter} in {dtype_name(dtype)} …")
    was_at_hand = is_at_hand(base_path)
    base = _base_as_served(spec, settings, metadata, console)
    if not was_at_hand:
        refuse_other_base(base_path, metadata.base, anyway=settings.other_base, notice=console.notice)
    model = load_trained(base, adapter).eval()
    expected = expect(model, prompts, template, max_new_tokens=settings.max_new_tokens)
    stops = stop_ids(model, template)
    longest = max(max_tokens, *(len(prompt.prompt_ids) for prompt in prompts))  # our own may be longer than any record
    context = longest + settings.max_new_tokens
    context = min(context, positions or context)
    del model, base
    free_memory()
    return TrainedSide(template, expected, stops, dtype_name(dtype), settings.max_new_tokens, context)


def _refuse_whole_model(adapter: Path) -> None:
    """Raise BadSettings if the folder holds a complete model instead of an adapter."""
    if is_whole_model(adapter):
        raise BadSettings(
            [
                f"--adapter_path {adapter} is a whole model, not the adapter that it is certified against. Pass the "
                "run's output folder, and this one with --served."
            ]
        )


def _base_as_served(spec: BaseSpec, settings: CertifySettings, metadata: AdapterMetadata, console: Console) -> CausalLM:
    """The base with the weights that the engine has: those of a merge, quantized and dequantized, or the stored ones.

    Gives a notice if these are not the weights that the adapter was trained on.
    """
    merged = _merged(settings, metadata)
    merged_in = merged.quantize if merged else None
    if metadata.quantize and metadata.quantize != merged_in:
        console.notice(
            f"the adapter was trained on the base in {metadata.quantize}, but is certified on its weights as they are "
            "stored, which is what engines load: not quite the model that was trained. `atomtune merge` writes the "
            "weights used in training."
        )
    if merged and merged_in:
        return load_dequantized(replace(spec, quantize=merged_in), trained_in=merged.dtype)
    return load_base(spec)


def _of_today(template: Template, console: Console) -> Template:
    """The template as an engine renders it: if it prints the date, with today's."""
    today = date.today()  # local time, as in every template's strftime_now
    if not template.names_the_day or template.day == today:
        return template
    console.notice(
        f"the template writes the date: {template.day} in training, today's date in the prompts of engines, and so in "
        "the prompts that are compared here."
    )
    return probed(replace(template, day=today))


def _merged(settings: CertifySettings, metadata: AdapterMetadata) -> AdapterMetadata | None:
    """The metadata of the weights that a served merge started from, else None; a GGUF is made from a merge."""
    if settings.served is None or not metadata.quantize:
        return None
    folder = Path(settings.served)
    if folder.suffix == ".gguf":
        return metadata
    return None if (folder / ADAPTER_CONFIG).is_file() else AdapterMetadata.load(folder)


def _kinds(prompts: Sequence[CertPrompt]) -> str:
    return ", ".join(dict.fromkeys(prompt.kind for prompt in prompts))


def _records(adapter: Path, template: Template, max_tokens: int, console: Console) -> list[Record]:
    """The run's held-out records, else its training records; empty if another tool trained it.

    A file that is gone or cannot be read is left out, with a notice.
    """
    run = run_records(adapter)
    if run is None:
        return []
    sources = [run.eval_path] if run.eval_path else run.reading.dataset_paths
    rules = Rules(**replace(run.reading, max_seq_length=max_tokens).rules())
    records: list[Record] = []
    # Named as in the run, or no origin would be that of a held-out record.
    for source, name in zip(sources, distinct_names(sources), strict=True):
        if not Path(source).exists() and not is_hub_name(source):
            console.notice(f"{source} is no longer there, so none of its records is among the prompts.")
            continue
        try:
            records += islice(_records_in(source, name, run, template, rules), LOOKED_AT - len(records))
        except BadData as error:
            console.notice(f"{source} cannot be read, so none of its records is among the prompts: {error}")
    return records


def _records_in(source: str, name: str, run: RunRecords, template: Template, rules: Rules) -> Iterator[Record]:
    """The held-out records of a source, else all. Raises BadData if it cannot be read."""
    stored = examples_of(source, template, rules, name=name).examples
    if not len(stored):
        return
    for record in records_of(source, rules, stored, name=name):
        if run.eval_path or not run.held_out or record.origin in run.held_out:
            yield record


def certify_served(
    side: TrainedSide, served: Path, engine: EngineName, settings: CertifySettings, console: Console
) -> EngineOutcome:
    """Start an engine on what is served, compare it with our side, and end it."""
    console.say(f"starting {engine} on {served} …")
    dtype = coarser(side.dtype, _stored(served, settings) or side.dtype)
    with start(engine, served, side, settings) as running:
        outcome = compare(running, side.expected, side.template, dtype=dtype, max_new_tokens=side.max_new_tokens)
    free_memory()
    console.say(one_line(outcome))
    return outcome


def _stored(served: Path, settings: CertifySettings) -> str | None:
    """The dtype of a complete model's weights on disk, to which a merge rounded; None for anything else."""
    if not is_whole_model(served):
        return None
    return dtype_name(stored_dtype(str(served), trust_remote_code=settings.trust_remote_code))


def certify_together(
    sides: Mapping[Path, TrainedSide], names: Sequence[str], base: str, settings: CertifySettings, console: Console
) -> list[EngineOutcome]:
    """Start one vLLM with all these adapters, as `serve` does, and compare each of them by its name.

    sides  adapter folder → results of our side; the adapters share base, template and stop tokens
    """
    console.say(f"starting vllm on {', '.join(map(str, sides))} …")
    first = next(iter(sides.values()))
    view = ServedFolder(next(iter(sides)), base=settings.model_path, stop_ids=first.stop_ids)
    running = VllmServe(
        view,
        base=base,
        dtype=first.dtype,
        context=max(side.context for side in sides.values()),
        trust_remote_code=settings.trust_remote_code,
        adapters=[ServedAdapter(name, folder.resolve()) for name, folder in zip(names, sides, strict=True)],
    )
    outcomes: list[EngineOutcome] = []
    with running:
        for name, side in zip(names, sides.values(), strict=True):
            running.ask(name)
            outcomes.append(
                compare(running, side.expected, side.template, dtype=side.dtype, max_new_tokens=side.max_new_tokens)
            )
            console.say(f"{name}: {one_line(outcomes[-1])}")
    return outcomes


def start(engine: EngineName, served: Path, side: TrainedSide, settings: CertifySettings) -> Any:
    """The engine, to be used in a `with` statement."""
    if engine == "llama.cpp":
        return LlamaCpp(served, context=side.context)
    as_written = engine == "transformers"
    folder = ServedFolder(served, base=settings.model_path, stop_ids=side.stop_ids, as_written=as_written)
    if engine == "vllm":
        base = base_of(served, settings.model_path) if (served / ADAPTER_CONFIG).is_file() else None
        trust = settings.trust_remote_code
        return VllmServe(folder, base=base, dtype=side.dtype, context=side.context, trust_remote_code=trust)
    kind = TransformersServe if engine == "transformers" else TransformersInProcess
    return kind(folder, dtype=side.dtype, trust_remote_code=settings.trust_remote_code)


def one_line(outcome: EngineOutcome) -> str:
    """The certificate as one line."""
    if outcome.of_another_base:
        return f"{outcome.engine} ({outcome.version}) DOES NOT serve the tuned model, but one made of another base."
    n = outcome.prompts
    verdict = "serves the tuned model" if not outcome.problems() else "DOES NOT serve the tuned model"
    apart = f"{outcome.mean_difference:.1e} nats on average (allowed in {outcome.dtype}: {outcome.allowed.mean:g})"
    return (
        f"{outcome.engine} ({outcome.version}) {verdict}: prompt ids {outcome.prompt_ids_equal}/{n}, log-probabilities "
        f"differ by {apart}, "
        f"greedy text {outcome.greedy_equal}/{n}, closer to tuned than to base {outcome.differs_from_base}/{n}, "
        f"stops {outcome.stops}/{outcome.should_stop}."
    )


def write_certificate(outcome: EngineOutcome, served: Path) -> None:
    """Write certificate.json into what is served, or beside a GGUF; entries of other engines are kept."""
    file = _certificate_of(served)
    kept = [entry for entry in _read(file) if entry.get("engine") != outcome.engine]
    write_text(file, json.dumps([*kept, outcome.to_json()], ensure_ascii=False, indent=2) + "\n")


def _certificate_of(served: Path) -> Path:
    return (served if served.is_dir() else served.parent) / CERTIFICATE


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text_of(file))
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def refuse_failed(outcomes: Sequence[tuple[Path, EngineOutcome]]) -> None:
    """Raise CheckFailed if any outcome has problems, listing them with the first difference side by side."""
    failed = [(served, outcome) for served, outcome in outcomes if outcome.problems()]
    if not failed:
        return
    lines: list[str] = []
    for served, outcome in failed:
        lines.append(f"{outcome.engine} does not serve the tuned model from {served}:")
        lines += [f"  - {problem}" for problem in outcome.problems()]
        if outcome.differences:
            first = outcome.differences[0]
            lines.append(f"  First difference, prompt of the kind “{first.kind}”, {first.what}:")
            lines += [f"    trained  {first.ours}", f"    engine   {first.engine}"]
    raise CheckFailed("\n".join(lines))
