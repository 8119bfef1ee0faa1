"""Tool calls: which calls are found in a generated text."""

import pytest

from atomtune.data.records import Turn
from atomtune.evaluate.tool_calls import calls_in, calls_of

CALL = '{"name": "weather", "arguments": {"city": "北京"}}'


@pytest.mark.parametrize(
    ("text", "parsed", "known"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", 1, 1),  # Qwen, Hermes
        (f"[TOOL_CALLS] [{CALL}]", 1, 1),  # Mistral
        ('{"name": "weather", "parameters": {"city": "x"}}', 1, 1),  # Llama 3.1
        (f"{CALL}\n{CALL}", 2, 2),
        ('{"name": "stocks", "arguments": {}}', 1, 0),  # a tool that the record does not offer
        ('{"name": "weather", "arguments": {"city": "x"', 0, 0),  # cut off
        ('{"city": "x"}', 0, 0),  # an object that is no call
        ('{"name": "weather"}', 0, 0),  # a name alone is none either
        ("It is sunny {today}.", 0, 0),
        ("<tool_call>\n<function=weather>\n<parameter=city>\n北京\n</parameter>\n</function>\n</tool_call>", 1, 1),
        ("<function=weather></function>\n<function=stocks>\n<parameter=x>", 1, 1),  # the second is cut off
        ("<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call>", 1, 1),
        ("<tool_call>stocks</tool_call>", 1, 0),
        ('<|tool_call>call:weather{city:<|"|>北京<|"|>}<tool_call|>', 1, 1),
        ('<m:invoke name="weather">\n<m:parameter name="city">北京</m:parameter>\n</m:invoke>', 1, 1),
        ('<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "x"}\n```<｜tool▁call▁end｜>', 1, 1),
        ('<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "x"}<｜tool▁call▁end｜>', 1, 1),
        ('<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "x', 0, 0),
        ('[TOOL_CALLS]weather[ARGS]{"city": "x"}', 1, 1),
        ('<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "x"}<|tool_call_end|>', 1, 1),
        ("<|tool_call_start|>[weather(city='x'), stocks()]<|tool_call_end|>", 2, 1),
        ("<|tool_call_start|>[weather(city=]<|tool_call_end|>", 0, 0),
        ("", 0, 0),
    ],
)
def test_tool_calls_are_found_in_every_known_format(text, parsed, known):
    found = calls_in(text, {"weather"})
    assert (found.parsed, found.known) == (parsed, known)


def test_a_call_within_arguments_is_not_counted():
    nested = '{"name": "weather", "arguments": {"inner": {"name": "weather", "arguments": {}}}}'
    assert calls_in(nested, {"weather"}).parsed == 1


@pytest.mark.parametrize(
    ("name", "arguments", "parsed", "known"),
    [("add", {"x": 3}, 1, 1), ("subtract", {}, 1, 0), ("add", '{"x": 3', 0, 0)],
)
def test_a_call_whose_tool_is_named_in_the_header_is_counted(name, arguments, parsed, known):
    """gpt-oss writes `assistant to=functions.add<|channel|>commentary<|message|>{"x": 3}<|call|>`."""
    turn = Turn("assistant", "", calls=({"name": name, "arguments": arguments},))
    found = calls_of(' to=functions.add<|channel|>commentary<|message|>{"x": 3}', turn, {"add"})
    assert (found.parsed, found.known) == (parsed, known)
