"""Tuned model: an adapter on its base, or a merged model, that answers as it was trained to.

The terminal, the web page and `atomtune.load` all use it.
"""

import contextlib
import copy
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Message, Template
from atomtune.data.encoding.reply import read_reply
from atomtune.data.records import Turn
from atomtune.engines.served_folder import is_whole_model
from atomtune.errors import BadSettings
from atomtune.model.adapter import answering_as, load_trained, refuse_damaged
from atomtune.model.adapter_folder import base_of, template_of
from atomtune.model.base_as_trained import base_spec, quantize_as_trained
from atomtune.model.base_shape import positions_of
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import Sampling, answer_ids, prompt_ids, ready_to_answer, stop_ids
from atomtune.model.load import load_base, quiet_libraries
from atomtune.model.token_rows import guard_embedding
from atomtune.serve.answer_text import AnswerText
from atomtune.settings.command_settings import ChatSettings, LoadSettings
from atomtune.settings.read import read_settings

#: Tokens kept free for the answer when a long conversation is shortened.
ROOM_FOR_ANSWER = 64
GREEDY = Sampling()


@dataclass(frozen=True)
class Wording:
    """How typed text becomes messages as in training.

    The instruction is --system with the template `atom`, else the one that the training records share; it is placed as
    in training. With templates that have roles, --system is a system message.
    """

    template: Template
    opening: list[Message]  # messages before everything that is typed
    instruction: str

    @classmethod
    def of(cls, template: Template, system: str | None, shared_instruction: str | None) -> "Wording":
        if system is None:
            return cls(template, [], shared_instruction or "")
        if template.instruction_role == "user":
            return cls(template, [{"role": "system", "content": system}], "")
        return cls(template, [], system)

    def messages(self, typed: str) -> list[Message]:
        """Typed text as the user's message."""
        turn = Turn("user", self.instruction, typed) if self.instruction else Turn("user", typed)
        return self.template.messages([turn])


@dataclass(frozen=True)
class Reply:
    """An answer: its tokens, its text as shown, and its turn for the next request.

    is_complete  whether it ended by itself, not at a limit or because the user stopped it
    """

    ids: tuple[int, ...]
    text: str
    turn: Turn
    is_complete: bool


class TunedModel:
    """A loaded model, its training template, and the instruction that its training records share.

    model               the transformers or PEFT model itself
    base                path of the base
    shared_instruction  instruction of nearly all training records; None if they have none in common
    notices             notices given while it was loaded
    """

    def __init__(
        self,
        model: CausalLM,
        template: Template,
        *,
        folder: Path,
        base: str,
        shared_instruction: str | None = None,
        system: str | None = None,
        notices: Sequence[str] = (),
    ) -> None:
        self.model, self.template, self.folder, self.base = model, template, folder, base
        self.shared_instruction, self.notices = shared_instruction, tuple(notices)
        self.wording = Wording.of(template, system, shared_instruction)
        # One answer at a time: adapter, random numbers and the template's variables would be those of another answer
        self._answering = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template of the training."""
        return self.template.tokenizer

    @property
    def has_base(self) -> bool:
        """Whether the base can answer too: an adapter can be disabled, a merged model has no base."""
        return hasattr(self.model, "disable_adapter")

    @property
    def positions(self) -> int:
        """How many tokens the model has positions for; sys.maxsize if its config sets no limit."""
        return positions_of(self.model.config) or sys.maxsize

    def with_template(self, template: Template) -> "TunedModel":
        """The same model in memory with another template."""
        other = copy.copy(self)
        other.template, other.wording = template, replace(self.wording, template=template)
        return other

    def with_system(self, system: str | None) -> Wording:
        """The wording with another system text; None: that of the training."""
        return Wording.of(self.template, system, self.shared_instruction)

    def chat(
        self,
        message: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> str:
        """Answer one message, or a conversation of `{"role": …, "content": …}` that ends with the user's.

        A single message is sent as in `atomtune chat`, with the instruction that the training records share.
        temperature  0: always the most likely token, so that equal questions get equal answers
        Raises BadSettings if the prompt is longer than the model's positions.
        """
        answering = self._checked(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        reply = self.reply(self.messages_of(message), **answering)
        return reply.text.strip()

    def stream(
        self,
        message: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        base: bool = False,
    ) -> Iterator[str]:
        """Yield the answer of `chat` in pieces while the model writes it. Leaving the loop ends the answer.

        base  let the base answer, with the adapter disabled
        """
        answering = self._checked(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        yield from self.stream_reply(self.messages_of(message), **answering, base=base)

    def _checked(self, **settings: Any) -> dict[str, Any]:
        """Settings of `atomtune chat` as those of `reply`. Raises BadSettings for a value that the command refuses."""
        checked = read_settings(ChatSettings, {"adapter_path": self.folder, **settings}, command="chat")
        sampling = Sampling(checked.temperature, checked.top_p, checked.top_k, checked.repetition_penalty)
        return {"max_new_tokens": checked.max_new_tokens, "sampling": sampling, "seed": checked.seed}

    def stream_reply(
        self, messages: Sequence[Message], *, stop_early: Callable[[], bool] | None = None, **settings: Any
    ) -> Generator[str, None, Reply]:
        """`reply` in pieces: yields the answer's text while it is written, and returns the reply.

        The model writes in another thread. Leaving the loop ends the answer.
        settings  those of `reply`
        """
        pieces: queue.Queue[str | BaseException | Reply] = queue.Queue()
        left = threading.Event()

        def stops() -> bool:
            return left.is_set() or (stop_early is not None and stop_early())

        def write() -> None:
            try:
                pieces.put(self.reply(messages, hand_on=pieces.put, stop_early=stops, **settings))
            except BaseException as error:  # noqa: BLE001  # raised again in the thread that reads the pieces
                pieces.put(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            while not isinstance(piece := pieces.get(), Reply):
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
            return piece
        finally:
            left.set()
            writer.join()

    def messages_of(self, message: str | Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages for a text as in `atomtune chat`; a conversation unchanged."""
        if isinstance(message, str):
            return [*self.wording.opening, *self.wording.messages(message)]
        if not isinstance(message, list | tuple) or not all(isinstance(turn, Mapping) for turn in message):
            raise BadSettings(
                [f"message {message!r:.60}: expected a text, or a list of messages with `role` and `content`."]
            )
        return [dict(turn) for turn in message]

    def reply(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        base: bool = False,
        hand_on: Callable[[str], None] = lambda text: None,
        stop_early: Callable[[], bool] | None = None,
    ) -> Reply:
        """Generate one answer.

        hand_on     called with each piece of text as it is written
        base        let the base answer, with the adapter disabled
        stop_early  called after each token; True ends the answer there
        Raises BadSettings if the prompt is longer than the model's positions.
        """
        texts: list[str] = []

        def take(text: str) -> None:
            texts.append(text)
            hand_on(text)

        writer = AnswerText(self.template, take)
        answering = answering_as(self.model, None) if base else contextlib.nullcontext()
        gpus = [self.model.device] if self.model.device.type == "cuda" else []
        with self._answering:
            room = self.positions - len(prompt_ids(self.template, messages))
            if room < 1:
                raise BadSettings(
                    [
                        f"The prompt alone fills the model's {self.positions} positions. Shorten the question, or the "
                        "system text."
                    ]
                )
            with answering, torch.random.fork_rng(devices=gpus):
                torch.manual_seed(seed)
                ids = answer_ids(
                    self.model,
                    self.template,
                    messages,
                    max_new_tokens=min(max_new_tokens, room),
                    sampling=sampling,
                    streamer=writer,
                    stop_early=stop_early,
                )
            turn = read_reply(self.template, self.template.render(messages), writer.ids)
        is_complete = bool(ids) and ids[-1] in stop_ids(self.model, self.template)
        return Reply(tuple(writer.ids), "".join(texts), turn, is_complete)


def load_tuned(settings: LoadSettings, console: Console) -> TunedModel:
    """Load the adapter on its base, or the merged model in the folder, ready to answer.

    Raises BadModel for a folder without either, or for a base that the adapter was not trained on.
    """
    quiet_libraries()
    folder = Path(settings.adapter_path)
    template, metadata = template_of(
        folder,
        model_path=settings.model_path,
        trust_remote_code=settings.trust_remote_code,
        notice=console.notice,
    )
    merged = is_whole_model(folder)
    if merged and settings.model_path:
        raise BadSettings([f"--model_path: {folder} is already a complete model."])
    if not merged:
        refuse_damaged(folder)
    path = str(folder) if merged else base_of(folder, settings.model_path)
    quantize = quantize_as_trained(
        path,
        [None if merged else metadata.quantize],  # a merged model was dequantized before the merge
        requested=settings.quantize,
        stored=settings.stored_base,
        trust_remote_code=settings.trust_remote_code,
        notice=console.notice,
    )
    base = {**settings.base(), "path": path, "quantize": quantize}
    model: Any = load_base(base_spec([metadata], **base, dtype=settings.dtype, notice=console.notice))
    if merged:
        model.eval()
    else:
        refuse_other_base(path, metadata.base, anyway=settings.other_base, notice=console.notice)
        model = load_trained(model, folder)
    guard_embedding(model, template.tokenizer, path=str(folder))
    ready_to_answer(model, template, notice=console.notice)
    return TunedModel(
        model,
        template,
        folder=folder,
        base=path,
        shared_instruction=metadata.instruction,
        system=settings.system,
        notices=console.notices,
    )
