"""Choices: the closed lists of names, and limits, that flags, help, pages and code share."""

from typing import Literal, get_args

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "int8"]
#: How the values of a file are written.
FormatName = Literal["alpaca", "sharegpt", "messages", "prompt", "text"]
FormatChoice = Literal["auto", "alpaca", "sharegpt", "messages", "prompt", "text"]
#: What becomes of a record that is longer than max_seq_length.
Overlength = Literal["shorten", "skip", "error"]
#: Tokens; --max_seq_length takes no fewer, and no base may bear fewer.
SHORTEST_RECORD = 8
#: Above the width of nearly every layer, where a higher rank can learn nothing more; checked in adapter files too.
LARGEST_RANK = 2**16
#: A difference of losses below this share is taken for noise.
NOISE = 0.02
#: What a run writes about itself, in its output folder.
RUN_RECORD = "run.json"
#: In the run.json that `export --to peft` copies: the class that the copied adapter is for. The copy is no run.
EXPORTED_FOR = "exported_for"
#: What a tokenizer and its chat template lie in, beside a model or an adapter: patterns of names.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
#: Which answers of a conversation are learned.
Learn = Literal["all", "last"]
#: How a batch is laid out: one record a row, end to end, or shared beginnings once.
Layout = Literal["padded", "packed", "tree"]
LayoutChoice = Literal["auto", "tree", "packed", "padded"]

#: What --metric_for_best_model may name, with or without `eval_` before it; lower is better for both.
METRICS = ("loss", "perplexity")
ExportTarget = Literal["gguf", "peft"]
#: Number formats of a GGUF that the converter writes itself.
GgufFormat = Literal["bf16", "f16", "q8_0", "f32"]
#: The programs that serve a model.
EngineName = Literal["transformers", "vllm", "llama.cpp", "in-process"]
#: Those that `serve` starts; auto: vllm on a GPU where it is installed, llama.cpp for a GGUF, else transformers.
ServeEngine = Literal["auto", "transformers", "vllm", "llama.cpp"]

#: What the base is called beside adapters that have names.
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

#: Names that named no generation → the template they always meant.
RENAMED_TEMPLATES = {"qwen": "qwen3"}
#: Names of several formats → those to choose from, each with the models that speak it.
SPLIT_TEMPLATES = {
    "mistral": "mistral-v1 (7B v0.1 and v0.2, Mixtral 8x7B), mistral-v3 (7B v0.3) or mistral-tekken (Nemo, Ministral)"
}

#: The checks of `atomtune inspect`, as --fail_on names them; what each counts: inspect/checks.py.
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
