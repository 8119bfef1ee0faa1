"""The GPU's benchmark: Atom-7B's shape, bfloat16, the same workloads, against Trainer + PEFT and TRL packed with Liger.

    python -m benchmarks.gpu --source dialogues.jsonl

Weights are random, made on the device. Without a GPU only `--toy` is of use: it shows that everything runs.
"""

import importlib.util

import torch

from benchmarks.__main__ import arguments, bench
from benchmarks.contender import GPU_CONTENDERS


def at_hand() -> dict[str, str]:
    """The contenders this machine can run: Liger's kernels need a GPU and its package."""
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    return {name: what for name, what in GPU_CONTENDERS.items() if liger or "liger" not in name}


if __name__ == "__main__":
    asked = arguments(__doc__, at_hand(), records=1024, out="runs/bench-gpu").parse_args()
    if not (asked.toy or torch.cuda.is_available()):
        raise SystemExit("There is no GPU here, and 7 billion weights do not train on a CPU in your lifetime: --toy.")
    bench(asked, "atom-7b")
