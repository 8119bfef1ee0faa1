"""Chat: talk to a trained adapter, through the template it was trained with."""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Message, Template
from atomtune.data.records import Turn
from atomtune.errors import BadSettings
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import base_of, template_of
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import answer, prompt_ids
from atomtune.model.load import BaseSpec, device_in_use, load_base, quiet_libraries, resolve_dtype
from atomtune.settings.fields import ChatSettings


def chat(settings: ChatSettings) -> int:
    """Answer --prompt, or lines from the terminal until Ctrl-D."""
    quiet_libraries()
    console = Console(stderr=True)
    folder = Path(settings.adapter_path)
    template, metadata = template_of(folder, trust_remote_code=settings.trust_remote_code)
    model = _model(settings, folder, metadata.base, console)
    asked = _Asked(template, settings.system, metadata.instruction)
    if settings.prompt is not None:
        _reply(model, template, [*asked.opening, *asked.by_user(settings.prompt)], settings)
        return 0
    _converse(model, template, asked, settings, console)
    return 0


class _Asked:
    """What is typed, as the messages the model was trained on.

    The instruction (--system with atom, else the one the training records shared) stands where training put it; with a
    role template --system is a system message.
    """

    def __init__(self, template: Template, system: str | None, shared: str | None) -> None:
        self.template = template
        as_message = system is not None and template.instruction_role == "user"
        self.opening: list[Message] = [{"role": "system", "content": str(system)}] if as_message else []
        self.instruction = "" if as_message else system if system is not None else shared or ""

    def by_user(self, typed: str) -> list[Message]:
        turn = Turn("user", self.instruction, typed) if self.instruction else Turn("user", typed)
        return self.template.messages([turn])


def _model(settings: ChatSettings, folder: Path, trained_on: str, console: Console) -> Any:
    merged = not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file()
    if merged and settings.model_path:
        raise BadSettings([f"--model_path: {folder} is a whole model already."])
    path = str(folder) if merged else base_of(folder, settings.model_path)
    device = device_in_use()
    dtype = resolve_dtype(settings.dtype, device, fp16=False, bf16=False, notice=console.notice)
    base = load_base(BaseSpec(**{**settings.base(), "path": path}, dtype=dtype, device=device))
    if merged:
        return base.eval()
    refuse_other_base(path, trained_on, anyway=settings.other_base, notice=console.notice)
    return load_trained(base, folder)


def _converse(model: Any, template: Template, asked: _Asked, settings: ChatSettings, console: Console) -> None:
    """Lines in, answers out. The oldest exchange is dropped, and said, when the model's positions run out."""
    console.say(f"Talking to {settings.adapter_path}. An empty line starts a new conversation, Ctrl-D ends.")
    exchanges: list[list[Message]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            exchanges = []
            console.say("(new conversation)")
            continue
        typed = asked.by_user(line)
        messages = [*asked.opening, *itertools.chain(*exchanges), *typed]
        while exchanges and len(prompt_ids(template, messages)) + 64 > _positions(model):
            exchanges = exchanges[1:]
            messages = [*asked.opening, *itertools.chain(*exchanges), *typed]
            console.say("(the oldest exchange no longer fits and is left out)")
        said = _reply(model, template, messages, settings)
        exchanges.append([*typed, {"role": "assistant", "content": said}])


def _positions(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _reply(model: Any, template: Template, messages: list[Message], settings: ChatSettings) -> str:
    room = _positions(model) - len(prompt_ids(template, messages))
    if room < 1:
        raise BadSettings([f"The prompt alone fills the model's {_positions(model)} positions. Ask something shorter."])
    streamer = TextStreamer(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(0)
    return answer(
        model,
        template,
        messages,
        max_new_tokens=min(settings.max_new_tokens, room),
        temperature=settings.temperature,
        streamer=streamer,
    )
