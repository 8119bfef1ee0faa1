"""Choices: closed lists of names, and limits, that flags, help, pages and code share."""

from typing import Literal, get_args

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "int8"]
#: Formats of records in a file.
FormatName = Literal["alpaca", "sharegpt", "messages", "prompt", "text"]
FormatChoice = Literal["auto", "alpaca", "sharegpt", "messages", "prompt", "text"]
#: What happens to a record that is longer than max_seq_length.
Overlength = Literal["shorten", "skip", "error"]
#: Smallest --max_seq_length in tokens, and the fewest positions that a base must have.
SHORTEST_RECORD = 8
#: Largest rank. It is above the width of nearly all layers, and no rank above the width can learn more.
LARGEST_RANK = 2**16
#: Records in a batch, for commands that compute batches as a run would, if the user names no number.
USUAL_BATCH = 16
#: A relative difference of losses below this counts as noise.
NOISE = 0.02
#: The record that a run writes in its output folder.
RUN_RECORD = "run.json"
#: Config files of a model, of what it generates by default, and of an adapter.
MODEL_CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
#: In the run.json that `export --to peft` copies: the class that the copied adapter is for. The copy is no run.
EXPORTED_FOR = "exported_for"
#: Patterns of the files of a tokenizer and its chat template, beside a model or an adapter.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
#: Which answers of a conversation are learned.
Learn = Literal["all", "last"]
#: How a batch is laid out: one record per row, records end to end, or shared beginnings computed once.
Layout = Literal["padded", "packed", "tree"]
LayoutChoice = Literal["auto", "tree", "packed", "padded"]

#: Valid values of --metric_for_best_model, with or without the prefix `eval_`; lower is better for both.
METRICS = ("loss", "perplexity")
ExportTarget = Literal["gguf", "peft"]
#: Number formats of a GGUF that the converter can write.
GgufFormat = Literal["bf16", "f16", "q8_0", "f32"]
#: Programs that serve a model.
EngineName = Literal["transformers", "vllm", "llama.cpp", "in-process"]
#: Programs that `serve` can start; auto: vllm on a GPU if it is installed, llama.cpp for a GGUF, else transformers.
ServeEngine = Literal["auto", "transformers", "vllm", "llama.cpp"]

#: The name of the base beside named adapters.
BASE = "base"

#: The built-in chat templates, data/templates/NAME.jinja.
TEMPLATES = (
    "atom",
    "atom-official",
    "chatml",
    "llama3",
    "llama3.1",
    "mistral-v1",
    "mistral-v3",
    "mistral-tekken",
    "gemma",
    "qwen2.5",
    "qwen3",
    "alpaca",
    "vicuna",
    "plain",
)

#: Old names without a generation → the template they always meant.
RENAMED_TEMPLATES = {"qwen": "qwen3"}
#: Names that several formats have → the templates to choose from, with their models.
SPLIT_TEMPLATES = {
    "mistral": "mistral-v1 (7B v0.1 and v0.2, Mixtral 8x7B), mistral-v3 (7B v0.3) or mistral-tekken (Nemo, Ministral)"
}

#: The checks of `atomtune inspect`, as named in --fail_on; what each counts: inspect/checks.py.
Check = Literal[
    "refused",
    "cut",
    "duplicates",
    "near_duplicates",
    "conflicts",
    "control",
    "blank",
    "one_token",
    "no_stop",
    "unknown",
]
CHECKS: tuple[Check, ...] = get_args(Check)
