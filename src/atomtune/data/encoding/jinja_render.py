"""Rendering: chat templates run as in transformers: the same Jinja environment, compiled once, and one date per run.

A template is an untrusted program. It runs in a Jinja sandbox with limits on its output and time (sandbox.py).
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from importlib import resources
from typing import Any, NoReturn

from jinja2 import Template as Program
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.utils import Namespace

from atomtune.data.encoding.sandbox import Clock, Generation, Sandbox, refuse_longer

#: Maximum number of characters of a template; the longest published one has about 20,000.
MOST_SOURCE = 2**20


class _Namespace(Namespace):
    """Jinja's namespace, which does not let a template set names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


@lru_cache(maxsize=32)
def compiled(source: str) -> Program:
    """Compile a template. Raises TemplateError if it is not valid, too long or nested too deeply."""
    if len(source) > MOST_SOURCE:
        raise TemplateError(f"it is {len(source):,} characters long; at most {MOST_SOURCE:,} are allowed")
    # Not optimized: Jinja would compute constant expressions while compiling, without a time limit.
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _Namespace
    try:
        return environment.program(source)
    except (MemoryError, RecursionError, SyntaxError) as error:  # from compiling the Python code that Jinja generated
        raise TemplateError(f"it is nested too deeply ({type(error).__name__})") from None


class Renderer:
    """A compiled template that renders conversations.

    values  its variables besides messages and tools: special tokens and the user's variables
    day     the date for `strftime_now`, so that a template that writes the date gives the same tokens all through a run
    """

    def __init__(self, source: str, values: Mapping[str, Any], day: date) -> None:
        self._program = compiled(source)
        self._clock: Clock = self._program.environment.clock  # type: ignore[attr-defined]
        now = datetime.combine(day, time())
        self._values = {"documents": None, **values, "strftime_now": now.strftime}
        # One context is reused: a new one takes longer than rendering a short question (24 of 38 µs).
        self._context = self._program.new_context(self._values)

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendered text.

        Raises whatever the template raises; TemplateError if it takes too long or its text has a lone surrogate;
        OverflowError if the text is too long.
        """
        context = self._program.new_context({**self._values, **variables}) if variables else self._context
        context.vars.clear()  # top-level variables of the previous rendering
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


def built_in(name: str) -> str:
    """The source of a built-in template, without the line end of its file, which is not a part of it."""
    file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8").rstrip("\n")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
