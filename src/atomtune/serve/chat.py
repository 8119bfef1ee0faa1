"""Chat: talk to a tuned model in the terminal, in the template it was trained with."""

import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from rich.table import Table

from atomtune.console import Console, controls_shown, shortened
from atomtune.data.encoding.chat_template import Message
from atomtune.disk import expanded
from atomtune.errors import BadSettings, UserError
from atomtune.language import message, translated
from atomtune.model.generate import Sampling
from atomtune.model.load import dtype_name
from atomtune.serve.conversation import Conversation
from atomtune.serve.tuned_model import Reply, TunedModel, load_tuned
from atomtune.serve.typed_input import TypedInput, lines_of_pipe
from atomtune.settings.command_settings import ChatSettings

#: Commands that a user can type, and what they do.
COMMANDS = {
    "/reset": "start a new conversation (an empty line does too)",
    "/system": "TEXT sets another system prompt; without TEXT, the one from training is used again",
    "/save": "FILE appends the conversation to a file, as a record that `atomtune train` reads",
    "/help": "this list",
}


def chat(settings: ChatSettings) -> int:
    """Answer --prompt, what the user types until Ctrl-D, or the lines of a pipe."""
    console = Console(stderr=True)
    tuned = load_tuned(settings, console)
    if settings.compare and not tuned.has_base:
        raise BadSettings([f"--compare: {settings.adapter_path} is a merged model, which has no base to compare with."])
    talk = TerminalChat(tuned, settings, console)
    if settings.prompt is not None:
        talk.answer(settings.prompt)
    else:
        talk.run()
    return 0


class TerminalChat:
    """A conversation with the tuned model and, with --compare, another one with its base."""

    def __init__(self, tuned: TunedModel, settings: ChatSettings, console: Console) -> None:
        self.tuned, self.settings, self.console = tuned, settings, console
        self.conversation = Conversation(tuned, settings.system)
        self.with_base = Conversation(tuned, settings.system) if settings.compare else None
        self.answers = 0

    def run(self) -> None:
        """Answer until Ctrl-D or the end of the pipe. An empty line starts a new conversation."""
        typed = sys.stdin.isatty()
        self._say_who_answers(typed=typed)
        texts = TypedInput(list(COMMANDS)) if typed else lines_of_pipe()
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                self._begin_anew()
            elif not self._obeyed(text):
                question = text.removeprefix("/") if text.startswith("//") else text
                if typed:
                    with _ctrl_c_stops() as stop:
                        self.answer(question, stop)
                else:  # for a program or a job, Ctrl-C ends the process as usual
                    self._answer_line(number, question)

    def _answer_line(self, number: int, question: str) -> None:
        """Answer a line of a pipe.

        Raises BadSettings with its number if it cannot be sent, because later lines build on it.
        """
        try:
            self.answer(question)
        except UserError as error:
            raise BadSettings([f"line {number:,} of standard input: {error}"]) from None

    def _say_who_answers(self, *, typed: bool) -> None:
        tuned, say = self.tuned, self.console.say
        dtype = dtype_name(next(tuned.model.parameters()).dtype)
        name = f"{tuned.folder}: adapter on {tuned.base}" if tuned.has_base else f"{tuned.folder}: merged model"
        say(f"{name} ({dtype} on {tuned.model.device.type}), template {tuned.template.name}.")
        self._say_instruction()
        if typed:
            say(
                "Enter sends, Alt+Enter starts a new line; Ctrl-C stops an answer, Ctrl-D ends the chat. /help lists "
                "the commands."
            )

    def _say_instruction(self) -> None:
        if self.conversation.system is not None:
            self.console.say(f"System prompt: “{shortened(self.conversation.system)}”")
        elif self.tuned.shared_instruction:
            self.console.say(
                "Each message is sent with the instruction that the training records share: "
                f"“{shortened(self.tuned.shared_instruction)}” (/system TEXT sets another)."
            )

    def _obeyed(self, text: str) -> bool:
        """Carry out a text that is a command, or suggest a command with a similar name; False for any other text."""
        word, _, rest = text.strip().partition(" ")
        if word not in COMMANDS:
            nearly = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.75)
            if word.startswith("//") or not word.startswith("/") or not nearly:
                return False
            self.console.say(
                f"{word} is not a command. Did you mean {nearly[0]}? (//… sends a text that begins with /.)"
            )
        elif word == "/help":
            self._say_help()
        elif word == "/save":
            self._save(rest.strip())
        else:
            if word == "/system":
                for conversation in self._conversations():
                    conversation.system = rest.strip() or None
                self._say_instruction()
            self._begin_anew()
        return True

    def _conversations(self) -> list[Conversation]:
        return [self.conversation, *([self.with_base] if self.with_base else [])]

    def _begin_anew(self) -> None:
        for conversation in self._conversations():
            conversation.begin_anew()
        self.console.say("(new conversation)")

    def _say_help(self) -> None:
        for command, meaning in COMMANDS.items():
            self.console.say(f"  {command:<8} {translated(meaning)}")

    def _save(self, file: str) -> None:
        if not file:
            self.console.say("Name a file: /save talk.jsonl")
            return
        if not self.conversation.has_exchanges:
            self.console.say("Nothing to save yet.")
            return
        try:
            self.conversation.save(expanded(file))
        except OSError as error:
            self.console.say(f"{file} cannot be written: {error.strerror}.")
            return
        self.console.say(translated(f"saved: {file}"))
        if cut_off := self.conversation.cut_off:
            self.console.say(f"({cut_off} of its answers did not end by themselves and are not learned: weight 0)")

    def answer(self, question: str, stop: threading.Event | None = None) -> None:
        """Answer a question and remember both.

        A question that does not fit the model, or that the template refuses, is reported and not remembered.
        """
        try:
            for conversation in self._conversations():
                if conversation.make_room(question):
                    self.console.say("(the oldest exchange no longer fits and is left out)")
            if self.with_base is None:
                reply = self._written_out(self.conversation.asking(question), stop)
            else:
                reply = self._compared(question, self.with_base, stop)
        except UserError as error:
            if self.settings.prompt is not None or not sys.stdin.isatty():
                raise
            self.console.say(str(error))  # a chat continues after such a question
            return
        self.conversation.remember(question, reply)
        self.answers += 1
        if stop is not None and stop.is_set():
            self.console.say(translated("(stopped)"))

    def _written_out(self, messages: list[Message], stop: threading.Event | None) -> Reply:
        """Print the answer while it is written.

        On a terminal, control characters are shown instead of taking effect.
        """
        on_terminal = sys.stdout.isatty()

        def write(text: str) -> None:
            print(controls_shown(text) if on_terminal else text, end="", flush=True)

        reply = self._reply(messages, stop, write=write)
        print(flush=True)
        return reply

    def _compared(self, question: str, with_base: Conversation, stop: threading.Event | None) -> Reply:
        """Print both answers side by side; in a pipe, one below the other."""
        with self.console.status(translated("the base answers …")):
            of_base = self._reply(with_base.asking(question), stop, base=True)
        if stop is not None:
            stop.clear()  # Ctrl-C ended only the base's answer
        with self.console.status(translated("the tuned model answers …")):
            reply = self._reply(self.conversation.asking(question), stop)
        with_base.remember(question, of_base)
        if sys.stdout.isatty():
            Console().print(side_by_side(of_base.text.strip(), reply.text.strip()))
        else:
            # For programs, so not translated
            print(f"base: {of_base.text.strip()}\ntuned: {reply.text.strip()}", flush=True)
        return reply

    def _reply(
        self,
        messages: list[Message],
        stop: threading.Event | None,
        *,
        base: bool = False,
        write: Callable[[str], None] = lambda text: None,
    ) -> Reply:
        settings = self.settings
        return self.tuned.reply(
            messages,
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty),
            seed=settings.seed + self.answers,
            base=base,
            hand_on=write,
            stop_early=stop.is_set if stop is not None else None,
        )


def side_by_side(of_base: str, of_tuned: str) -> Table:
    """Two whole answers in two columns. `fold` keeps all text: Chinese has no spaces, and rich cuts long words."""
    table = Table(expand=True)
    for title in (message("base"), message("tuned")):
        table.add_column(translated(title), ratio=1, overflow="fold")
    table.add_row(of_base, of_tuned)
    return table


@contextlib.contextmanager
def _ctrl_c_stops() -> Iterator[threading.Event]:
    """Within this context, the first Ctrl-C sets the event, and a second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def receive(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
