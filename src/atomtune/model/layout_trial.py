"""Layout trial: a small tree of records, computed as one row and one record at a time, on the model itself.

It must detect a branch that sees its sibling, a record that sees the one before, a state that is not passed on,
positions that count slots, and gradients that are lost or NaN. Therefore its shared beginning has 72 tokens (a chunk of
linear attention has 64), it has two levels of branches and then an unrelated record, and a backward pass is computed.
The tolerance is the model's own noise (agreement.py), and the tree must be much closer to its records than the same
tree with its branches cut off. The tree, with T = 154 and the number of tokens of each part:

    record 1   trunk 72   branch 20   8
    record 2   trunk 72   branch 20   13
    record 3   trunk 72   17
    record 4   24

Letters: N targets, T tokens of the row, V vocabulary size.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atomtune.batch.attention_plan import Cut
from atomtune.batch.collate import collate_chains, collate_row
from atomtune.batch.row import Row, single, untils
from atomtune.batch.segment_plan import MixerMethod
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.errors import BadModel
from atomtune.model.agreement import (
    another_plain_way,
    gradient_measures,
    log_probability_measures,
    relative_difference,
    unit,
)
from atomtune.model.causal_lm import CausalLM
from atomtune.model.lora_targets import unreached
from atomtune.model.loss import innermost, model_inputs, takes
from atomtune.model.memory import is_out_of_memory
from atomtune.model.modes import as_in_training, without_dropout


@dataclass(frozen=True)
class _Limits:
    """How much a correct tree may differ from its records.

    times                 at most this many times the noise
    log_probability_ulps  differences of log-probabilities below this many units in the last place always pass
    gradient_ulps         the same for gradients
    """

    times: float
    log_probability_ulps: float
    gradient_ulps: float


#: A forked state sums in another order than a whole sequence: up to 8 times the noise of attention was measured. Wrong
#: trees differ 10,000 times as much and more.
_IN_32_BITS = _Limits(times=20.0, log_probability_ulps=32.0, gradient_ulps=2_000.0)
#: In 16 bits rounding is most of the noise: correct trees of 26 families were at 0.8 times the noise and below
#: (gradients: 1.1). A RecurrentGemma whose branches continued from their siblings was at 5 (gradients: 7).
_IN_16_BITS = _Limits(times=3.0, log_probability_ulps=1.0, gradient_ulps=2.0)
#: In 16 bits the noise is as large as small faults. Therefore the tree must also differ at most this many times as much
#: as the same tree with its branches cut off from what they share.
_NEARER = 0.2
#: The largest relative difference of gradients that can pass.
_MOST_GRADIENT = 0.3
#: Errors of a forward that does not support such rows: wrong shapes, missing arguments, assertions.
_OF_A_FORWARD = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class _Result:
    """What one computation of the trial gives."""

    log_probabilities: torch.Tensor  # [N] log-probabilities of the targets
    gradients: Mapping[str, torch.Tensor | None]


def difference(model: CausalLM, *, windows: Sequence[int | None], cut: Cut, mixers: MixerMethod | None) -> str | None:
    """How a row of this model differs from its records computed alone, in words for a message; None if it does not."""
    examples = _examples(model)
    tree = graft(examples, least_saved=1)
    row_options: dict[str, Any] = {"windows": windows, "cut": cut, "mixers": mixers}
    try:
        with without_dropout(model), as_in_training(innermost(model)):
            alone = [_alone(model, example) for example in examples]
            if not all(bool(torch.isfinite(result.log_probabilities).all()) for result in alone):
                return "its own log-probabilities are not finite"
            plain = _as_one(alone, examples, tree)
            _refuse_without_gradient(plain)
            if _looks_ahead(model, examples[0], alone[0]):
                return "it is not causal: later tokens change earlier ones"
            # One record shows the noise as well as all four, and plain runs are the most expensive part of the trial.
            with another_plain_way(model):
                again = _alone(model, examples[0])
            rows = _as_row(model, tree, row_options)
            without = _as_row(model, tree, row_options, computed_as=_cut_off(tree), learns=False)
    except NotImplementedError as error:
        return f"its attention does more than rows allow for ({error})"
    except _OF_A_FORWARD as error:
        return f"its forward fails on a row of several records ({_first_line(error)})"
    noise = (_apart(again, alone[0]), _gradient_difference(again, alone[0]))
    return _verdict(plain, rows, without, noise=noise, dtype=_dtype(model), limits=_limits(model))


def _verdict(
    plain: _Result, rows: _Result, without: _Result, *, noise: tuple[float, float], dtype: torch.dtype, limits: _Limits
) -> str | None:
    """The difference, or None. noise: (of log-probabilities in nats per target, of gradients, relative)."""
    apart, contrast = _apart(rows, plain), _apart(without, plain)
    allowed = max(limits.times * noise[0], limits.log_probability_ulps * unit(dtype))
    if not (apart <= allowed and apart <= _NEARER * contrast):
        return (
            f"a trial tree differs from its records alone by {apart:.1e} nats per token (noise: {noise[0]:.1e}; with "
            f"its branches cut off: {contrast:.1e})"
        )
    gradient = _gradient_difference(rows, plain)
    allowed = min(_MOST_GRADIENT, max(limits.times * noise[1], limits.gradient_ulps * unit(dtype)))
    if not gradient <= allowed:
        return f"gradients of a trial tree differ from its records' by {gradient:.1e} (relative; noise: {noise[1]:.1e})"
    return None


def _limits(model: CausalLM) -> _Limits:
    # LLM.int8 computes a token depending on the rest of its batch, which two runs of one record do not show as noise.
    in_8_bits = getattr(innermost(model), "is_loaded_in_8bit", False)
    in_16_bits = _dtype(model).itemsize < torch.float32.itemsize and not in_8_bits
    return _IN_16_BITS if in_16_bits else _IN_32_BITS


def changed_by(model: CausalLM, change: Callable[[], object]) -> str | None:
    """How a model differs after a change that should only make it faster (fused kernels); None if it does not."""
    examples = _examples(model)[:2]
    try:
        with without_dropout(model), as_in_training(innermost(model)):
            plain = [_alone(model, example) for example in examples]
            with another_plain_way(model):
                again = [_alone(model, example) for example in examples]
            change()
            ours = [_alone(model, example) for example in examples]
    # Kernels raise anything: no compiler, a shape or a dtype that they do not support.
    except Exception as error:  # noqa: BLE001
        return f"its forward or backward fails ({_first_line(error)})"
    log_probabilities = [
        torch.cat([result.log_probabilities for result in results]) for results in (ours, plain, again)
    ]
    gradients = [
        {name: gradient for name, gradient in results[0].gradients.items() if gradient is not None}
        for results in (ours, plain, again)
    ]
    measures = log_probability_measures(*log_probabilities, dtype=_dtype(model))
    if gradients[1]:
        if any(gradient.keys() != gradients[1].keys() for gradient in gradients):
            return "other weights have a gradient"
        measures += gradient_measures(*gradients, dtype=_dtype(model))[:1]
    for measure in measures:
        if not measure.holds:
            difference, allowed = f"{measure.difference:.1e}", f"{measure.allowed:.1e}"
            return f"{measure.name}: {difference} apart, {allowed} allowed by the model's own noise"
    return None


@torch.no_grad()
def padding_difference(model: CausalLM, *, pad_id: int) -> str | None:
    """How a short record, padded beside a long one, differs from the short one alone; None if it does not.

    Raises BadModel if the model cannot compute the two together.
    """
    examples = _examples(model)
    long, short = examples[0], examples[-1]
    batch: Any = collate_chains([single(long), single(short)], pad_id=pad_id, records=2, tokens_padded=0)
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].to(_device(model))
    targets = _learned(short.learn)
    predicted_from, ids = [i - 1 for i in targets], [short.ids[i] for i in targets]
    try:
        with without_dropout(model):
            alone = _alone(model, short)
            with another_plain_way(model):
                again = _alone(model, short)
            log_probabilities = _log_probabilities(model, model_inputs(model, batch), predicted_from, ids, row=1)
    except _OF_A_FORWARD as error:
        if is_out_of_memory(error):
            raise
        raise BadModel(
            f"This model cannot compute padded rows: {_first_line(error)}.\nPass --model_path with another model."
        ) from error
    apart, noise = _apart(_Result(log_probabilities.double().cpu(), {}), alone), _apart(again, alone)
    # With the tolerance of float32 in every dtype, because a model that is refused here cannot be trained at all.
    if apart <= max(_IN_32_BITS.times * noise, _IN_32_BITS.log_probability_ulps * unit(_dtype(model))):
        return None
    return f"a padded record differs from the same record alone by {apart:.1e} nats per token (noise: {noise:.1e})"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _examples(model: CausalLM) -> list[Example]:
    """Three records that share 72 tokens, two of which share 20 more, and one that shares nothing."""
    # Ids that do not repeat soon; the lowest ids are left out, because they are control tokens.
    numbers = itertools.count()
    vocab_size = innermost(model).config.get_text_config().vocab_size
    lowest, end = min(8, vocab_size // 2), min(vocab_size, 30_000)

    def text(tokens: int) -> tuple[int, ...]:
        return tuple(lowest + (next(numbers) * 7_919 + 13) % (end - lowest) for _ in range(tokens))

    trunk, branch = text(72), text(20)
    records = [(trunk, branch, text(8)), (trunk, branch, text(13)), (trunk, text(17)), (text(24),)]
    return [_example(parts, f"trial {number}") for number, parts in enumerate(records, 1)]


def _example(parts: Sequence[tuple[int, ...]], origin: str) -> Example:
    """A record whose targets are the first two tokens of each part and every fourth token.

    Not every token is a target: with a vocabulary of 262,000, the output matrix at all positions would cost more than
    the layers.
    """
    ids = tuple(token for part in parts for token in part)
    learn = [int(place < 2 or place % 4 == 3) for part in parts for place in range(len(part))]
    return Example(ids, (0, *learn[1:]), origin)


def _learned(learn: Sequence[int]) -> list[int]:
    """The positions of the targets."""
    return [place for place, times in enumerate(learn) if times]


def _alone(model: CausalLM, example: Example) -> _Result:
    """A record computed alone, as any program would do it."""
    log_probabilities = _of_sequence(model, example.ids, _learned(example.learn))
    return _Result(log_probabilities.detach().double().cpu(), _gradients(model, -log_probabilities.sum()))


def _as_one(alone: Sequence[_Result], examples: Sequence[Example], tree: Row) -> _Result:
    """The results of the records as one: each target of the tree with its score, and the sum of the gradients."""
    by_path: dict[tuple[int, ...], torch.Tensor] = {}
    for result, example in zip(alone, examples, strict=True):
        paths = [example.ids[: i + 1] for i in _learned(example.learn)]
        by_path.update(zip(paths, result.log_probabilities, strict=True))
    gradients: dict[str, torch.Tensor | None] = {}
    for name in alone[0].gradients:
        of_records = [gradient for result in alone if (gradient := result.gradients[name]) is not None]
        gradients[name] = torch.stack(of_records).sum(0) if of_records else None
    return _Result(torch.stack([by_path[path] for path in _paths(tree)]), gradients)


def _as_row(
    model: CausalLM, tree: Row, row_options: Mapping[str, Any], *, computed_as: Row | None = None, learns: bool = True
) -> _Result:
    """The tree in one call; `computed_as` replaces its parents by others, with the tree's positions and targets."""
    batch: Any = collate_row(computed_as or tree, records=1, tokens_padded=len(tree), **row_options)
    batch["position_ids"][0, : len(tree)] = torch.tensor(tree.positions())
    for name in ("input_ids", "position_ids"):
        batch[name] = batch[name].to(_device(model))
    targets = _learned(tree.learn)
    predicted_from, ids = [tree.parent[i] for i in targets], [tree.ids[i] for i in targets]
    log_probabilities = _log_probabilities(model, model_inputs(model, batch), predicted_from, ids)
    times = torch.tensor([tree.learn[i] for i in targets], device=log_probabilities.device)  # [N]
    gradients = _gradients(model, -(log_probabilities * times).sum()) if learns else {}
    return _Result(log_probabilities.detach().double().cpu(), gradients)


def _paths(row: Row) -> list[tuple[int, ...]]:
    """For each target of a row, in order: the tokens from the root down to it, inclusive."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(row.ids, row.parent, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return [path for path, times in zip(paths, row.learn, strict=True) if times]


def _cut_off(tree: Row) -> Row:
    """The same tokens, with every branch made a tree of its own."""
    parents = tuple(-1 if parent >= 0 and parent != i - 1 else parent for i, parent in enumerate(tree.parent))
    return Row(tree.ids, parents, untils(parents), tree.learn, tree.origins)


def _looks_ahead(model: CausalLM, example: Example, whole: _Result) -> bool:
    """Whether the first half of a record has other log-probabilities alone than together with the second half."""
    half = len(example.ids) // 2
    targets = _learned(example.learn[:half])
    beginning = _of_sequence(model, example.ids[:half], targets)
    apart = (beginning.detach().double().cpu() - whole.log_probabilities[: len(targets)]).abs().mean().item()
    return not apart <= max(0.05, _IN_32_BITS.log_probability_ulps * unit(_dtype(model)))


def _refuse_without_gradient(plain: _Result) -> None:
    """Raise BadModel if an adapter layer never gets a gradient, because it would stay untrained without an error."""
    layers = {name: name.partition(".lora_")[0] for name in plain.gradients}
    reached = {layers[name] for name, gradient in plain.gradients.items() if gradient is not None}
    missed = unreached(dict.fromkeys(layers.values()), reached)
    if missed:
        kinds = sorted({layer.rpartition(".")[2] for layer in missed})
        raise BadModel(
            f"LoRA on {', '.join(kinds)} never gets a gradient ({len(missed)} layers, the first: {missed[0]}): this "
            "model reads these weights without calling the layer, or not for text. Leave them out of --lora_targets."
        )


def _of_sequence(model: CausalLM, ids: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
    """[N] log-probabilities of a sequence's tokens at these positions, computed without any other sequence."""
    inputs = {"input_ids": torch.tensor([ids], device=_device(model))}  # [1, T]
    return _log_probabilities(model, inputs, [i - 1 for i in targets], [ids[i] for i in targets])


def _log_probabilities(
    model: CausalLM, inputs: Mapping[str, Any], predicted_from: Sequence[int], targets: Sequence[int], *, row: int = 0
) -> torch.Tensor:
    """[N] log-probabilities of target ids at positions of one row, in float32 or float64."""
    columns = torch.tensor(predicted_from, device=_device(model))
    if takes(model, "logits_to_keep"):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits[row]  # [N, V]
    else:
        logits = model(**inputs, use_cache=False).logits[row, predicted_from]
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_probabilities.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]


def _gradients(model: CausalLM, nats: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Gradients of all trained weights, without changing their .grad; None for weights that the loss does not reach."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained or not nats.requires_grad:
        return dict.fromkeys(trained)
    gradients = torch.autograd.grad(nats, list(trained.values()), allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


def _apart(result: _Result, plain: _Result) -> float:
    """Mean difference in nats per target."""
    return (result.log_probabilities - plain.log_probabilities).abs().mean().item()


def _gradient_difference(result: _Result, plain: _Result) -> float:
    """Relative L2 norm of the difference over all weights; infinite if a gradient is NaN or missing."""
    expected = {name: gradient.double() for name, gradient in plain.gradients.items() if gradient is not None}
    gradients = {name: gradient.double() for name in expected if (gradient := result.gradients[name]) is not None}
    return relative_difference(gradients, expected) if len(gradients) == len(expected) else float("inf")


def _device(model: CausalLM) -> torch.device:
    return innermost(model).get_input_embeddings().weight.device


def _dtype(model: CausalLM) -> torch.dtype:
    """The dtype to whose precision the model rounds.

    LLM.int8 rounds to 8 bits, as many as bfloat16 has. It computes a column in 16 bits if any token of the batch is
    large there, so a token's values depend on the rest of the batch: by 2e-2 of a gradient on a tiny Llama, padded or
    not.
    """
    if getattr(innermost(model), "is_loaded_in_8bit", False):
        return torch.bfloat16
    return innermost(model).get_input_embeddings().weight.dtype
