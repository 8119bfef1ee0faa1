"""Sandbox: runs an untrusted chat template with limits on its time and memory.

Jinja's sandbox keeps a template away from Python's internals, but allows `{{ 'x' | center(10**10) }}` and nested loops
without end. Here, every operation that can make a text or list longer than its operands is checked for the size of its
result first, and every loop step and every call counts toward a time limit. What remains, such as a value that contains
itself doubled forty times, needs a process with limits (limits.py).
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

#: Maximum characters of a rendering, or of any text in it; no record that anybody trains on is nearly as long.
MOST_CHARACTERS = 2**25
#: Maximum items of a list that a template builds.
MOST_ITEMS = 2**20
#: Maximum bits of an integer: templates only count turns.
MOST_BITS = 2**12
#: Maximum width to which a template may pad a text.
MOST_WIDTH = 10_000
#: Time limit of one rendering: CPU seconds of this thread, so that a busy machine makes no difference.
MOST_SECONDS = 5.0
#: The clock is read once in this many steps; reading it takes as long as about three steps.
_STEPS_A_LOOK = 16

_DICT_ATTRIBUTES = frozenset(dir(dict))
#: Size of the cache of safe attributes. A template uses a few dozen; the limit is for one that makes up names.
_MOST_ATTRIBUTES = 1000
_NUMBERS = re.compile(r"\d+")
#: The flags, width and precision of a format such as `%-08.3f` or `%(name)5s`.
_WIDTHS = re.compile(r"%(?:\([^)]*\))?([#0\-+ \d.*]*)")
_TEXTS = (str, bytes, Markup)
#: Methods that templates do not need and that can take any amount of memory.
_USELESS = frozenset({"to_bytes", "translate"})
#: Names of our filters: around the iterable of a loop, and around sums of three or more.
_STEPS, _PLUS = "_steps", "_plus"


class Clock:
    """The CPU time of one rendering; `step` raises TemplateError after MOST_SECONDS."""

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
    """Jinja's sandbox with limits, and with a cache of its checks of attributes.

    Half of the time for a long conversation was spent on two checks: whether a dict has an attribute `content`, and
    whether `startswith` of a text is safe. Both depend only on the type.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clock = Clock()
        self._safe: dict[tuple[type, str], bool] = {}
        del self.globals["lipsum"]  # random text of any length
        self.filters |= {
            **{name: _with_small_numbers(self.filters[name]) for name in ("batch", "center", "slice")},
            **{"indent": _indent, "wordwrap": _wordwrap, "replace": _replace, "join": _join, "format": _format},
            **{"round": _round, "sum": _sum, "tojson": _tojson, _STEPS: _steps, _PLUS: _plus},
        }

    def program(self, source: str) -> Program:
        """Compile a template so that its loops check the time limit and its texts the size limit."""
        tree = _Bounds().visit(self.parse(source))
        program = Program.from_code(self, self.compile(tree), self.make_globals(None))
        program.root_render_func.__globals__["str_join"] = _str_join  # compiled code calls this for `~`
        return program

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the texts of a block or macro."""
        texts = list(parts)
        refuse_longer(sum(map(len, texts)))
        return "".join(texts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A shortcut for keys of messages and calls, with the same result as the sandbox.
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
        """A bounded version of a text's method that can make the text longer; None if the method cannot."""
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
        if type(__obj) is BuiltinMethodType:  # such as `strip`: Jinja would pass it no context and not refuse it
            kwargs.pop("_loop_vars", None)  # only macros take these
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
    """Adds our filters where Jinja has no hook: around the iterable of each `for`, and around long sums of texts.

    The length of `a + b + c + d` is then checked once in place of three times: templates consist mostly of such sums.
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
    """The sum of three or more values, whose length is checked once if all are texts."""
    if set(map(type, summands)) == {str}:
        refuse_longer(sum(map(len, summands)))
        return "".join(summands)
    total = summands[0]
    for summand in summands[1:]:
        total = environment.call_binop(None, "+", total, summand)
    return total


@pass_context  # with a context, Jinja does not evaluate the filter at compile time
def _steps(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    step = context.environment.clock.step  # type: ignore[attr-defined]
    for value in values:
        step()
        yield value


class Generation(Extension):
    """`{% generation %}`, which marks an answer for other trainers; its content is rendered unchanged.

    A name that is set inside is not known after the block: transformers makes a macro of it.
    """

    tags = {"generation"}  # noqa: RUF012  # declared as in Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def refuse_longer(length: int) -> None:
    """Raise OverflowError if a text of this length exceeds MOST_CHARACTERS."""
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
    """Check `text % values`: the widths in the format, and an upper bound of the result's length."""
    form = text if isinstance(text, str) else text.decode("latin-1")
    for width in _WIDTHS.findall(form):
        if "*" in width:
            raise OverflowError("it takes a width from a value (%*d)")
        for number in _NUMBERS.findall(width):
            _refuse_wider(int(number[:20]))
    _refuse_filled(form, values.values() if isinstance(values, Mapping) else values, fields=form.count("%"))


def _refuse_filled(form: str, values: Any, *, fields: int) -> None:
    """Check the length of a format string whose fields are all as long as the longest text value."""
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
    """The length of a text after `old` is replaced by `new`, or an upper bound of it."""
    times = text.count(old)
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    return len(text) + times * max(0, len(new) - len(old))


def _joined_by(text: Any, parts: Iterable[Any]) -> Any:
    """`text.join(parts)`; the parts are listed first, as `map` and `select` give iterators."""
    listed = list(islice(parts, MOST_ITEMS + 1))
    _refuse_more(len(listed))
    refuse_longer(_joined(text, listed))
    return text.join(listed)


def _joined(text: str | bytes, parts: list[Any]) -> int:
    """An upper bound of the length of the parts joined by `text`."""
    return len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, str | bytes))


def _filled(text: str | bytes, width: int, *rest: Any) -> int:
    return max(len(text), width)


#: Methods that can make a text longer → a function for the length of the result, or an upper bound.
_SIZES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _filled),
    "expandtabs": lambda text, tabsize=8: len(text) * max(1, tabsize),
    "replace": _replaced,
}


def _str_join(values: Iterable[Any]) -> str:
    return Sandbox.concat(map(str, values))


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with a check that no number among its arguments exceeds MOST_WIDTH."""

    @wraps(function)
    def bounded(value: Any, *arguments: Any, **options: Any) -> Any:
        for argument in (*arguments, *options.values()):
            _refuse_wider(argument)
        return function(value, *arguments, **options)

    return bounded


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's `indent` with limits."""
    _refuse_wider(width)
    indention = width if isinstance(width, str) else " " * width
    lines = f"{s}\n".splitlines()
    refuse_longer(len(s) + len(lines) * (len(indention) + 1))
    rest = [indention + line if line or blank else line for line in lines[1:]]
    return "\n".join([indention + lines[0] if first else lines[0], *rest])


@pass_environment
def _wordwrap(environment: Sandbox, s: str, width: int = 79, *arguments: Any, **options: Any) -> str:
    """Jinja's `wordwrap` with limits."""
    _refuse_wider(width)
    refuse_longer(
        len(s) * max([1, *(len(value) for value in (*arguments, *options.values()) if isinstance(value, str))])
    )
    return do_wordwrap(environment, s, width, *arguments, **options)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's `replace` with limits."""
    text, old, new = str(s), str(old), str(new)
    refuse_longer(_replaced(text, old, new, -1 if count is None else count))
    return text.replace(old, new, -1 if count is None else count)


@pass_environment
def _join(environment: Sandbox, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's `join` with limits."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    texts, between = [str(item) for item in items], str(d)
    refuse_longer(_joined(between, texts))
    return between.join(texts)


def _format(value: Any, *arguments: Any, **options: Any) -> str:
    """Jinja's `format`, which is `text % values`, with limits."""
    if arguments and options:
        raise TypeError("format takes positional or named values, not both")
    form = str(value)
    _refuse_formatted(form, options or arguments)
    return form % (options or arguments)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    """Jinja's `round` with limits."""
    if abs(precision) > 300:  # a float has no more digits
        raise OverflowError(f"it rounds to {precision:,} digits")
    return do_round(value, precision, method)  # type: ignore[arg-type]


@pass_environment
def _sum(environment: Sandbox, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's `sum` of numbers or lists, with limits; Python's sum of lists takes quadratic time."""
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
    """`tojson` as in transformers: Jinja's own escapes HTML characters."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise OverflowError("it indents JSON by more than 64")
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
