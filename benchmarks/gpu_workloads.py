"""What the GPU's contenders train on: records of known lengths, a tokenizer for them, and shapes of real models.

style  one instruction of some 220 tokens before every record, 20 to 100 tokens of its own
short  25 to 95 tokens a record, nothing shared
long   about 3,000 tokens a record
rows   4,096 tokens a record
The words are made up, so that a token is a word and two records share what they should and nothing else.
Bases have random weights, made on the device: no file of weights is read.
"""

import gc
import importlib.util
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads

#: Qwen2 shapes: hidden, intermediate, layers, heads, heads of keys, vocabulary, and whether the output matrix is tied.
SHAPES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152_064, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "tiny": (64, 176, 2, 4, 2, 8_000, False),
}
#: Shapes whose layers are more than attention and a dense network: model type, and the values of its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Of the size of a Qwen3.5-2B: three layers of linear attention to one of full attention; 1.7 billion weights.
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
    # A Qwen3-30B-A3B with 8 of its 48 layers; 5.5 billion weights.
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
#: Tokens that a record may have, and records of each file: warm-up, measured and profiled steps at the largest batch.
LENGTHS = {"style": 512, "short": 256, "long": 4_096, "rows": 4_096}
RECORDS = {"style": 4_800, "short": 4_800, "long": 96, "rows": 48}
#: What the first epoch holds in a dry run, at so small a part of their length.
DRY_RECORDS, DRY_SHARE = 16, 0.2
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16"}
_SYLLABLES = [f"{consonant}{vowel}" for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def words() -> list[str]:
    """2,000 made-up words."""
    every = [first + second + third for first in _SYLLABLES for second in _SYLLABLES for third in _SYLLABLES[:4]]
    return random.Random(1).sample(every, 2_000)


def records_of(workload: str, count: int, *, share: float = 1.0) -> list[dict[str, str]]:
    """The records of a workload, the same on every machine; of a share of their length for a dry run."""
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
    """Each of these workloads as a file of the folder."""
    for workload in names:
        shape = {"count": DRY_RECORDS, "share": DRY_SHARE} if dry_run else {"count": RECORDS[workload]}
        records = records_of(workload, **shape)
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{workload}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_base(folder: Path, shape: str, *, small: bool = False) -> Path:
    """config.json and a tokenizer; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" " + word for word in words()] * 2 + ["Human: \n", "Assistant: \n"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config_of(shape, small=small).save_pretrained(folder)
    return folder


def config_of(shape: str, *, layers: int | None = None, small: bool = False) -> Any:
    """A config of SHAPES or KINDS; of these with so many layers, or in the small sizes of the benchmarks on a CPU."""
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
    """A base of random weights, made where it computes; the same weights at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype)


def take_kernels_untuned() -> None:
    """From here on in this process, flash-linear-attention takes one form of each kernel.

    It would compile and time up to 24 forms of each of a dozen kernels first, which takes minutes.
    """
    if not (has_gpu() and importlib.util.find_spec("fla")):
        return
    import fla.ops.gated_delta_rule  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for tuner in [thing for thing in gc.get_objects() if isinstance(thing, Autotuner)]:
        tuner.configs = [min(tuner.configs, key=lambda form: (abs(form.num_warps - 4), abs(form.num_stages - 2)))]


def load_random_weights() -> None:
    """From here on in this process, whatever loads a causal base from a folder gets random weights."""
    import transformers

    def from_pretrained(path: str, *_: Any, **keywords: Any) -> Any:
        model = random_model(Path(path), keywords.get("dtype", torch.bfloat16))
        if keywords.get("output_loading_info"):
            return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return model

    transformers.AutoModelForCausalLM.from_pretrained = staticmethod(from_pretrained)


def encoded(base: Path, data: Path) -> list[Any]:
    """Every record as atomtune's Example, for all contenders alike."""
    from atomtune.data.cache import Rules, as_examples, examples_of
    from atomtune.data.encoding.choose_template import load_template
    from atomtune.model.load import load_tokenizer

    template = load_template("atom", load_tokenizer(str(base)))
    rules = Rules(max_tokens=LENGTHS[data.stem], learn="last")
    stored = examples_of(data, template, rules, cache_dir=data.parent / "store").examples
    return [example for row in stored for example in as_examples(row)]
