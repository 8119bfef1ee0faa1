"""Page: the layout of `atomtune web` and what a click does, in English or Chinese depending on the browser.

It is built with Gradio. The page loads nothing from other machines: no fonts, no analytics, no share link, and no
picture that an answer names.
"""

import os
import shutil
import tempfile
import threading
import time
import webbrowser
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

import gradio
from gradio.blocks import Block
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atomtune.choices import RUN_RECORD
from atomtune.console import shortened
from atomtune.data.encoding.chat_template import OWN
from atomtune.data.formats.schema import THINKING
from atomtune.disk import read_json_object
from atomtune.errors import AtomtuneError
from atomtune.folders import TemporaryFolder
from atomtune.language import in_chinese, message, spoken, translated
from atomtune.model.generate import Sampling
from atomtune.model.load import dtype_name
from atomtune.serve.address import ask_without_proxy
from atomtune.serve.markdown import as_code, as_markdown, from_markdown
from atomtune.serve.side_by_side import (
    Answer,
    Asking,
    ShownExchange,
    Side,
    answers_of_sides,
    conversation_of,
    models_by_mode,
)
from atomtune.serve.tuned_model import TunedModel
from atomtune.settings.command_settings import WebSettings
from atomtune.settings.declare import LARGEST_SEED

#: Words of the page by key; a Chinese browser gets those of the Chinese catalogue.
WORDS = {
    "tuned": message("tuned"),
    "base": message("base"),
    "ask": "Type a message. Enter sends, Shift+Enter makes a new line.",
    "empty": "Ask something.",
    "examples": "Prompts that were held out from training",
    "new": "New conversation",
    "save": "Save as a record",
    "settings": message("Settings"),
    "compare": "Show the base's answer too",
    "thinking": "Think before answering",
    "own_system": "Another system prompt",
    "own_system_info": "otherwise as in training; it may be empty",
    "system": "System prompt",
    "longest": "Longest answer",
    "tokens": "in tokens",
    "temperature": message("Temperature"),
    "greedy": "0: always the most likely token",
    "top_p": message("Top-p"),
    "top_k": message("Top-k"),
    "sampling": "applies above temperature 0",
    "all": "applies above temperature 0; 0: all",
    "penalty": "Repetition penalty",
    "none": "1: none",
    "seed": message("Seed"),
    "forgot": "The oldest messages no longer fit, so they are left out.",
}
_CSS = """
.about p { margin: 0; overflow-wrap: anywhere }
footer { display: none !important }
"""
#: Fonts of the reader's machine; Gradio's themes would load theirs from another one.
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
#: The conversation fills what the window leaves between the lines above and the boxes below.
_HEIGHT = "max(300px, calc(100dvh - 280px))"
#: Seconds between two updates of an answer that is being written, because each update draws all of it.
_FRAME = 0.1
#: What the browser may load. Gradio's own page has inline styles and scripts.
_OWN_ORIGIN = " ".join(("default-src", "'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"))

#: Values of the boxes, by box.
Values = dict[Any, Any]


@dataclass
class Tab:
    """One conversation in one browser tab; starting a new conversation creates another object.

    stop   ends the answer to the last question; None if no question is waiting
    saved  the folder of the file that the save button offers; None before the first answer
    """

    exchanges: list[ShownExchange] = field(default_factory=list)
    stop: threading.Event | None = None
    saved: Path | None = None

    def ask(self, before: list[ShownExchange], question: str) -> None:
        """Append a question after these exchanges; it waits for its answer."""
        self.exchanges = [*before, ShownExchange(question, tuned=Answer())]
        self.stop = threading.Event()


class Page:
    """The page of one tuned model. Methods that a click calls return what the boxes then show.

    They always draw the conversation that the tab has at that moment, so an answer that was still being written when a
    new conversation started cannot bring the old one back.
    """

    def __init__(self, tuned: TunedModel, settings: WebSettings) -> None:
        self.tuned = tuned
        self._modes = models_by_mode(tuned)
        english, chinese = _words_about(tuned)
        self._word: Any = gradio.I18n(**{"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese})
        self._tabs: dict[str | None, Tab] = defaultdict(Tab)  # by browser tab
        self._saved = TemporaryFolder("atomtune-web-")
        # Gradio's copies of saved files are then removed with the page
        os.environ["GRADIO_TEMP_DIR"] = str(self._saved.path)
        title = f"atomtune: {tuned.folder.resolve().name}"
        # delete_cache: every 600 s, Gradio removes its copies of saved files that are older than 3,600 s; at the end,
        # all.
        options: dict[str, Any] = {"analytics_enabled": False, "fill_height": True, "delete_cache": (600, 3600)}
        with gradio.Blocks(title=title, **options) as self.blocks:
            gradio.Markdown(str(self._word("about")), elem_classes="about")
            with gradio.Sidebar(label=self._word("settings"), open=False, position="right"):
                self._lay_settings(settings)
            with gradio.Row(equal_height=True):
                self.base = self._conversation_box("base")
                self.answers = self._conversation_box("tuned")
            self.typed = gradio.Textbox(
                placeholder=self._word("ask"),
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                submit_btn=True,
                elem_id="typed",
            )
            if prompts := held_out_prompts(tuned.folder):
                gradio.Examples([[prompt] for prompt in prompts], self.typed, label=self._word("examples"))
            with gradio.Row():
                self.new = gradio.Button(self._word("new"), size="sm", min_width=120, elem_id="new")
                self.save = gradio.DownloadButton(
                    self._word("save"), size="sm", min_width=120, visible=False, elem_id="save"
                )
            self._connect()

    def _lay_settings(self, settings: WebSettings) -> None:
        word = self._word
        thinks = self.tuned.template.variables.get(THINKING, True)
        self.compare = gradio.Checkbox(False, label=word("compare"), visible=self.tuned.has_base, elem_id="compare")
        self.thinking = gradio.Checkbox(bool(thinks), label=word("thinking"), visible=bool(self._modes))
        own_system = settings.system is not None
        self.own_system = gradio.Checkbox(
            own_system, label=word("own_system"), info=word("own_system_info"), elem_id="own_system"
        )
        self.system = gradio.Textbox(
            settings.system or "", label=word("system"), lines=2, visible=own_system, elem_id="system"
        )
        self.longest = gradio.Number(
            settings.max_new_tokens,
            label=word("longest"),
            info=word("tokens"),
            minimum=1,
            precision=0,
            elem_id="longest",
        )
        self.temperature = gradio.Slider(0, 2, 0, step=0.05, label=word("temperature"), info=word("greedy"))
        own = self.tuned.model.generation_config  # the base's published settings, which `chat` uses too
        self.top_p = gradio.Slider(
            0.05, 1, getattr(own, "top_p", None) or 1, step=0.05, label=word("top_p"), info=word("sampling")
        )
        self.top_k = gradio.Number(
            getattr(own, "top_k", None) or 0, label=word("top_k"), info=word("all"), minimum=0, precision=0
        )
        self.penalty = gradio.Slider(
            1, 2, getattr(own, "repetition_penalty", None) or 1, step=0.05, label=word("penalty"), info=word("none")
        )
        self.seed = gradio.Number(0, label=word("seed"), minimum=0, maximum=LARGEST_SEED, precision=0)

    def _conversation_box(self, side: Side) -> gradio.Chatbot:
        return gradio.Chatbot(
            label=self._word(side),
            visible=side == "tuned",
            elem_id=side,
            height=_HEIGHT,
            editable="user" if side == "tuned" else None,
            placeholder=self._word("empty"),
            buttons=["copy"],
        )

    def _connect(self) -> None:
        system = {self.own_system, self.system}
        sampling = {self.longest, self.temperature, self.top_p, self.top_k, self.penalty, self.seed}
        inputs: set[Block] = {self.typed, self.compare, self.thinking, *system, *sampling}
        shown = [self.base, self.answers, self.typed]
        # The one model and its adapter are shared, so questions of all users are answered one after another.
        in_turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        # Gradio drops an event if the same event is still pending, which happens for a moment after an answer was
        # stopped. So one event takes the question and ends at once, and another one, of which several may wait, answers
        # it.
        sent = self.typed.submit(self.send, inputs, shown, queue=False)
        asks = [
            sent.then(self.answer, inputs, shown, trigger_mode="multiple", **in_turn),
            self.answers.retry(self.ask_again, inputs, shown, **in_turn),
            self.answers.edit(self.ask_otherwise, inputs, shown, **in_turn),
            self.answers.undo(self.take_back, None, shown),
        ]
        for ended in asks:  # the file of the save button must exist before it is clicked
            ended.then(self.settle, inputs, [*shown, self.save], show_progress="hidden")
        self.typed.stop(self.stop, None, None, queue=False)
        for event in (self.new.click, self.answers.clear, self.base.clear):
            event(self.begin_anew, None, [*shown, self.save], queue=False)
        self.compare.change(lambda compares: gradio.Chatbot(visible=compares), self.compare, self.base)
        self.own_system.change(lambda own: gradio.Textbox(visible=own), self.own_system, self.system)
        self.blocks.unload(self.leave)

    # What a click does.

    def send(self, values: Values, request: gradio.Request) -> tuple[Any, ...]:
        """Move the typed text into the conversation; while an answer is being written, it stays in its box."""
        tab = self._tabs[request.session_hash]
        question = values[self.typed].strip()
        if tab.stop is not None or not question:
            return (gradio.skip(),) * 3
        tab.ask(tab.exchanges, question)
        return self._drawn(request, value="")

    def answer(self, values: Values, request: gradio.Request) -> Iterator[tuple[Any, ...]]:
        """Answer the waiting question when the model is free."""
        tab = self._tabs[request.session_hash]
        yield self._drawn(request)
        if tab.stop is None:
            return
        *before, last = tab.exchanges
        tuned = self._modes[values[self.thinking]] if self._modes else self.tuned
        asking = self._asking(values)
        typed: dict[str, str] = {}
        drawn = time.monotonic()
        try:
            for exchange in answers_of_sides(
                tuned, before, last.question, asking, stop=tab.stop.is_set, forgot=self._say_forgotten
            ):
                tab.exchanges = [*before, exchange]
                if time.monotonic() - drawn >= _FRAME:
                    drawn = time.monotonic()
                    yield *self._conversations(request), gradio.skip()  # skip: a box that is redrawn cannot be clicked
        except AtomtuneError as error:  # the question is too long; it goes back into its box
            gradio.Warning(translated(str(error)))
            tab.exchanges = before
            typed = {"value": last.question}
        finally:
            tab.stop = None
        yield self._drawn(request, **typed)

    def ask_again(self, values: Values, request: gradio.Request, event: gradio.RetryData) -> Iterator[tuple[Any, ...]]:
        yield from self._ask_again(event.index, None, values, request)

    def ask_otherwise(
        self, values: Values, request: gradio.Request, event: gradio.EditData
    ) -> Iterator[tuple[Any, ...]]:
        yield from self._ask_again(event.index, from_markdown(str(event.value)), values, request)

    def _ask_again(
        self, index: Any, question: str | None, values: Values, request: gradio.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Ask again in place of the exchange that was clicked and all after it. question None: the same question."""
        tab = self._tabs[request.session_hash]
        if tab.stop is None and tab.exchanges:  # otherwise the conversation has continued since the click
            number = _exchange_at(index, tab.exchanges)
            tab.ask(tab.exchanges[:number], question or tab.exchanges[number].question)
        yield from self.answer(values, request)

    def take_back(self, request: gradio.Request, event: gradio.UndoData) -> tuple[Any, ...]:
        tab = self._tabs[request.session_hash]
        if tab.stop is not None or not tab.exchanges:
            return self._drawn(request)
        number = _exchange_at(event.index, tab.exchanges)
        question = tab.exchanges[number].question
        tab.exchanges = tab.exchanges[:number]
        return self._drawn(request, value=question)

    def begin_anew(self, request: gradio.Request) -> tuple[Any, ...]:
        """Start a new conversation at once; text already typed stays, as its first question."""
        self.leave(request)
        return *self._drawn(request), gradio.DownloadButton(visible=False)

    def settle(self, values: Values, request: gradio.Request) -> tuple[Any, ...]:
        """After an answer: the present conversation, and the button that saves it as a record for `train`."""
        tab = self._tabs[request.session_hash]
        button = gradio.DownloadButton(visible=False)
        if tab.exchanges:
            conversation = conversation_of(self.tuned, tab.exchanges, self._system_of(values))
            tab.saved = tab.saved or Path(tempfile.mkdtemp(dir=self._saved.path))
            file = tab.saved / "conversation.jsonl"
            file.unlink(missing_ok=True)  # `save` appends
            conversation.save(file)
            button = gradio.DownloadButton(value=str(file), visible=True)
        return *self._drawn(request), button

    def stop(self, request: gradio.Request) -> None:
        """End the answer for which this tab is waiting."""
        _end_answer(self._tabs[request.session_hash])

    def leave(self, request: gradio.Request) -> None:
        """Forget this tab's conversation with its file, and end its answer."""
        tab = self._tabs.pop(request.session_hash, Tab())
        _end_answer(tab)
        if tab.saved is not None:
            shutil.rmtree(tab.saved, ignore_errors=True)

    def _asking(self, values: Values) -> Asking:
        return Asking(
            compare=values[self.compare],
            system=self._system_of(values),
            max_new_tokens=int(values[self.longest] or 1),
            sampling=Sampling(
                float(values[self.temperature]),
                float(values[self.top_p]),
                int(values[self.top_k] or 0),
                float(values[self.penalty]),
            ),
            seed=int(values[self.seed] or 0),
        )

    def _system_of(self, values: Values) -> str | None:
        """The user's own system text, which may be empty; None: the one of the training records."""
        return (values[self.system] or "") if values[self.own_system] else None

    def _say_forgotten(self, count: int) -> None:
        gradio.Info(self._word("forgot"))

    def _drawn(self, request: gradio.Request, **typed: str) -> tuple[Any, ...]:
        """Both conversations, and the input box, whose button sends, or stops an answer."""
        answering = self._tabs[request.session_hash].stop is not None
        box = gradio.Textbox(submit_btn=not answering, stop_btn=answering, **typed)
        return *self._conversations(request), box

    def _conversations(self, request: gradio.Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The conversations with the base and with the tuned model."""
        exchanges = self._tabs[request.session_hash].exchanges
        return self._messages(exchanges, "base"), self._messages(exchanges, "tuned")

    @staticmethod
    def _messages(exchanges: list[ShownExchange], side: Side) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for exchange in exchanges:
            answer = exchange.by(side)
            if answer is None:
                continue
            messages.append({"role": "user", "content": as_markdown(exchange.question)})
            if answer.thoughts:
                folded = {"title": "💭", "status": "done"}  # a title that needs no translation
                messages.append({"role": "assistant", "content": as_markdown(answer.thoughts), "metadata": folded})
            messages.append({"role": "assistant", "content": as_markdown(answer.shown)})
        return messages

    # Start and end.

    def launch(self, *, host: str, port: int, login: tuple[str, str] | None = None) -> None:
        """Start to listen; returns at once."""
        ask_without_proxy(host)  # Gradio sends a request to its own page to check it
        theme = gradio.themes.Default(primary_hue="green", neutral_hue="stone", font=_FONTS, font_mono=["monospace"])
        self.blocks.launch(
            server_name=host,
            server_port=port,
            auth=login,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme,
            css=_CSS,
            i18n=self._word,
            app_kwargs={"middleware": [Middleware(_only_from_here)]},
        )

    def wait(self, *, opens: str | None = None) -> None:
        """Wait until interrupted. opens: an address to open in this machine's browser."""
        if opens:
            webbrowser.open(opens)
        threading.Event().wait()

    def close(self) -> None:
        for tab in list(self._tabs.values()):
            _end_answer(tab)
        self.blocks.close(verbose=False)
        self._saved.remove()


def _words_about(tuned: TunedModel) -> tuple[dict[str, str], dict[str, str]]:
    """The page's words in English and in Chinese; the browser chooses, whatever the language of the terminal."""
    with spoken("en"):
        english = {**WORDS, "about": about(tuned)}
    with spoken("zh"):
        chinese = {**{key: in_chinese(text) for key, text in WORDS.items()}, "about": about(tuned)}
    return english, chinese


def about(tuned: TunedModel) -> str:
    """Which model answers, in which template, and the instruction of every message; as Markdown."""
    dtype, device = dtype_name(next(tuned.model.parameters()).dtype), tuned.model.device.type
    base = Path(tuned.base).name if Path(tuned.base).is_dir() else tuned.base  # names on the hub are shown in full
    kind = translated(f"adapter on {as_code(base)}" if tuned.has_base else "merged model")
    name = tuned.template.title if tuned.template.name == OWN else f"template {as_code(tuned.template.name)}"
    parts = [kind, translated(f"{dtype} on {device}"), translated(name)]
    lines = [f"**{as_code(str(tuned.folder))}**  {' · '.join(parts)}"]
    if tuned.wording.instruction:
        instruction = as_code(shortened(tuned.wording.instruction))
        lines.append(translated(f"Each message is sent with the instruction {instruction}"))
    return "\n\n".join(lines)


def held_out_prompts(folder: Path) -> list[str]:
    """The prompts of the run's samples, offered as first questions."""
    try:
        samples = read_json_object(folder / RUN_RECORD).get("samples")
    except (OSError, ValueError):
        return []
    listed = samples if isinstance(samples, list) else []
    prompts = [sample.get("prompt") for sample in listed if isinstance(sample, dict)]
    return [prompt for prompt in prompts if isinstance(prompt, str) and prompt.strip()]


def _end_answer(tab: Tab) -> None:
    if tab.stop is not None:
        tab.stop.set()


def _only_from_here(app: ASGIApp) -> ASGIApp:
    """Let the browser load only what this server sends.

    An answer may name a picture on another machine, and whoever wrote a text that the model reads could so learn of it.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(event: Message) -> None:
            if event["type"] == "http.response.start":
                MutableHeaders(scope=event)["Content-Security-Policy"] = _OWN_ORIGIN
            await send(event)

        await app(scope, receive, send_with_policy)

    return answer


def _exchange_at(index: Any, exchanges: list[ShownExchange]) -> int:
    """The index of the exchange with the clicked message: a question, and an answer with or without thoughts."""
    message = index[0] if isinstance(index, list | tuple) else int(index)
    for number, exchange in enumerate(exchanges):
        message -= 3 if exchange.tuned is not None and exchange.tuned.thoughts else 2
        if message < 0:
            return number
    return len(exchanges) - 1
