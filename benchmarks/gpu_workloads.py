"""Workloads for the GPU: records of known lengths, a tokenizer for them, and models with the shapes of real ones.

style  the same instruction of about 220 tokens in every record, and 20 to 100 tokens of the record's own
short  25 to 95 tokens per record, nothing shared
long   about 3,000 tokens per record
rows   4,096 tokens per record

All words are made up: a word is a token, and two records share exactly the tokens that they should. The bases get
random weights, created on the device; no weights are read from files.
"""

import gc
import importlib.util
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from atomtune.data.records import Example
from benchmarks import workloads
from benchmarks.contender import examples_in

#: Qwen2 shapes: hidden, intermediate, layers, heads, key heads, vocabulary, and whether the output matrix is tied.
SHAPES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152_064, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "tiny": (64, 176, 2, 4, 2, 8_000, False),
}
#: Shapes with other layers than attention and a dense network: model type, and the values of its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # The size of Qwen3.5-2B: three layers of linear attention per layer of full attention; 1.7 billion weights.
    "qwen3.5": (
        "qwen3_5_text",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "layer_types": [*3 * ["linear_attention"], "full_attention"] * 6,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
        },
    ),
    # Qwen3-30B-A3B with 8 of its 48 layers; 5.5 billion weights.
    "qwen3-moe": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
}
#: Most tokens of a record, and records per file: enough for all steps with the largest batch.
LENGTHS = {"style": 512, "short": 256, "long": 4_096, "rows": 4_096}
RECORDS = {"style": 4_800, "short": 4_800, "long": 96, "rows": 48}
#: A dry run has this many records, with this share of the tokens.
DRY_RECORDS, DRY_SHARE = 16, 0.2
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16"}
_SYLLABLES = [f"{consonant}{vowel}" for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def words() -> list[str]:
    """2,000 made-up words, the same on every machine."""
    every = [first + second + third for first in _SYLLABLES for second in _SYLLABLES for third in _SYLLABLES[:4]]
    return random.Random(1).sample(every, 2_000)


def records_of(workload: str, count: int, *, share: float = 1.0) -> list[dict[str, str]]:
    """The records of a workload, the same on every machine.

    share  makes the texts shorter by this factor, for a dry run
    """
    draw, vocabulary = random.Random(0), words()

    def text(number: int) -> str:
        return " ".join(draw.choices(vocabulary, k=max(1, int(share * number))))

    style = text(220)
    shapes: dict[str, Callable[[], dict[str, str]]] = {
        "style": lambda: {
            "instruction": style,
            "input": text(draw.randint(5, 30)),
            "output": text(draw.randint(10, 60)),
        },
        "short": lambda: {"instruction": text(draw.randint(10, 40)), "input": "", "output": text(draw.randint(10, 40))},
        "long": lambda: {"instruction": text(1_500), "input": "", "output": text(draw.randint(700, 2_300))},
        "rows": lambda: {"instruction": text(1_500), "input": "", "output": text(2_580)},
    }
    return [shapes[workload]() for _ in range(count)]


def write_all(folder: Path, names: Iterable[str], *, dry_run: bool) -> None:
    """Write each of these workloads to a file in the folder."""
    for workload in names:
        shape = {"count": DRY_RECORDS, "share": DRY_SHARE} if dry_run else {"count": RECORDS[workload]}
        records = records_of(workload, **shape)
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{workload}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_base(folder: Path, shape: str, *, small: bool = False) -> None:
    """Write config.json and a tokenizer, but no weights."""
    texts = [" " + word for word in words()] * 2 + ["Human: \n", "Assistant: \n"] * 4
    workloads.trained_tokenizer(texts).save_pretrained(folder)
    config_of(shape, small=small).save_pretrained(folder)


def config_of(shape: str, *, layers: int | None = None, small: bool = False) -> Any:
    """The config of a shape from SHAPES or KINDS.

    layers  number of layers, for KINDS only
    small   use the small sizes of the CPU benchmarks, for KINDS only
    """
    from transformers import AutoConfig, Qwen2Config

    if shape in KINDS:
        kind, values = KINDS[shape]
        values = dict(workloads.KINDS[kind] if small else values)
        if layers is not None:
            values["num_hidden_layers"] = layers
            values |= {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
        return AutoConfig.for_model(kind, **values, **_SPECIAL, vocab_size=8_000 if small else 151_936)
    hidden, inner, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
        **_SPECIAL,
    )


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda", 0) if has_gpu() else torch.device("cpu")


def random_model(base: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A base with random weights, created on its device; every call gives the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype)


def take_kernels_untuned() -> None:
    """From now on in this process, flash-linear-attention uses one configuration per kernel, without tuning.

    Tuning would compile and time up to 24 configurations for each of a dozen kernels, which takes minutes.
    """
    if not (has_gpu() and importlib.util.find_spec("fla")):
        return
    import fla.ops.gated_delta_rule  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for tuner in [thing for thing in gc.get_objects() if isinstance(thing, Autotuner)]:
        tuner.configs = [min(tuner.configs, key=lambda form: (abs(form.num_warps - 4), abs(form.num_stages - 2)))]


def load_random_weights() -> None:
    """From now on in this process, AutoModelForCausalLM.from_pretrained returns a model with random weights."""
    import transformers

    def from_pretrained(path: str, *_: Any, **keywords: Any) -> Any:
        model = random_model(Path(path), keywords.get("dtype", torch.bfloat16))
        if keywords.get("output_loading_info"):
            return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return model

    transformers.AutoModelForCausalLM.from_pretrained = staticmethod(from_pretrained)


def encoded(base: Path, data: Path) -> list[Example]:
    """Every record as an atomtune Example, the same for all contenders."""
    return examples_in(base, data, template="atom", max_tokens=LENGTHS[data.stem], learn="last")
