"""Which base fits which card, and how long does a run take there? From `atomtune plan`, for shapes of published models.

    python -m benchmarks.machines

These are estimates from shapes; no model is loaded. A step computes 2,048 tokens (a batch of 16 short dialogues, or one
long record), with LoRA of rank 8 on all linear layers in bfloat16; activations are recomputed if the card needs it.
Minutes are for 3 epochs of 1,000 dialogues of 100 tokens, recomputed, on a GPU with 100 TFLOP/s in bfloat16.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from atomtune.model.adapter import LoraSpec
from atomtune.plan.command import CARDS
from atomtune.plan.estimate import CUDA_CONTEXT, StepSpec, fits_on_gpu, step_memory
from atomtune.plan.model_size import ModelSize, measure

TOKENS = 2048
#: Forward, backward through frozen weights, and forward again: 6 operations per weight and token.
RUN_TOKENS, FLOP_A_TOKEN = 1000 * 100 * 3, 6
#: Share of the GPU's peak that a run reaches: on an H100 0.44 of 989 TFLOP/s (README.md, "On a GPU", long 1).
REACHED, PEAK = 0.4, 100e12


def shape(model_type: str, architecture: str, hidden: int, inner: int, layers: int, **more: Any) -> dict[str, Any]:
    """A config.json with the values that decide the memory."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        **more,
    }


def llama(  # noqa: PLR0917  # in the order of a config
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int, **more: Any
) -> dict[str, Any]:
    heads_and_words = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": words}
    return shape("llama", "LlamaForCausalLM", hidden, inner, layers, **heads_and_words, **more)


def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    heads_and_words = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    return shape("qwen3", "Qwen3ForCausalLM", hidden, inner, layers, **heads_and_words, tie_word_embeddings=tied)


SHAPES = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Atom-7B": llama(4096, 11008, 32, 32, 32, 65000),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
}


def needs(size: ModelSize, *, quantize: Any, recomputed: float) -> tuple[float, int | None]:
    """(GB of a step, the smallest card that holds it or None)."""
    step = StepSpec(tokens=TOKENS, element_bytes=2, quantize=quantize, dropout=True, libraries=CUDA_CONTEXT)
    memory = step_memory(size, step, recomputed=recomputed)
    cards = (card for card in CARDS if fits_on_gpu(memory, card))
    return memory.peak / 1e9, next(cards, None)


def row(name: str, config: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        size = measure(folder, LoraSpec(rank=8, alpha=32, dropout=0.1, targets=["all-linear"]))
    cells = [name, f"{size.weights / 1e9:.2f}"]
    for quantize, recomputed in ((None, False), (None, True), ("nf4", True)):
        gigabytes, card = needs(size, quantize=quantize, recomputed=recomputed)
        cells.append(f"{gigabytes:.1f} ({card} GB)" if card else f"{gigabytes:.1f} (none)")
    cells.append(f"{FLOP_A_TOKEN * size.weights * RUN_TOKENS / (REACHED * PEAK) / 60:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print("| base | parameters, 10⁹ | activations kept | recomputed | recomputed, `--quantize nf4` | minutes |")
    print("|---|---|---|---|---|---|")
    for name, config in SHAPES.items():
        print(row(name, config), flush=True)


if __name__ == "__main__":
    main()
