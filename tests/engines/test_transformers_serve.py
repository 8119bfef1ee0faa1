"""transformers' own server with a tiny Qwen3, whose thoughts and calls it removes from the answer's text."""

import json

import pytest

from atomtune.cli import main
from tests.serve.test_command import Served
from tests.trained import WEATHER, calling_by_heart

pytestmark = pytest.mark.slow
pytest.importorskip("uvicorn", reason="needs the extra serve")


@pytest.fixture(scope="module")
def calling(models, tmp_path_factory):
    return calling_by_heart(models("qwen3"), tmp_path_factory.mktemp("calling"))


def test_certify_compares_thinking_and_tool_calls_as_the_model_wrote_them(calling, tmp_path):
    """No certificate of a Qwen3 that thinks or calls tools held, so `serve` did not start."""
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter_path", str(calling), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    words = ["certify", "--adapter_path", str(calling), "--prompts", "2", "--dtype", "float32"]
    for served in ([], ["--served", str(merged)]):
        assert main([*words, *served, "--max_new_tokens", "80"]) == 0
    for folder in (calling, merged):
        (entry,) = json.loads((folder / "certificate.json").read_text())
        assert entry["greedy_equal"] == entry["stops"] == 2
        assert "response_template" not in (folder / "tokenizer_config.json").read_text(), "the folder is as it was"


def test_a_client_receives_the_tool_call_and_the_reasoning(calling):
    with Served("--adapter_path", str(calling), "--prompts", "2") as served:

        def ask(text, **more):
            messages = [{"role": "user", "content": text}]
            asked = {"model": calling.name, "messages": messages, "temperature": 0, "max_tokens": 80, **more}
            return served.client().chat.completions.create(**asked).choices[0].message

        (call,) = ask("今天天气怎么样？", tools=[WEATHER]).tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x"})
        answer = ask("你是谁？")
        assert (answer.reasoning_content.strip(), answer.content.strip()) == ("想一想", "看守人。")
