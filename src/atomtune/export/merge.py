"""Export: base + adapter as one plain model folder, with a check that both answer alike."""

from pathlib import Path
from typing import Any

import torch

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadSettings, CheckFailed
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import base_of, template_of
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import prompt_ids, ready_to_answer
from atomtune.model.load import BaseSpec, load_base, quiet_libraries, stored_dtype
from atomtune.settings.fields import MergeSettings

CPU = torch.device("cpu")
#: Probe prompts of the check: both languages, digits, several lines.
PROBES = ("你是谁？", "Who are you?", "1 + 1 = ?\n请一步一步地想。", "今天天气怎么样？")

#: Largest difference of log-probabilities that rounding W + BA to the dtype explains.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def merge(settings: MergeSettings) -> int:
    """Write the merged model and compare its logits with the adapter's.

    Raises CheckFailed when they differ by more than the dtype explains; the folder is kept for a look.
    """
    adapter, out = Path(settings.adapter_path), Path(settings.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadSettings([f"--output_dir {out} is not an empty folder. Pass a new one."])
    quiet_libraries()
    console = Console()
    trust = settings.trust_remote_code
    template, metadata = template_of(adapter, trust_remote_code=trust)
    base_path = base_of(adapter, settings.model_path)
    dtype = (
        stored_dtype(base_path, trust_remote_code=trust) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    )
    console.say(f"loading {base_path} in {str(dtype).removeprefix('torch.')} …")
    base = load_base(BaseSpec(path=base_path, dtype=dtype, device=CPU, trust_remote_code=trust))
    refuse_other_base(base_path, metadata.base, anyway=settings.other_base, notice=console.notice)
    model = load_trained(base, adapter)
    before = _log_probabilities(model, template)
    console.say("merging …")
    merged = model.merge_and_unload()
    ready_to_answer(merged, template, notice=console.notice)
    merged.save_pretrained(out)
    template.tokenizer.save_pretrained(out)
    metadata.save(out)
    console.say("checking the written folder …")
    written = load_base(BaseSpec(path=str(out), dtype=dtype, device=CPU, trust_remote_code=trust)).eval()
    worst = max((a - b).abs().max().item() for a, b in zip(before, _log_probabilities(written, template), strict=True))
    allowed = TOLERANCE[dtype]
    name = str(dtype).removeprefix("torch.")
    said = (
        f"Largest difference of log-probabilities, adapter against merged, over {len(PROBES)} prompts: {worst:.2e} "
        f"(allowed in {name}: {allowed:g}, the rounding of base + adapter to {name})."
    )
    if not worst <= allowed:
        raise CheckFailed(f"{said}\nThe merged model in {out} does not answer as the adapter does; do not serve it.")
    console.say(
        f"{said}\nThe merged model lies in {out}; transformers, vLLM and others load it as it is.\n\nNext:\n"
        f"  atomtune chat --adapter_path {out}"
    )
    return 0


@torch.no_grad()
def _log_probabilities(model: Any, template: Template) -> list[torch.Tensor]:
    found = []
    for probe in PROBES:
        ids = torch.tensor([prompt_ids(template, [{"role": "user", "content": probe}])])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [T, V]
        found.append(torch.log_softmax(logits.double(), dim=-1))
    return found
