"""Serve: a tuned model behind an OpenAI-compatible API, by an engine that exists, once it is proved to serve it."""

import contextlib
import ipaddress
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomtune.certify.command import certify_served, engines_for, refuse_failed, trained_side, write_certificate
from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.engines import llama_cpp, transformers_serve, vllm_serve
from atomtune.engines.served_folder import ADAPTER_CONFIG, ServedFolder
from atomtune.engines.server_process import KEY_VARIABLES, ServerProcess, port_in_use
from atomtune.engines.vllm_serve import ServedAdapter
from atomtune.errors import BadSettings
from atomtune.model.adapter_folder import AdapterMetadata, base_of, template_of
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import stop_ids_on
from atomtune.model.load import device_in_use, dtype_name, quiet_libraries, resolve_dtype
from atomtune.settings.fields import CertifySettings, ServeSettings


@dataclass(frozen=True)
class Plan:
    """What is served, by which engine, and under which name requests ask for it."""

    engine: str
    served: Path
    model: str
    base: str | None  # of an adapter; None: the engine loads what is served as a whole
    template: Template
    metadata: AdapterMetadata
    api_key: str | None


def serve(settings: ServeSettings) -> int:
    """Run `atomtune serve` until Ctrl-C. Raises CheckFailed (exit code 4) where the engine serves another model."""
    quiet_libraries()
    console = Console()
    plan = plan_of(settings, console)
    if settings.no_certify:
        console.notice(f"--no_certify: nobody has checked that {plan.engine} serves the tuned model.")
    else:
        _certify(plan, settings, console)
    try:
        with running(plan, settings, console) as server:
            _say_how_to_ask(plan, settings, console)
            server.wait()
    except KeyboardInterrupt:
        console.say("\nstopped.")
    return 0


def plan_of(settings: ServeSettings, console: Console) -> Plan:
    """What will be served and how. Raises BadSettings with all that stands against it, before anything is loaded."""
    adapter = Path(settings.adapter_path)
    trust = settings.trust_remote_code
    template, metadata = template_of(adapter, trust_remote_code=trust)
    served = Path(settings.served or settings.adapter_path)
    engine = settings.engine if settings.engine != "auto" else _best_engine(served)
    engines_for(served, [engine], setting="--served" if settings.served else "--adapter_path")
    api_key = settings.api_key or os.environ.get("ATOMTUNE_API_KEY")
    problems = _exposed(settings.host, engine, api_key)
    if api_key and engine == "transformers":
        problems.append("--api_key: transformers serve enforces none. Pass --engine vllm, or serve a GGUF (llama.cpp).")
    if settings.context and engine == "transformers":
        problems.append("--context: transformers serve has no such limit. Leave it out.")
    if port_in_use(settings.host, settings.port):
        problems.append(f"--port {settings.port}: another program listens there. Pass another port.")
    if problems:
        raise BadSettings(problems)
    base = None
    if (served / ADAPTER_CONFIG).is_file():
        base = base_of(served, settings.model_path)
        refuse_other_base(base, metadata.base, anyway=settings.other_base, notice=console.notice)
    name = served.stem if engine == "llama.cpp" else served.resolve().name
    return Plan(engine, served, name, base, template, metadata, api_key)


def _best_engine(served: Path) -> Any:
    if served.suffix == ".gguf":
        return "llama.cpp"
    return "vllm" if torch.cuda.is_available() and vllm_serve.is_installed() else "transformers"


def _exposed(host: str, engine: str, api_key: str | None) -> list[str]:
    """What is wrong with listening to other machines: without a key, everyone who reaches the port is answered."""
    if host == "localhost":
        return []
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return []
    if api_key or engine == "transformers":
        return [] if engine != "transformers" else [_no_key(host)]
    return [f"--host {host}: other machines could use the model. Pass --api_key, or set ATOMTUNE_API_KEY."]


def _no_key(host: str) -> str:
    return (
        f"--host {host}: other machines could use the model, and transformers serve enforces no API key. Pass --engine "
        "vllm or serve a GGUF (llama.cpp) with --api_key, or leave --host out."
    )


def _certify(plan: Plan, settings: ServeSettings, console: Console) -> None:
    """The certificate of `atomtune certify`, beside what is served. Raises CheckFailed where it does not hold."""
    certify_settings = CertifySettings(
        adapter_path=settings.adapter_path,
        served=settings.served,
        model_path=settings.model_path,
        dtype=settings.dtype,
        prompts=settings.prompts,
        other_base=settings.other_base,
        trust_remote_code=settings.trust_remote_code,
    )
    side = trained_side(certify_settings, console)
    outcome = certify_served(side, plan.served, plan.engine, certify_settings, console)  # type: ignore[arg-type]
    write_certificate([outcome], plan.served)
    refuse_failed([outcome], plan.served)


@contextlib.contextmanager
def running(plan: Plan, settings: ServeSettings, console: Console) -> Iterator[ServerProcess]:
    """The engine, answering; its own lines go to standard error."""
    console.say(f"starting {plan.engine} on {plan.served} …")
    stops = stop_ids_on(plan.base, plan.template) if plan.base else []  # a merged folder and a GGUF hold theirs
    view = ServedFolder(plan.served, base=plan.base, stop_ids=stops)
    with view if plan.engine != "llama.cpp" else contextlib.nullcontext(plan.served) as folder:
        environment = dict.fromkeys(KEY_VARIABLES, plan.api_key) if plan.api_key else {}
        server = ServerProcess(
            _words(plan, folder, settings, console),
            health=f"http://{_own_address(settings.host)}:{settings.port}/health",
            folder=folder.parent if plan.engine == "transformers" else None,
            environment=environment,
            starts_within=1800,
            shows=True,
        )
        with server:
            yield server


def _words(plan: Plan, folder: Path, settings: ServeSettings, console: Console) -> list[str]:
    """The command line of the engine."""
    address: dict[str, Any] = {"host": settings.host, "port": settings.port, "variables": plan.template.variables}
    if plan.engine == "llama.cpp":
        return llama_cpp.command(folder.resolve(), context=settings.context, **address)
    dtype = resolve_dtype(settings.dtype, device_in_use(), fp16=False, bf16=False, notice=console.notice)
    address |= {"dtype": dtype_name(dtype), "trust_remote_code": settings.trust_remote_code}
    if plan.engine == "transformers":
        return transformers_serve.command(folder.name, **address)
    adapters = [ServedAdapter(plan.model, plan.served.resolve())] if plan.base else []
    return vllm_serve.command(folder, base=plan.base, adapters=adapters, context=settings.context, **address)


def _own_address(host: str) -> str:
    """Where this machine asks a server that listens at `host`; IPv6 in brackets."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def _say_how_to_ask(plan: Plan, settings: ServeSettings, console: Console) -> None:
    url = f"http://{_own_address(settings.host)}:{settings.port}/v1"
    console.say(f'\nready: {url}, model "{plan.model}". Ctrl-C stops it.')
    body = json.dumps({"model": plan.model, "messages": [{"role": "user", "content": "Hello"}]})
    key = " -H 'Authorization: Bearer …'" if plan.api_key else ""
    console.say(f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'", wrap=False)
    if plan.metadata.instruction:
        where = (
            "as the system message" if plan.template.instruction_role == "system" else "in front of the user's message"
        )
        console.notice(
            f"the training records share an instruction, which the server does not add. Send it {where}: "
            f"“{_shortened(plan.metadata.instruction)}” (whole in atomtune.json)."
        )


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
