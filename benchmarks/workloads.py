"""Workloads: the model and the data files that all contenders train on.

Four workloads are made from one file of single-turn dialogues (instruction/input/output JSONL):
short  the dialogues as they are
style  one long style instruction before every question, as in the tutorial; the question is the `input`
tasks  ten instructions of about 100 to 400 tokens, each a sentence and eight worked examples; some are more frequent
turns  conversations of three turns that branch from common openings
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("short", "style", "tasks", "turns")
DEMO = Path(__file__).parents[1] / "src" / "atomtune" / "demo"
PERSONA = DEMO / "persona.jsonl"

_STYLE = (
    "请模仿下面案例中人物的说话风格和语气来回答用户的问题。要求：口语化，古雅含蓄，不说现代词语；"
    "每次回答不超过三十个字，能短则短；不解释，不列条目，不重复用户的话。\n案例：\n"
)
_TASKS = (
    "按照例子的口吻回答。",
    "你是一位说书人，请接着下面的话往下说一句，语气与例子相同。",
    "下面是两个人的对话，请写出第二个人的回答，只写一句。",
    "请把用户的话当作晚辈的请安来回应，例子如下。",
    "请以主人的身份回答客人，例子如下，不要超过四十个字。",
    "阅读例子，学习其中的用词，然后用同样的用词回答。",
    "请用委婉的方式回答，宁可少说，不可说破。",
    "请回答得像一封短信的结尾，例子如下。",
    "你在扮演一位宫中女子，请按例子的分寸说话。",
    "请先体会例子里的情绪，再用一句话回答。",
)


def read(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` records of the source file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def records(name: str, source: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The workload's records, one per source record; the same on every machine."""
    question = [record["instruction"] + record["input"] for record in source]
    answer = [record["output"] for record in source]
    for i, record in enumerate(source):
        if name == "short":
            yield record
        elif name == "style":
            yield {"instruction": _STYLE + _shots(question, answer, 0, 6), "input": question[i], "output": answer[i]}
        elif name == "tasks":
            task = _task(i)
            yield {
                "instruction": f"{_TASKS[task]}\n{_shots(question, answer, 40 * task, 8, longest=20 + 4 * task)}",
                "input": question[i],
                "output": answer[i],
            }
        else:
            # A conversation tree: 8 openings with 4 second turns each. The records are its leaves.
            branch = int((i * 0.6180339887) % 1 * 32)
            history = [[question[k % len(source)], answer[k % len(source)]] for k in (branch % 8, 100 + branch)]
            yield {"instruction": question[i], "input": "", "output": answer[i], "history": history}


def _shots(question: list[str], answer: list[str], start: int, count: int, *, longest: int = 1_000) -> str:
    """The first `count` worked examples of at most `longest` characters, counted from record `start`."""
    pairs = [(q, a) for q, a in zip(question[start:], answer[start:], strict=True) if len(q) + len(a) <= longest]
    return "".join(f"问：{q}\n答：{a}\n" for q, a in pairs[:count])


def _task(i: int) -> int:
    """The task of record i. Task k gets a share proportional to 1/(k+1), spread by a golden-ratio sequence."""
    shares = [1 / (k + 1) for k in range(len(_TASKS))]
    point = (i * 0.6180339887) % 1 * sum(shares)
    for k, share in enumerate(shares):
        point -= share
        if point < 0:
            return k
    return len(shares) - 1


def write(name: str, source: list[dict[str, str]], path: Path) -> Path:
    """Write a workload as JSONL."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records(name, source))
    path.write_text("".join(lines), encoding="utf-8")
    return path


class Shape(NamedTuple):
    """The sizes of a Llama. Layers of a Qwen3 or a SmolLM2 compute products of the same shapes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head: int
    words: int
    tied: bool = False


SHAPES = {
    "toy": Shape(64, 176, 2, 8, 8, 8, 8_000),
    "small": Shape(512, 1376, 8, 8, 8, 64, 8_000),
    "135m": Shape(576, 1536, 30, 9, 3, 64, 49_152, tied=True),  # SmolLM2-135M
    "0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151_936, tied=True),  # Qwen3-0.6B
    "1.5b": Shape(1536, 8960, 28, 12, 2, 128, 151_936, tied=True),  # Qwen2.5-1.5B
    "atom-7b": Shape(4096, 11008, 32, 32, 32, 128, 65_000),
}
_SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
#: Small models with other layers than attention and a dense network: model type → values of its config.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_SMALL,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 384,
    },
    "qwen3_5_text": {
        **_SMALL,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "layer_types": [*3 * ["linear_attention"], "full_attention"],
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    },
    "lfm2": {
        **_SMALL,
        "num_hidden_layers": 6,
        "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
}
#: Models with at least this many words are saved in bfloat16, the dtype in which such models are published.
_PUBLISHED = 40_000
#: Vocabulary of a tokenizer that is trained on the data.
_WORDS = 8_000


def build_base(folder: Path, source: list[dict[str, str]], shape: str = "small") -> Path:
    """Save a model with random weights and a tokenizer trained on the data.

    shape  a key of SHAPES (a Llama like Atom) or of KINDS
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    sizes = SHAPES.get(shape)
    trained_tokenizer(text for record in source for text in record.values()).save_pretrained(folder)
    torch.manual_seed(0)
    if sizes is None:
        special = {"vocab_size": _WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(shape, **KINDS[shape], **special, max_position_embeddings=2048)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return folder
    config = LlamaConfig(
        vocab_size=sizes.words,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head,
        tie_word_embeddings=sizes.tied,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16 if sizes.words > _PUBLISHED else torch.float32,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of at most _WORDS tokens, trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
