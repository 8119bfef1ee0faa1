"""Chat: talk to a trained adapter, through the template it was trained with."""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from atomtune.console import Console, visible
from atomtune.data.encoding.chat_template import Message, Template
from atomtune.data.encoding.reply import read_reply, shown
from atomtune.data.records import Turn
from atomtune.errors import BadSettings
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import CONFIG, base_of, template_of
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import answer_ids, prompt_ids, ready_to_answer
from atomtune.model.load import BaseSpec, device_in_use, load_base, quiet_libraries, resolve_dtype
from atomtune.model.token_rows import guard_embedding
from atomtune.settings.fields import ChatSettings

#: Tokens kept free for an answer when a long conversation is shortened.
ROOM_FOR_ANSWER = 64
#: A byte of a character that SentencePiece has no piece for.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def chat(settings: ChatSettings) -> int:
    """Answer --prompt, or lines from the terminal until Ctrl-D."""
    quiet_libraries()
    console = Console(stderr=True)
    folder = Path(settings.adapter_path)
    template, metadata = template_of(folder, trust_remote_code=settings.trust_remote_code)
    model = _load(settings, folder, metadata.base, console)
    guard_embedding(model, template.tokenizer, path=str(folder))
    ready_to_answer(model, template, notice=console.notice)
    wording = Wording.of(template, settings.system, metadata.instruction)
    if settings.prompt is not None:
        _reply(model, template, [*wording.opening, *wording.messages(settings.prompt)], settings)
    else:
        _converse(model, wording, settings, console)
    return 0


@dataclass(frozen=True)
class Wording:
    """How what is typed becomes the messages that the model was trained on.

    The instruction (--system with atom, else the one that the training records shared) stands where training put it.
    With a role template --system is a system message.
    """

    template: Template
    opening: list[Message]  # stands before everything that is typed
    instruction: str

    @classmethod
    def of(cls, template: Template, system: str | None, shared_instruction: str | None) -> "Wording":
        if system is None:
            return cls(template, [], shared_instruction or "")
        if template.instruction_role == "user":
            return cls(template, [{"role": "system", "content": system}], "")
        return cls(template, [], system)

    def messages(self, typed: str) -> list[Message]:
        turn = Turn("user", self.instruction, typed) if self.instruction else Turn("user", typed)
        return self.template.messages([turn])


def _load(settings: ChatSettings, folder: Path, trained_on: str, console: Console) -> CausalLM:
    """The adapter on its base, or the merged model that the folder holds."""
    merged = not (folder / CONFIG).is_file() and (folder / "config.json").is_file()
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


def _converse(model: CausalLM, wording: Wording, settings: ChatSettings, console: Console) -> None:
    """Lines in, answers out. When the model's positions run out, the oldest exchange is left out, with a notice."""
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
        question = wording.messages(line)
        messages = [*wording.opening, *itertools.chain(*exchanges), *question]
        while exchanges and len(prompt_ids(wording.template, messages)) + ROOM_FOR_ANSWER > _positions(model):
            exchanges = exchanges[1:]
            messages = [*wording.opening, *itertools.chain(*exchanges), *question]
            console.say("(the oldest exchange no longer fits and is left out)")
        reply = _reply(model, wording.template, messages, settings)
        exchanges.append([*question, *wording.template.messages([reply])])


def _positions(model: CausalLM) -> int:
    """How many tokens the model has positions for; without a limit in its config, as many as you like."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _reply(model: CausalLM, template: Template, messages: list[Message], settings: ChatSettings) -> Turn:
    """Print an answer as it is written, and return the turn that it stands for: its thoughts and calls apart."""
    room = _positions(model) - len(prompt_ids(template, messages))
    if room < 1:
        raise BadSettings([f"The prompt alone fills the model's {_positions(model)} positions. Ask something shorter."])
    torch.manual_seed(0)
    ids = answer_ids(
        model,
        template,
        messages,
        max_new_tokens=min(settings.max_new_tokens, room),
        temperature=settings.temperature,
        streamer=_Printer(template),
    )
    return read_reply(template, template.render(messages), ids)


class _Printer(BaseStreamer):
    """Prints an answer while the model writes it; on a terminal, control characters in it are shown, not obeyed."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.on_terminal = sys.stdout.isatty()
        self.ids: list[int] | None = None  # None: the prompt comes first
        self.printed = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = shown(self.template, self.ids)
        # A character of several tokens is shown once it is whole. SentencePiece decodes a run of byte tokens as one:
        # where a later byte makes it invalid, all of it turns into replacement characters.
        whole = not text.endswith("\ufffd") and not self._ends_in_a_byte()
        if whole and text.startswith(self.printed):
            self._print(text[len(self.printed) :])
            self.printed = text

    def _ends_in_a_byte(self) -> bool:
        token = self.template.tokenizer.convert_ids_to_tokens((self.ids or [0])[-1])
        return bool(token and _BYTE_TOKEN.fullmatch(token))

    def end(self) -> None:
        self._print(shown(self.template, self.ids or [])[len(self.printed) :] + "\n")

    def _print(self, text: str) -> None:
        print(visible(text) if self.on_terminal else text, end="", flush=True)
