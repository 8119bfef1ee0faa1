"""Engine: chat templates rendered as transformers renders them, with the same result and sooner.

On records of a sentence, tokenizer.apply_chat_template takes longer than tokenizing what it writes. Two shorter ways
stand in for it, for conversations of plain texts alone:
1. the template compiled once, in the environment that transformers gives it;
2. a frame: where a template only copies the texts into place, what it writes around them depends on the roles alone,
   so it is asked once for each sequence of roles. It is shown texts that refuse to be looked at (Sealed): a template
   that trims one, compares it or takes its length is found out, and goes way 1.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MARK, _END = "\ufdd2", "\ufdd3"  # Unicode noncharacters: they mean nothing in any text
_PLACE = re.compile(f"{_MARK}(\\d+){_END}")
#: What a template may ask of any text without learning what it says.
_HARMLESS_TESTS = frozenset(("boolean", "defined", "iterable", "mapping", "none", "number", "sequence", "string"))
#: What hands a text on in another guise, out of a seal's sight.
_DISGUISES = (nodes.AssignBlock, nodes.CallBlock, nodes.Concat, nodes.FilterBlock, nodes.Macro, nodes.Mod)


E = TypeVar("E", bound=ImmutableSandboxedEnvironment)


def environment(kind: type[E]) -> E:
    """What transformers gives a chat template: white space rules, filters and functions."""
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = _now
    return made


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template | None:
    """The template ready to render; None where it needs more than these rules know."""
    try:
        return environment(ImmutableSandboxedEnvironment).from_string(source)
    except TemplateError:
        return None


def is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the messages hold texts alone."""
    return all(message.keys() == {"role", "content"} and type(message["content"]) is str for message in messages)


class Frames:
    """What one template writes around the texts of plain conversations, by their roles.

    given  the other values that the template is rendered with
    """

    #: Sequences of roles that are kept; longer conversations are many, each with its own.
    MOST = 1000

    def __init__(self, source: str, given: Mapping[str, Any]) -> None:
        self.given, self._known = given, dict[tuple[Any, ...], list[str | int] | None]()
        watching = environment(_Watching)
        watching.watch()
        self._program = None if _disguises(watching.parse(source)) else watching.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> str | None:
        """The rendered text; None where these roles have no frame."""
        roles = (prompt, *(message["role"] for message in messages))
        if roles not in self._known and len(self._known) < self.MOST:
            self._known[roles] = self._frame_of(messages, prompt)
        frame = self._known.get(roles)
        if frame is None:
            return None
        return "".join([one if isinstance(one, str) else messages[one]["content"] for one in frame])

    def _frame_of(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> list[str | int] | None:
        """Literal texts, and the numbers of the messages whose texts stand between them."""
        if self._program is None:
            return None
        sealed = [{**one, "content": Sealed(f"{_MARK}{n}{_END}")} for n, one in enumerate(messages)]
        try:
            written = self._program.render(messages=sealed, add_generation_prompt=prompt, **self.given)
        except (LookedAtError, TemplateError, TypeError):  # of the last two the whole way says more
            return None
        parts: list[str | int] = list(_PLACE.split(written))
        parts[1::2] = map(int, parts[1::2])
        return parts


def _disguises(tree: nodes.Template) -> bool:
    """Whether a template has an expression in which a seal would not notice that it is looked at."""
    if next(tree.find_all(_DISGUISES), None) is not None:
        return True
    for compare in tree.find_all(nodes.Compare):
        left = compare.expr
        for operand in compare.ops:  # text in "a literal" asks the literal; text in ("a", "b") asks the text
            asks_the_text = isinstance(left, nodes.Const) or isinstance(operand.expr, nodes.Tuple | nodes.List)
            if operand.op in ("in", "notin") and not asks_the_text:
                return True
            left = operand.expr
    return False


class LookedAtError(Exception):
    """A template looked at what a text says."""


class Sealed(str):
    """A text that can be put behind another and written out, and refuses everything else."""

    __slots__ = ()

    def __str__(self) -> str:
        return str.__str__(self)

    def __add__(self, other: str) -> "Sealed":
        return Sealed(str.__add__(str(self), other))

    def __radd__(self, other: str) -> "Sealed":  # asked before str.__add__, since Sealed is the narrower class
        return Sealed(str.__add__(other, str(self)))

    def __bool__(self) -> bool:
        raise LookedAtError


def _refuse(self: Sealed, *args: object, **kwargs: object) -> NoReturn:
    raise LookedAtError


_OPEN = ("__new__", "__init__", "__str__", "__class__", "__add__", "__getattribute__", "__init_subclass__", "__doc__")
for _name in set(dir(str)) - set(_OPEN) - {"__subclasshook__", "__setattr__", "__delattr__"}:
    setattr(Sealed, _name, _refuse)


class _Watching(ImmutableSandboxedEnvironment):
    """Refuses to hand a sealed text to a filter, a test, a function or an attribute lookup."""

    def watch(self) -> None:
        """Take every filter and test there is under watch."""
        self.filters = {name: _watched(one) for name, one in self.filters.items()}
        self.tests = {name: one if name in _HARMLESS_TESTS else _watched(one) for name, one in self.tests.items()}

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(_unsealed(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, Sealed):
            raise LookedAtError
        return super().getitem(_unsealed(obj), argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().call(context, obj, *map(_without_seals, args), **_without_seals(kwargs))


def _watched(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def watching(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_without_seals, args), **_without_seals(kwargs))

    return watching


def _unsealed(value: Any) -> Any:
    if isinstance(value, Sealed):
        raise LookedAtError
    return value


def _without_seals(value: Any) -> Any:
    """The value itself; raises LookedAtError where a sealed text is or stands in it."""
    if isinstance(value, Mapping):
        for one in value.items():
            _without_seals(one)
    elif isinstance(value, list | tuple):
        for one in value:
            _without_seals(one)
    return _unsealed(value)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
