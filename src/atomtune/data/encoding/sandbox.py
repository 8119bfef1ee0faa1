"""Sandbox: where a stranger's chat template runs. Whatever it computes, it ends, and it fills no memory.

Jinja's own sandbox keeps a template from Python's insides; `{{ 'x' | center(10**10) }}` and two nested loops are fine
with it. Here every operation that makes a text or a list longer than its parts is asked for its size first, and every
step of a loop and every call is a look at the clock. What is left, a value that contains itself doubled forty times,
takes a process with limits (limits.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import islice
from json import dumps
from string import Formatter
from time import thread_time
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template as Program
from jinja2 import TemplateError, nodes, pass_context, pass_environment
from jinja2.ext import Extension
from jinja2.filters import do_round, do_wordwrap, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

#: Characters that one rendering, or one text in it, may have; the longest record anybody trains on is far shorter.
MOST_CHARACTERS = 2**25
#: Of a list that a template puts together.
MOST_ITEMS = 2**20
#: Of an integer: a template counts turns.
MOST_BITS = 2**12
#: Of what a template may ask a text to be filled up to, or a number to be rounded to.
MOST_WIDTH = 10_000
#: Of one rendering, in seconds of this thread's own processor time: a busy machine changes nothing.
MOST_SECONDS = 5.0
#: The clock is looked at in one step of so many; a look takes as long as some three steps.
_STEPS_A_LOOK = 16

_DICT_ATTRIBUTES = frozenset(dir(dict))
#: Attributes whose safety is remembered: a template names a few dozen, and one that makes up names fills no memory.
_MOST_ATTRIBUTES = 1000
_NUMBERS = re.compile(r"\d+")
#: Of `%-08.3f` or `%(name)5s`, what stands between the percent sign and the letter.
_WIDTHS = re.compile(r"%(?:\([^)]*\))?([#0\-+ \d.*]*)")
_TEXTS = (str, bytes, Markup)
#: Methods that a template has no use for, and that take memory by a number.
_USELESS = frozenset({"to_bytes", "translate"})
#: Our filters: around what a loop goes through, and around three summands or more.
_STEPS, _PLUS = "_steps", "_plus"


class Clock:
    """The processor time that one rendering has taken."""

    __slots__ = ("_until", "steps")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.steps, self._until = 0, thread_time() + MOST_SECONDS

    def step(self) -> None:
        self.steps += 1
        if not self.steps % _STEPS_A_LOOK and thread_time() > self._until:
            raise TemplateError(f"it did not finish within {MOST_SECONDS:.0f} seconds")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds, which is asked once for each attribute.

    Half of the time of a long conversation went into the same two questions: is `content` an attribute of a dict, and
    is `startswith` of a text safe? Both answers depend on the type alone.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clock = Clock()
        self._safe: dict[tuple[type, str], bool] = {}
        del self.globals["lipsum"]  # texts of any length, and others each time
        self.filters |= {
            **{name: _with_small_numbers(self.filters[name]) for name in ("batch", "center", "slice")},
            **{"indent": _indent, "wordwrap": _wordwrap, "replace": _replace, "join": _join, "format": _format},
            **{"round": _round, "sum": _sum, "tojson": _tojson, _STEPS: _steps, _PLUS: _plus},
        }

    def program(self, source: str) -> Program:
        """A template as a program whose loops look at the clock, and whose texts have bounds."""
        tree = _Bounds().visit(self.parse(source))
        program = Program.from_code(self, self.compile(tree), self.make_globals(None))
        program.root_render_func.__globals__["str_join"] = _str_join  # what `~` becomes in compiled code
        return program

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """How blocks and macros put their texts together."""
        texts = list(parts)
        refuse_longer(sum(map(len, texts)))
        return "".join(texts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A key of a message or a call, which no dict has as an attribute: what the sandbox comes to as well.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = self._safe.get((type(obj), attr))
        if known is None:
            known = super().is_safe_attribute(obj, attr, value) and attr not in _USELESS
            if len(self._safe) < _MOST_ATTRIBUTES:
                self._safe[type(obj), attr] = known
        return known

    def wrap_str_format(self, value: Any) -> Callable[..., Any] | None:
        """What stands in for a method of a text that may make it longer: the same, once its size is known."""
        if type(value) is not BuiltinMethodType or type(value.__self__) not in _TEXTS:
            return None
        name, text = value.__name__, value.__self__
        if name in ("format", "format_map") and isinstance(text, str):
            return _formatting(_BoundedFormatter(self), text, is_map=name == "format_map")
        if name == "join":
            return lambda parts: _joined_by(text, parts)
        size = _SIZES.get(name)
        if size is None:
            return None

        def bounded(*arguments: Any, **options: Any) -> Any:
            refuse_longer(size(text, *arguments, **options))
            return value(*arguments, **options)

        return bounded

    def call(__self: "Sandbox", __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.clock.step()
        if type(__obj) is BuiltinMethodType:  # `strip` of a text: nothing that Jinja would hand more to, or refuse
            kwargs.pop("_loop_vars", None)  # where it is called from, which macros want to know
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context | None, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if type(left) is str and type(right) is str:
                refuse_longer(len(left) + len(right))
                return left + right
            if isinstance(left, list | tuple) and isinstance(right, list | tuple):
                _refuse_more(len(left) + len(right))
        elif operator == "*":
            _refuse_product(left, right)
        elif operator == "**":
            _refuse_power(left, right)
        elif isinstance(left, str | bytes):
            _refuse_formatted(left, right)
        return self.binop_table[operator](left, right)


class _Bounds(NodeTransformer):
    """Puts our filters where Jinja asks nobody: around what each `for` goes through, and around long sums of texts.

    `a + b + c + d` is one question for its length in place of three: a template is little else than such sums.
    """

    def visit_For(self, loop: nodes.For) -> nodes.For:
        self.generic_visit(loop)
        loop.iter = nodes.Filter(loop.iter, _STEPS, [], [], None, None, lineno=loop.lineno)
        return loop

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        summands: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            summands.append(self.visit(left.right))
            left = left.left
        if len(summands) == 1:
            node.left = self.visit(left)
            return node
        listed = nodes.List([self.visit(left), *reversed(summands)], lineno=node.lineno)
        return nodes.Filter(listed, _PLUS, [], [], None, None, lineno=node.lineno)


@pass_environment
def _plus(environment: Sandbox, summands: list[Any]) -> Any:
    """`a + b + c`."""
    if set(map(type, summands)) == {str}:
        refuse_longer(sum(map(len, summands)))
        return "".join(summands)
    total = summands[0]
    for summand in summands[1:]:
        total = environment.call_binop(None, "+", total, summand)
    return total


@pass_context  # with a context it is never folded into the program
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    step = context.environment.clock.step  # type: ignore[attr-defined]
    for value in values:
        step()
        yield value


class Generation(Extension):
    """`{% generation %}` marks an answer for other trainers; what stands inside is written as it is.

    A name that is set inside is not known behind it: transformers makes a macro of the block.
    """

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def refuse_longer(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise OverflowError(f"it writes more than {MOST_CHARACTERS:,} characters")


def _refuse_more(items: int) -> None:
    if items > MOST_ITEMS:
        raise OverflowError(f"it makes a list of more than {MOST_ITEMS:,} items")


def _refuse_wider(width: object) -> None:
    if isinstance(width, int) and abs(width) > MOST_WIDTH:
        raise OverflowError(f"it asks for a width of {width:,}; {MOST_WIDTH:,} is the most")


def _refuse_product(left: Any, right: Any) -> None:
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | bytes) and isinstance(times, int):
            refuse_longer(len(repeated) * times)
        elif isinstance(repeated, list | tuple) and isinstance(times, int):
            _refuse_more(len(repeated) * times)
    if isinstance(left, int) and isinstance(right, int):
        _refuse_larger(left.bit_length() + right.bit_length())


def _refuse_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        _refuse_larger(left.bit_length() * right)


def _refuse_larger(bits: int) -> None:
    if bits > MOST_BITS:
        raise OverflowError(f"it computes a number of {bits:,} bits; {MOST_BITS:,} is the most")


def _refuse_formatted(text: str | bytes, values: Any) -> None:
    """`text % values`: what it fills texts up to, and how long they are together."""
    form = text if isinstance(text, str) else text.decode("latin-1")
    for width in _WIDTHS.findall(form):
        if "*" in width:
            raise OverflowError("it takes a width from a value (%*d)")
        for number in _NUMBERS.findall(width):
            _refuse_wider(int(number[:20]))
    _refuse_filled(form, values.values() if isinstance(values, Mapping) else values, fields=form.count("%"))


def _refuse_filled(form: str, values: Any, *, fields: int) -> None:
    """A form with so many fields, each as long as the longest value."""
    listed = list(values) if isinstance(values, list | tuple) or not isinstance(values, str | int | float) else [values]
    longest = max((len(value) for value in listed if isinstance(value, str | bytes)), default=0)
    refuse_longer(len(form) + fields * longest)


class _BoundedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        for number in _NUMBERS.findall(format_spec):
            _refuse_wider(int(number[:20]))
        return super().format_field(value, format_spec)


def _formatting(formatter: Formatter, text: str, *, is_map: bool) -> Callable[..., str]:
    """`text.format` or `text.format_map`."""

    def formatted(*arguments: Any, **options: Any) -> str:
        values: Mapping[str, Any] = options
        if is_map:
            (values,), arguments = arguments, ()
        _refuse_filled(text, [*arguments, *values.values()], fields=text.count("{"))
        return formatter.vformat(text, arguments, values)

    return formatted


def _replaced(text: str | bytes, old: Any, new: Any, count: Any = -1) -> int:
    """The length of a text once `old` is replaced."""
    times = text.count(old)
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    return len(text) + times * max(0, len(new) - len(old))


def _joined_by(text: Any, parts: Iterable[Any]) -> Any:
    """`text.join(parts)`; what can be gone through once only, as `map` and `select` give it, is listed first."""
    listed = list(islice(parts, MOST_ITEMS + 1))
    _refuse_more(len(listed))
    refuse_longer(_joined(text, listed))
    return text.join(listed)


def _joined(text: str | bytes, parts: list[Any]) -> int:
    """The length of parts with a text between them."""
    return len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, str | bytes))


def _filled(text: str | bytes, width: int, *rest: Any) -> int:
    return max(len(text), width)


#: The methods of a text that may make it longer: the length of what they would make.
_SIZES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _filled),
    "expandtabs": lambda text, tabsize=8: len(text) * max(1, tabsize),
    "replace": _replaced,
}


def _str_join(values: Iterable[Any]) -> str:
    return Sandbox.concat(map(str, values))


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses a number that is large."""

    @wraps(function)
    def bounded(value: Any, *arguments: Any, **options: Any) -> Any:
        for argument in (*arguments, *options.values()):
            _refuse_wider(argument)
        return function(value, *arguments, **options)

    return bounded


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's `indent`."""
    _refuse_wider(width)
    indention = width if isinstance(width, str) else " " * width
    lines = f"{s}\n".splitlines()
    refuse_longer(len(s) + len(lines) * (len(indention) + 1))
    rest = [indention + line if line or blank else line for line in lines[1:]]
    return "\n".join([indention + lines[0] if first else lines[0], *rest])


@pass_environment
def _wordwrap(environment: Sandbox, s: str, width: int = 79, *arguments: Any, **options: Any) -> str:
    """Jinja's `wordwrap`; the text between the lines is a line end, as everywhere."""
    _refuse_wider(width)
    refuse_longer(
        len(s) * max([1, *(len(value) for value in (*arguments, *options.values()) if isinstance(value, str))])
    )
    return do_wordwrap(environment, s, width, *arguments, **options)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's `replace`."""
    text, old, new = str(s), str(old), str(new)
    refuse_longer(_replaced(text, old, new, -1 if count is None else count))
    return text.replace(old, new, -1 if count is None else count)


@pass_environment
def _join(environment: Sandbox, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's `join`."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    texts, between = [str(item) for item in items], str(d)
    refuse_longer(_joined(between, texts))
    return between.join(texts)


def _format(value: Any, *arguments: Any, **options: Any) -> str:
    """Jinja's `format`: `text % values`."""
    if arguments and options:
        raise TypeError("format takes positional or named values, not both")
    form = str(value)
    _refuse_formatted(form, options or arguments)
    return form % (options or arguments)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    """Jinja's `round`."""
    if abs(precision) > 300:  # more digits than a float has
        raise OverflowError(f"it rounds to {precision:,} digits")
    return do_round(value, precision, method)  # type: ignore[arg-type]


@pass_environment
def _sum(environment: Sandbox, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's `sum`, of numbers or lists; Python's own takes as long as the lists' length squared."""
    values = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
    if not isinstance(start, list):
        if not isinstance(start, int | float):
            raise TypeError("sum adds numbers or lists")
        return sum(values, start)
    total = list(start)
    for value in values:
        if not isinstance(value, list):
            raise TypeError("sum adds lists to a list")
        _refuse_more(len(total) + len(value))
        total += value
    return total


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes what HTML would read."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise OverflowError("it indents JSON by more than 64")
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
