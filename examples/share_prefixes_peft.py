"""Shared prefixes in a loop of your own: transformers, PEFT, and two lines of atomtune.

examples are dicts of `input_ids` and `labels`, with -100 at tokens that are not learned, as for any transformers loop.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from atomtune import share_prefixes


def train(model_path, examples, *, batch_size=16, learning_rate=1e-4, **model_settings):
    base = AutoModelForCausalLM.from_pretrained(model_path, **model_settings)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    sharing = share_prefixes(model)
    losses = []
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=sharing.collate):
        loss = sharing.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses
