"""Choices: every closed list of names, written once for flags, help, pages and code."""

from typing import Literal, get_args

Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "int8"]
#: How the values of a file are written.
FormatName = Literal["alpaca", "sharegpt", "messages", "prompt", "text"]
FormatChoice = Literal["auto", "alpaca", "sharegpt", "messages", "prompt", "text"]
#: What becomes of a record that is longer than max_seq_length.
Overlength = Literal["shorten", "skip", "error"]
#: Which answers of a conversation are learned.
Learn = Literal["all", "last"]
#: How a batch is laid out: one record a row, end to end, or shared beginnings once.
Layout = Literal["padded", "packed", "tree"]
LayoutChoice = Literal["auto", "tree", "packed", "padded"]

#: What --metric_for_best_model may name, with or without `eval_` before it; lower is better for both.
METRICS = ("loss", "perplexity")
#: The programs that serve a model.
EngineName = Literal["transformers", "llama.cpp", "in-process"]

#: The built-in chat templates, data/templates/NAME.jinja.
TEMPLATES = (
    "atom",
    "atom-official",
    "chatml",
    "llama3",
    "mistral",
    "gemma",
    "qwen",
    "alpaca",
    "vicuna",
    "plain",
)

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
