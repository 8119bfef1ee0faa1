"""Laws of arrays: any window size gives the same values as json.loads on the whole, each with its own line."""

import codecs
import io
import json
import random
import re

import pytest

from atomtune.data.reading import json_array
from atomtune.data.reading.json_array import read_array
from atomtune.errors import BadData

VALUES = [
    12345,
    -1.5e10,
    1e20,
    3e-7,
    '长\\"\n🙂' * 5,
    {"a": [1, {"b": None}], "长": "x" * 40},
    [],
    True,
    "",
    {"u": "\ud83d"},
]


def laid_out(seed: int) -> tuple[str, list[int]]:
    """The values as an array with random white space, and the line where each begins, counted while writing."""
    draw = random.Random(seed)
    text, lines = "", []

    def space() -> str:
        return "".join(draw.choices([" ", "\n", "\r\n", "\t"], k=draw.randrange(4)))

    text += space() + "["
    for n, value in enumerate(VALUES):
        text += ("," if n else "") + space()
        lines.append(text.count("\n") + 1)
        text += json.dumps(value, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5 or n == 9) + space()
    return text + "]" + space(), lines


@pytest.mark.parametrize("window", [1, 2, 3, 5, 13, 64, 24, 1 << 20])
def test_the_window_size_changes_neither_values_nor_line_numbers(monkeypatch, window):
    # Catches numbers, escapes and characters cut in two, and lines lost when the window moves.
    monkeypatch.setattr(json_array, "WINDOW_BYTES", window)
    for seed in range(20):
        text, lines = laid_out(seed)
        content = (codecs.BOM_UTF8 if seed % 2 else b"") + text.encode()
        found = list(read_array(io.BytesIO(content), "a.json"))
        assert [one.value for one in found] == json.loads(text)
        assert [int(re.match(r"a\.json:(\d+)", one.origin).group(1)) for one in found] == lines
        assert len({one.origin for one in found}) == len(found)


def test_values_on_the_same_line_are_named_by_their_number():
    found = read_array(io.BytesIO(b"[1, 2,\n 3, 4]"), "a.json")
    assert [one.origin for one in found] == ["a.json:1", "a.json:1 value 2", "a.json:2", "a.json:2 value 4"]


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b'[\n{"a": 1},\n{"b": tru }]', 3, "a value is expected here"),
        (b'[\n{"a": 1},\n{"b": 1', 3, "a comma or a closing bracket is expected here"),
        (b'[\n{"a": 1},\n"never closed', 3, "no closing quote"),
        (b'[\n{"a": 1}\n\n{"b": 1}]', 4, "expected a comma"),
        (b'[\n{"a": 1},\n"caf\xe9"]', 3, "not UTF-8 at byte 17"),
        (b'[\n{"a": 1},\n"\xe4\xbd', 3, "not UTF-8 at byte 14"),
        (b'[\n"\xe4\xbd\xa0",\n"\xc4\xe3\xba\xc3",\n"\xe4\xbd\xa0"]', 3, "not UTF-8 at byte 11; it may be GBK"),
        (b'[\n{"a": NaN}]', 2, "NaN is not a JSON value"),
        (b'[\n{"a": -1e999}]', 2, "-1e999 is beyond the numbers that can be read"),
        (b"[\n1]\n\n{}", 2, "text after the end"),
        (b"[1]\n\n[2]", 3, "a second JSON array; expected one array of records"),
    ],
)
def test_a_syntax_error_is_reported_with_its_line_at_any_window_size(monkeypatch, content, line, said, window):
    monkeypatch.setattr(json_array, "WINDOW_BYTES", window)
    with pytest.raises(BadData, match=rf"a\.json:{line}(: |  ).*{said}"):
        list(read_array(io.BytesIO(content), "a.json"))


@pytest.mark.parametrize("window", range(1, 20))
def test_a_literal_is_read_whole_wherever_the_window_ends(monkeypatch, window):
    monkeypatch.setattr(json_array, "WINDOW_BYTES", window)
    with pytest.raises(BadData, match="-Infinity is not a JSON value"):
        list(read_array(io.BytesIO(b"[1, -Infinity]"), "a.json"))


def test_a_value_beyond_the_size_limit_is_refused_without_reading_it_whole(monkeypatch):
    monkeypatch.setattr(json_array, "WINDOW_BYTES", 64)
    monkeypatch.setattr(json_array, "LONGEST_LINE", 1000)
    stream = io.BytesIO(b'[\n1,\n"' + b"x" * 100_000 + b'"]')
    with pytest.raises(BadData, match=r"a\.json:3: .*more than"):
        list(read_array(stream, "a.json"))
    assert stream.tell() < 5000


def test_many_values_after_a_long_one_do_not_count_as_one_value(monkeypatch):
    monkeypatch.setattr(json_array, "WINDOW_BYTES", 64)
    monkeypatch.setattr(json_array, "LONGEST_LINE", 1000)
    values = ["x" * 900, *["y"] * 500]
    assert [one.value for one in read_array(io.BytesIO(json.dumps(values).encode()), "a.json")] == values


def test_a_long_value_is_read_in_few_steps(monkeypatch):
    # It is parsed again after each step.
    monkeypatch.setattr(json_array, "WINDOW_BYTES", 64)
    sizes: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    (found,) = read_array(Counted(json.dumps(["x" * 100_000]).encode()), "a.json")
    assert len(found.value) == 100_000
    assert len(sizes) < 20


def test_an_early_syntax_error_is_reported_before_the_rest_is_read():
    # The rest of the file cannot repair it, and 16 MiB would be read for nothing.
    stream = io.BytesIO(b'[{"a": b},' + b"1," * 3_000_000 + b"1]")
    with pytest.raises(BadData, match="a value is expected here"):
        list(read_array(stream, "a.json"))
    assert stream.tell() <= 1 << 20
