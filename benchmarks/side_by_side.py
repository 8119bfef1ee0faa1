"""Side by side: train many adapters of one base in one forward pass, each with its own records, rate and seed.

With a small model, a GPU mostly waits for kernels to be launched. K adapters that share the base's products take hardly
longer than one, so a study of many short runs fits into minutes. Each adapter is trained like in `atomtune train`: mean
nats of the batch's answer tokens, gradients clipped at norm 1, AdamW without decay, a linear or cosine schedule. It
ends with the same weights as when trained alone (tests/test_benchmarks.py).

K adapters   B records of each   T padded tokens   D in, E out   R the largest rank
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from atomtune.model.lora_targets import all_linear

BETAS, EPSILON, LARGEST_NORM = (0.9, 0.999), 1e-8, 1.0
#: Tokens per pass without gradients: many for a GPU, which waits for launches, few for a CPU, which waits for memory.
EVALUATED_TOKENS = {"cuda": 32_768, "cpu": 4_096}
#: Rows are padded to a multiple of this: a CPU compiles for each new length, which took longer than the step.
LENGTH_STEP = 8


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter's training."""

    name: str
    learning_rate: float
    batch: int
    epochs: int
    warmup: float = 0.0  # share of the steps
    schedule: str = "linear"
    rank: int = 8
    alpha: float = 32
    dropout: float = 0.1

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, as in transformers' schedules."""
        warmup_steps = math.ceil(self.warmup * steps)
        if step < warmup_steps:
            return self.learning_rate * step / warmup_steps
        share = (step - warmup_steps) / max(steps - warmup_steps, 1)
        left = 1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.learning_rate * left


@dataclass(frozen=True)
class Run:
    """One adapter to train: its settings, and the seed for its first weights and the order of its records."""

    settings: Settings
    seed: int


class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer with K adapters; the rows of the batch are divided equally among the adapters."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = self.up = torch.empty(0)  # [K, R, D], [K, E, R]
        self.scale = torch.empty(0)  # [K, 1, 1]
        self.dropout = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapters = self.down.shape[0]
        inputs = x.reshape(adapters, -1, x.shape[-1])  # [K, B * T, D]
        if self.training and self.dropout:
            inputs = dropped(inputs, self.dropout)
        inner = inputs @ self.down.to(x.dtype).mT  # [K, B * T, R]
        added = (inner @ self.up.to(x.dtype).mT) * self.scale.to(x.dtype)  # [K, B * T, E]
        result: torch.Tensor = self.linear(x) + added.view(*x.shape[:-1], -1)
        return result


def dropped(x: torch.Tensor, share: float) -> torch.Tensor:
    """Dropout: about this share of the numbers becomes 0, and the others grow to keep the mean.

    One random byte decides per number, because torch's own dropout took a fifth of a step on a CPU.
    """
    limit = round(256 * share)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return x.masked_fill(drawn < limit, 0) * (256 / (256 - limit))


class Adapters:
    """The weights of K adapters in one tensor, [K, P]: for each layer `down`, then `up`."""

    def __init__(self, model: Any, runs: Sequence[Run]) -> None:
        self.model, self.runs = model, runs
        self.layers = adapted_layers(model)
        device = next(model.parameters()).device
        largest = max(run.settings.rank for run in runs)
        self.shapes = []
        for layer in self.layers:
            outputs, inputs = tuple(layer.linear.weight.shape)
            self.shapes += [(largest, inputs), (outputs, largest)]
        rows = torch.stack([first_weights(self.shapes, run) for run in runs])
        self.weights = rows.to(device).requires_grad_()
        scales = [run.settings.alpha / run.settings.rank for run in runs]
        self.scale = torch.tensor(scales, device=device)[:, None, None]

    def put(self, chosen: Sequence[int] | None = None) -> None:
        """Give every layer its weights, of all adapters or of the chosen ones. Gradients flow back into `weights`."""
        weights, scale = self.weights, self.scale
        if chosen is not None:
            weights, scale = weights[list(chosen)], scale[list(chosen)]
        pieces = iter(weights.split([math.prod(shape) for shape in self.shapes], dim=1))
        for number, layer in enumerate(self.layers):
            layer.down, layer.up = (next(pieces).view(-1, *shape) for shape in self.shapes[2 * number : 2 * number + 2])
            layer.scale, layer.dropout = scale, self.runs[0].settings.dropout


def adapted_layers(model: Any) -> list[AdaptedLinear]:
    """The layers that atomtune adapts, wrapped for adapters; a second call returns the same ones."""
    found = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    if found:
        return found
    for name in all_linear(model).adapted:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, AdaptedLinear(model.get_submodule(name)))
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def first_weights(shapes: Sequence[tuple[int, int]], run: Run) -> torch.Tensor:
    """First weights like PEFT's: `down` uniform, `up` zero. Rows beyond the run's rank are zero and stay zero."""
    draw = torch.Generator().manual_seed(run.seed)
    parts = []
    for number, (rows, columns) in enumerate(shapes):
        part = torch.zeros(rows, columns)
        if number % 2 == 0:
            bound = 1 / math.sqrt(columns)
            part[: run.settings.rank].uniform_(-bound, bound, generator=draw)
        parts.append(part.flatten())
    return torch.cat(parts)


def nats_of(model: Any, examples: Sequence[dict[str, list[int]]], adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats [K], answer tokens [K]): the examples are K equal shares, one per adapter."""
    ids, learned = padded(examples, model.device)
    # On a CPU, torch's fused attention is half as fast as its plain one for rows as short as these.
    backends = [SDPBackend.MATH] if ids.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [K * B, T - 1, D]
    rows, places = learned[:, 1:].nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places]).float()  # [N, V]
    nats = torch.nn.functional.cross_entropy(logits, ids[rows, places + 1], reduction="none")
    owner = rows // (len(examples) // adapters)
    sums = torch.zeros(adapters, device=ids.device).index_add(0, owner, nats)
    return sums, torch.bincount(owner, minlength=adapters)


def padded(examples: Sequence[dict[str, list[int]]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and target mask, padded on the right, where causal attention needs no mask."""
    longest = LENGTH_STEP * math.ceil(max(len(example["input_ids"]) for example in examples) / LENGTH_STEP)
    columns = [[*values, *[0] * (longest - len(values))] for example in examples for values in example.values()]
    both = torch.tensor(columns).to(device, non_blocking=True).view(len(examples), 2, longest)
    return both[:, 0], both[:, 1].bool()


def orders(runs: Sequence[Run], records: int, epochs: int) -> list[list[int]]:
    """For each run the record numbers in the order of training, over all epochs."""
    sequences = []
    for run in runs:
        draw, order = random.Random(run.seed), list(range(records))
        sequence: list[int] = []
        for _ in range(epochs):
            draw.shuffle(order)
            sequence += order
        sequences.append(sequence)
    return sequences


def train(
    model: Any, runs: Sequence[Run], learned: Sequence[dict[str, list[int]]], held_out: Sequence[dict[str, list[int]]]
) -> tuple[Adapters, list[list[float]]]:
    """Train all runs; they must have the same batch, epochs and dropout.

    Returns the adapters as they were after their best epochs, and each adapter's held-out loss after each epoch.
    """
    adapters = Adapters(model, runs)
    batch, epochs = runs[0].settings.batch, runs[0].settings.epochs
    steps_an_epoch = math.ceil(len(learned) / batch)
    steps = epochs * steps_an_epoch
    sequences = orders(runs, len(learned), epochs)
    mean, square = torch.zeros_like(adapters.weights), torch.zeros_like(adapters.weights)
    losses: list[list[float]] = [[] for _ in runs]
    best = adapters.weights.detach().clone()
    for step in range(steps):
        epoch, number = divmod(step, steps_an_epoch)
        first = epoch * len(learned) + number * batch
        last = min(first + batch, (epoch + 1) * len(learned))
        chosen = [learned[index] for sequence in sequences for index in sequence[first:last]]
        model.train()
        adapters.put()
        nats, tokens = nats_of(model, chosen, len(runs))
        (nats / tokens).sum().backward()
        rates = [run.settings.rate_at(step, steps) for run in runs]
        update(adapters.weights, mean, square, torch.tensor(rates), step + 1)
        if number == steps_an_epoch - 1:
            for row, loss in enumerate(evaluate(adapters, held_out)):
                losses[row].append(loss)
                if loss == min(losses[row]):
                    best[row] = adapters.weights[row].detach()
    adapters.weights = best
    return adapters, losses


@torch.no_grad()
def update(weights: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, rates: torch.Tensor, number: int) -> None:
    """One step of AdamW without decay, per row; each row's gradient is clipped at norm 1."""
    gradient = weights.grad
    assert gradient is not None
    norms = gradient.norm(dim=1, keepdim=True)
    gradient *= (LARGEST_NORM / (norms + 1e-6)).clamp(max=1)
    mean.lerp_(gradient, 1 - BETAS[0])
    square.lerp_(gradient * gradient, 1 - BETAS[1])
    size = (square / (1 - BETAS[1] ** number)).sqrt_().add_(EPSILON)
    weights -= rates.to(weights.device)[:, None] / (1 - BETAS[0] ** number) * mean / size
    weights.grad = None


@torch.no_grad()
def evaluate(adapters: Adapters, held_out: Sequence[dict[str, list[int]]]) -> list[float]:
    """Mean nats of a held-out answer token, for each adapter."""
    adapters.model.eval()
    adapters.put()
    count = len(adapters.runs)
    longest = max(len(example["input_ids"]) for example in held_out)
    device = adapters.weights.device
    at_once = max(EVALUATED_TOKENS[device.type] // (count * longest), 1)
    nats = torch.zeros(count, dtype=torch.float64, device=device)
    tokens = torch.zeros_like(nats)
    for first in range(0, len(held_out), at_once):
        part = list(held_out[first : first + at_once])
        part_nats, part_tokens = nats_of(adapters.model, part * count, count)
        nats += part_nats
        tokens += part_tokens
    losses: list[float] = (nats / tokens).tolist()
    return losses


@torch.no_grad()
def answers(
    adapters: Adapters, chosen: Sequence[int], prompts: Sequence[list[int]], *, stop: int, most_tokens: int
) -> list[list[list[int]]]:
    """Greedy answers of the chosen adapters to every prompt, as token ids without the stop token."""
    model = adapters.model.eval()
    adapters.put(chosen)
    longest = max(map(len, prompts))
    fill = [longest - len(prompt) for prompt in prompts]
    ids = [[stop] * empty + prompt for empty, prompt in zip(fill, prompts, strict=True)] * len(chosen)
    mask = [[0] * empty + [1] * (longest - empty) for empty in fill] * len(chosen)
    written = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=most_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    texts = [row[: row.index(stop)] if stop in row else row for row in written[:, longest:].tolist()]
    return [texts[first : first + len(prompts)] for first in range(0, len(texts), len(prompts))]
