"""Trial: a small tree of records computed as a row and one record at a time, on the model itself.

What it must see: a branch that reads its sibling, a record that reads the one before, a state that is not handed over,
positions that count places, gradients that are lost or NaN. So it has a shared beginning of 72 tokens (a chunk of
linear attention is 64), two levels of branches, a record of its own behind them, and takes one backward. The limit is
the model's own noise (agreement.py), and a tree must come much nearer than one whose branches were cut off.
Letters: N targets, T tokens of the row, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atomtune.batch.attention_plan import Cut
from atomtune.batch.collate import collate_row
from atomtune.batch.row import Row, untils
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.errors import BadModel
from atomtune.model.agreement import another_plain_way, unit
from atomtune.model.causal_lm import CausalLM
from atomtune.model.loss import innermost, model_inputs

#: How many times its noise a right tree may differ. A forked state takes its sums in another order than a whole
#: sequence does: up to 8 times the noise of attention was seen. Wrong ones differ by 10,000 times and more in float32.
_TIMES_NOISE = 20.0
#: What counts as rounding whatever the noise says, in units in the last place: of log-probabilities, of gradients.
_LEAST_ULPS, _LEAST_GRADIENT_ULPS = 32.0, 2_000.0
#: In 16 bits the noise is as large as small faults. A tree must also come this much nearer than the same tree with its
#: branches cut off from what they share.
_NEARER = 0.2
#: No gradient is compared more strictly or less strictly than so (relative).
_MOST_GRADIENT = 0.3


@dataclass(frozen=True)
class _Side:
    """What one way of computing gives."""

    scores: torch.Tensor  # [N] log-probabilities of the row's targets
    gradients: Mapping[str, torch.Tensor | None]


def difference(model: CausalLM, *, windows: Sequence[int | None], cut: Cut, carries_state: bool) -> str | None:
    """In what a row of this model differs from its records alone, or None."""
    examples = _examples(innermost(model).config.get_text_config().vocab_size)
    tree = graft(examples, least_saved=1)
    settings: dict[str, Any] = {"windows": windows, "cut": cut, "carries_state": carries_state}
    training = model.training
    model.eval()
    try:
        plain = _one_at_a_time(model, examples, tree)
        if not bool(torch.isfinite(plain.scores).all()):
            return "its own log-probabilities are not finite"
        _refuse_without_gradient(plain)
        with another_plain_way(model) as other:
            again = _one_at_a_time(model, examples, tree) if other else plain
        if _looks_ahead(model, examples[0], plain, tree):
            return "it is not causal: later tokens change earlier ones"
        rows = _as_row(model, tree, settings)
        without = _as_row(model, tree, settings, computed_as=_cut_off(tree), learns=False)
    except NotImplementedError as error:
        return f"its attention is more than rows allow for ({error})"
    # What a forward raises that was not made for rows: shapes, missing arguments, assertions.
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        return f"a row of many fails in its forward ({type(error).__name__}: {first_line[:120]})"
    finally:
        model.train(training)
    return _verdict(plain, again, rows, without, dtype=_dtype(model))


def _verdict(plain: _Side, again: _Side, rows: _Side, without: _Side, *, dtype: torch.dtype) -> str | None:
    apart = (rows.scores - plain.scores).abs().mean().item()
    noise = (again.scores - plain.scores).abs().mean().item()
    contrast = (without.scores - plain.scores).abs().mean().item()
    allowed = max(_TIMES_NOISE * noise, _LEAST_ULPS * unit(dtype))
    if not (apart <= allowed and apart <= _NEARER * contrast):
        return (
            f"a trial tree differs from its records alone by {apart:.1e} nats a token (noise: {noise:.1e}; with its "
            f"branches cut off: {contrast:.1e})"
        )
    gradient, noise = _gradient_difference(rows, plain), _gradient_difference(again, plain)
    allowed = min(_MOST_GRADIENT, max(_TIMES_NOISE * noise, _LEAST_GRADIENT_ULPS * unit(dtype)))
    if not gradient <= allowed:
        return f"gradients of a trial tree differ from its records' by {gradient:.1e} (relative; noise: {noise:.1e})"
    return None


def _examples(words: int) -> list[Example]:
    """Three records that share 72 tokens, two of which share 20 more, and one that shares nothing."""
    # Numbers that do not repeat soon; the lowest ids are control tokens.
    numbers = iter(range(10**9))
    lowest, words = min(8, words // 2), min(words, 30_000)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(lowest + (next(numbers) * 7_919 + 13) % (words - lowest) for _ in range(tokens))

    trunk, branch = text(72), text(20)
    ids = [(*trunk, *branch, *text(8)), (*trunk, *branch, *text(13)), (*trunk, *text(17)), text(24)]
    return [Example(i, (0,) * 4 + (1,) * (len(i) - 4), f"trial {n}") for n, i in enumerate(ids, 1)]


def _one_at_a_time(model: CausalLM, examples: Sequence[Example], tree: Row) -> _Side:
    """Each record alone, as any program would compute it."""
    by_path: dict[tuple[int, ...], torch.Tensor] = {}
    nats: list[torch.Tensor] = []
    for example in examples:
        ids = torch.tensor([example.ids], device=_device(model))
        logits = _called(model, {"input_ids": ids})  # [T, V]
        targets = torch.tensor(example.ids[1:], device=logits.device)
        scores = logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]  # [T - 1]
        learn = torch.tensor(example.learn[1:], device=scores.device)
        nats.append(-(scores * learn).sum())
        for i in range(1, len(example.ids)):
            by_path[example.ids[: i + 1]] = scores[i - 1].detach()
    scores = torch.stack([by_path[path] for path in _paths(tree)])
    return _Side(scores.double().cpu(), _gradients(model, torch.stack(nats).sum()))


def _as_row(
    model: CausalLM, tree: Row, settings: Mapping[str, Any], *, computed_as: Row | None = None, learns: bool = True
) -> _Side:
    """The tree in one call; or another row of the same tokens, at the tree's positions and for its targets."""
    row = computed_as or tree
    batch: Any = collate_row(row, examples=1, tokens_padded=len(row), **settings)
    batch["position_ids"][0, : len(tree)] = torch.tensor(tree.positions())
    for name in ("input_ids", "position_ids"):
        batch[name] = batch[name].to(_device(model))
    logits = _called(model, model_inputs(model, batch))  # [T, V]
    targets = [i for i, times in enumerate(tree.learn) if times]
    predicted_from = [tree.parent[i] for i in targets]
    ids, learn = (torch.tensor([column[i] for i in targets], device=logits.device) for column in (tree.ids, tree.learn))
    scores = logits[predicted_from].log_softmax(-1).gather(1, ids[:, None])[:, 0]  # [N]
    gradients = _gradients(model, -(scores * learn).sum()) if learns else {}
    return _Side(scores.detach().double().cpu(), gradients)


def _paths(row: Row) -> list[tuple[int, ...]]:
    """For each target of a row, in its order: the tokens that lead to it, and itself."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(row.ids, row.parent, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return [path for path, times in zip(paths, row.learn, strict=True) if times]


def _cut_off(tree: Row) -> Row:
    """The same tokens with every branch cut from what it shares."""
    parents = tuple(-1 if parent >= 0 and parent != i - 1 else parent for i, parent in enumerate(tree.parent))
    return Row(tree.ids, parents, untils(parents), tree.learn, tree.origins)


def _looks_ahead(model: CausalLM, example: Example, plain: _Side, tree: Row) -> bool:
    """Whether the beginning of a record alone has other log-probabilities than with what follows."""
    half = len(example.ids) // 2
    with torch.no_grad():
        whole, alone = (
            _called(model, {"input_ids": torch.tensor([ids], device=_device(model))})[: half - 1].log_softmax(-1)
            for ids in (example.ids, example.ids[:half])
        )
    targets = torch.tensor(example.ids[1:half], device=whole.device)[:, None]
    apart = (whole - alone).gather(1, targets).abs().mean().item()
    return not apart <= max(0.05, _LEAST_ULPS * unit(_dtype(model)))


def _refuse_without_gradient(plain: _Side) -> None:
    """Raise BadModel where adapter layers of a kind never get a gradient: they would stay as they are, unsaid."""
    reached: set[str] = set()
    missed: set[str] = set()
    for name, gradient in plain.gradients.items():
        kind = name.partition(".lora_")[0].rpartition(".")[2]
        (missed if gradient is None else reached).add(kind)
    if missed - reached:
        raise BadModel(
            f"LoRA on {', '.join(sorted(missed - reached))} never gets a gradient: this model reads these weights "
            "without calling the layer, or not for text. Leave them out of --lora_targets."
        )


def _called(model: CausalLM, inputs: Mapping[str, Any]) -> torch.Tensor:
    """[T, V] of one row, in float32 at least."""
    logits = model(**inputs, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gradients(model: CausalLM, nats: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of every weight that is trained, without touching what it has gathered; None where the loss does not reach it."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained or not nats.requires_grad:
        return dict.fromkeys(trained)
    gradients = torch.autograd.grad(nats, list(trained.values()), allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


def _gradient_difference(side: _Side, plain: _Side) -> float:
    """Relative L2 norm over all weights; infinite where one is NaN or missing."""
    apart = size = 0.0
    for name, expected in plain.gradients.items():
        if expected is None:
            continue
        gradient = side.gradients[name]
        if gradient is None:
            return float("inf")
        apart += (gradient.double() - expected.double()).square().sum().item()
        size += expected.double().square().sum().item()
    return (apart / size) ** 0.5 if size else 0.0


def _device(model: CausalLM) -> torch.device:
    embeddings: Any = innermost(model).get_input_embeddings()
    return embeddings.weight.device


def _dtype(model: CausalLM) -> torch.dtype:
    embeddings: Any = innermost(model).get_input_embeddings()
    return embeddings.weight.dtype
