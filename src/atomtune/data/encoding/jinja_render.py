"""Chat templates run as transformers runs them: the same environment, compiled once, with one date for a whole run.

A template is a program from a stranger. It runs in Jinja's sandbox, and what it may write is bounded.
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from json import dumps
from typing import Any, NoReturn

from jinja2 import Template as Program
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

#: Characters that one rendering may write; the longest record anybody trains on is far shorter.
MOST_CHARACTERS = 2**25
#: What a running template may raise besides TemplateError: any mistake of a program, none of ours.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_DICT_ATTRIBUTES = frozenset(dir(dict))
#: Attributes whose safety is remembered: a template names a few dozen, and one that makes up names fills no memory.
_MOST_ATTRIBUTES = 1000


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no text is multiplied past all bounds, and which is asked once for each attribute.

    Half of the time of a long conversation went into the same two questions: is `content` an attribute of a dict, and
    is `startswith` of a text safe? Both answers depend on the type alone.
    """

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._safe: dict[tuple[type, str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A key of a message or a call, which no dict has as an attribute: what the sandbox comes to as well.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = self._safe.get((type(obj), attr))
        if known is None:
            known = super().is_safe_attribute(obj, attr, value)
            if len(self._safe) < _MOST_ATTRIBUTES:
                self._safe[type(obj), attr] = known
        return known

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                    _refuse_longer(len(repeated) * times)
        elif abs(right) > 64:
            raise OverflowError(f"a power of {right}")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks an answer for other trainers; what stands inside is written as it is."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


@lru_cache(maxsize=32)
def compiled(source: str) -> Program:
    """The template as a program. Raises TemplateError where it is none."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


class Renderer:
    """One template, ready to render conversations.

    values  what it is rendered with besides messages and tools: special tokens and the user's variables
    day     the day that `strftime_now` names; a template that writes the date makes equal tokens all through a run
    """

    def __init__(self, source: str, values: Mapping[str, Any], day: date) -> None:
        self._program = compiled(source)
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
        """The rendered text. Raises one of TEMPLATE_ERRORS."""
        context = self._program.new_context({**self._values, **variables}) if variables else self._context
        context.vars.clear()  # what the rendering before set at its top level
        context.exported_vars.clear()
        context.parent.update(messages=messages, tools=tools or None, add_generation_prompt=prompt)
        parts, length = [], 0
        for part in self._program.root_render_func(context):
            parts.append(part)
            length += len(part)
            _refuse_longer(length)
        return "".join(parts)


def _refuse_longer(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise OverflowError(f"it writes more than {MOST_CHARACTERS:,} characters")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
