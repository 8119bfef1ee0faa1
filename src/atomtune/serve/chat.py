"""Chat: talk to a trained adapter in the terminal, through the template it was trained with."""

import itertools
import sys

from atomtune.console import Console, visible
from atomtune.data.encoding.chat_template import Message
from atomtune.model.generate import Sampling, prompt_ids
from atomtune.serve.tuned_model import ROOM_FOR_ANSWER, Reply, TunedModel, load_tuned
from atomtune.settings.fields import ChatSettings


def chat(settings: ChatSettings) -> int:
    """Answer --prompt, or lines from the terminal until Ctrl-D."""
    console = Console(stderr=True)
    tuned = load_tuned(
        settings,
        console,
        adapter_path=settings.adapter_path,
        system=settings.system,
        other_base=settings.other_base,
    )
    if settings.prompt is not None:
        _reply(tuned, tuned.messages_of(settings.prompt), settings)
    else:
        _converse(tuned, settings, console)
    return 0


def _converse(tuned: TunedModel, settings: ChatSettings, console: Console) -> None:
    """Lines in, answers out. When the model's positions run out, the oldest exchange is left out, with a notice."""
    console.say(f"Talking to {settings.adapter_path}. An empty line starts a new conversation, Ctrl-D ends.")
    wording = tuned.wording
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
        while exchanges and len(prompt_ids(wording.template, messages)) + ROOM_FOR_ANSWER > tuned.positions:
            exchanges = exchanges[1:]
            messages = [*wording.opening, *itertools.chain(*exchanges), *question]
            console.say("(the oldest exchange no longer fits and is left out)")
        reply = _reply(tuned, messages, settings)
        exchanges.append([*question, *wording.template.messages([reply.turn])])


def _reply(tuned: TunedModel, messages: list[Message], settings: ChatSettings) -> Reply:
    """Print an answer as it is written; on a terminal, control characters in it are shown, not obeyed."""
    on_terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        print(visible(text) if on_terminal else text, end="", flush=True)

    reply = tuned.reply(
        messages,
        max_new_tokens=settings.max_new_tokens,
        sampling=Sampling(settings.temperature),
        hand_on=write,
    )
    print(flush=True)
    return reply
