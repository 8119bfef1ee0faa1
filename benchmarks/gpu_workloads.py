"""What the GPU's contenders train on: records of known lengths, a tokenizer for them, and shapes of real models.

style  one instruction of some 220 tokens before every record, 20 to 100 tokens of its own
short  25 to 95 tokens a record, nothing shared
long   about 3,000 tokens a record
rows   4,096 tokens a record
The words are made up, so that a token is a word and two records share what they should and nothing else.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Qwen2 shapes: hidden, intermediate, layers, heads, heads of keys, vocabulary.
SHAPES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152_064),
    "tiny": (64, 176, 2, 4, 2, 8_000),
}
#: Tokens that a record may have, and records of each file: warm-up, measured and profiled steps at the largest batch.
LENGTHS = {"style": 512, "short": 256, "long": 4_096, "rows": 4_096}
RECORDS = {"style": 1_600, "short": 1_600, "long": 96, "rows": 48}
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


def write_all(folder: Path, *, dry_run: bool) -> None:
    """Every workload as a file of the folder."""
    for workload, count in RECORDS.items():
        records = records_of(workload, 16, share=0.2) if dry_run else records_of(workload, count)
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{workload}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_base(folder: Path, shape: str) -> Path:
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
    config_of(shape).save_pretrained(folder)
    return folder


def config_of(shape: str) -> Any:
    from transformers import Qwen2Config

    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[shape]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
