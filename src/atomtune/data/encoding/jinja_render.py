"""Chat templates run as transformers runs them: the same environment, compiled once, with one date for a whole run.

A template is a program from a stranger. It runs in Jinja's sandbox, and what it may write is bounded.
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template as Program
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.utils import Namespace

from atomtune.data.encoding.sandbox import Clock, Generation, Sandbox, refuse_longer

#: Characters of a template; the longest published one has some 20,000.
MOST_SOURCE = 2**20


class _Namespace(Namespace):
    """Jinja's namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


@lru_cache(maxsize=32)
def compiled(source: str) -> Program:
    """The template as a program. Raises TemplateError where it is none."""
    if len(source) > MOST_SOURCE:
        raise TemplateError(f"it is {len(source):,} characters long; at most {MOST_SOURCE:,} are allowed")
    # Optimized, what a template writes in constants alone is computed while it is compiled, where no clock runs.
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _Namespace
    try:
        return environment.program(source)
    except (MemoryError, RecursionError, SyntaxError) as error:  # Python compiles what Jinja made of it
        raise TemplateError(f"it is nested too deeply ({type(error).__name__})") from None


class Renderer:
    """One template, ready to render conversations.

    values  what it is rendered with besides messages and tools: special tokens and the user's variables
    day     the day that `strftime_now` names; a template that writes the date makes equal tokens all through a run
    """

    def __init__(self, source: str, values: Mapping[str, Any], day: date) -> None:
        self._program = compiled(source)
        self._clock: Clock = self._program.environment.clock  # type: ignore[attr-defined]
        now = datetime.combine(day, time())
        self._values = {"documents": None, **values, "strftime_now": now.strftime}
        # A new context costs more than rendering a short question (24 of 38 µs), so one serves all.
        self._context = self._program.new_context(self._values)

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendered text. A template may raise whatever a program may.

        Raises TemplateError where the text is none that can be written down: half a character.
        """
        context = self._program.new_context({**self._values, **variables}) if variables else self._context
        context.vars.clear()  # what the rendering before set at its top level
        context.exported_vars.clear()
        context.parent.update(messages=messages, tools=tools or None, add_generation_prompt=prompt)
        self._clock.start()
        parts, length = [], 0
        for part in self._program.root_render_func(context):
            parts.append(part)
            length += len(part)
            refuse_longer(length)
        text = "".join(parts)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TemplateError(f"it writes an incomplete character ({text[error.start]!a})") from None
        return text


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
