"""Token rows: tokens that the tokenizer has but the model's embedding has no row for.

Usually they were added to the tokenizer only, for example an end-of-turn token in a base model. Such a base works as
long as no text needs one of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import BadData, listing
from atomtune.model.causal_lm import CausalLM

_NAMED = 5  # tokens in a message
#: Relative distance below which two rows count as equal. Rows that were never trained become nearly equal: 0.1 % of
#: their length apart in SmolLM2, 1.3 % in Gemma 3. Rows of trained end tokens are at least 10 % away from all others.
_ALIKE = 0.03
_CHUNK_ROWS = 8192


def tokens_without_row(tokenizer: Tokenizer, rows: int) -> dict[int, str]:
    """Id → token, for the tokens that an embedding with this many rows lacks."""
    return {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}


def refuse_tokens_without_row(
    tokenizer: Tokenizer,
    rows: int,
    records: Iterable[tuple[str, Sequence[int]]],
    *,
    path: str,
    notice: Callable[[str], None],
) -> None:
    """Raise BadData naming the records and tokens if a record has a token without a row.

    rows     of the model's embedding
    records  (origin, ids) of each; not read if every token has a row
    """
    missing = tokens_without_row(tokenizer, rows)
    if not missing:
        return
    problems = []
    for origin, ids in records:
        beyond = {missing[token_id] for token_id in ids if token_id in missing}
        if beyond:
            problems.append(f"{origin}  has {_names(beyond)}, for which the model has no embedding.")
    if problems:
        raise BadData(f"{listing(problems, 5)}\n{_remedy(missing, rows, path)}")
    notice(
        f"the tokenizer of {path} has {_names(missing.values())}, for which the model has no embedding; unused here."
    )


def guard_embedding(base: CausalLM, tokenizer: Tokenizer, *, path: str) -> None:
    """Make the base raise BadData naming a token that has no row, instead of an index error or, on a GPU, a crash.

    If every token has a row, no hook is added, so the check costs no synchronization with the device.
    """
    embedding = base.get_input_embeddings()
    rows = len(embedding.weight)
    missing = tokens_without_row(tokenizer, rows)
    if not missing:
        return

    def refuse(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        beyond = {missing.get(token_id, str(token_id)) for token_id in inputs[0].flatten().tolist() if token_id >= rows}
        if beyond:
            raise BadData(
                f"The text has {_names(beyond)}, for which the model has no embedding.\n{_remedy(missing, rows, path)}"
            )

    embedding.register_forward_pre_hook(refuse)


def with_row(model: CausalLM, token_id: int) -> int:
    """A token id for padding: this one, or 0 if the model has no row for it (a pad token added to the tokenizer only).

    Padding is masked by position, so any token will do.
    """
    return token_id if token_id < len(model.get_input_embeddings().weight) else 0


def say_untrained_stop(base: CausalLM, tokenizer: Tokenizer, stop: str, *, notice: Callable[[str], None]) -> None:
    """Give a notice if the stop token's row was never trained, because it is zero or equals another token's row.

    Base models often have such an end token. Its row tells the model nothing, and with two equal rows the output matrix
    cannot tell the tokens apart. There is no notice if LoRA adapts the output matrix, because the row is then trained.
    """
    token_id = tokenizer.convert_tokens_to_ids(stop)
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(output, LoraLayer):
        return
    for matrix, layer in (("embedding", embedding), ("output matrix", output)):
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dim() != 2 or weight.device.type == "meta" or token_id >= len(weight):
            continue
        if looks_untrained(weight, token_id):
            is_own = output is not None and output.weight is not embedding.weight
            train_it = "train the output matrix too (--lora_targets all-linear,lm_head), " if is_own else ""
            notice(
                f"the stop token {stop} looks untrained: its row of the {matrix} is zero or the same as that of other "
                f"tokens. LoRA does not change this row, so answers may not stop. Options: {train_it}start from the "
                "instruct model of this family, or pass another --template: plain ends answers with the tokenizer's "
                "end-of-text token."
            )
            return


@torch.no_grad()
def looks_untrained(weight: torch.Tensor, token_id: int) -> bool:
    """Whether a row of weight [V, D] is zero or nearly equal to another row."""
    row = weight[token_id].float()
    length = row.norm()
    if not length:
        return True
    for start in range(0, len(weight), _CHUNK_ROWS):
        distances = (weight[start : start + _CHUNK_ROWS].float() - row).norm(dim=1)  # one per row of the chunk
        if start <= token_id < start + len(distances):
            distances[token_id - start] = torch.inf  # the row itself
        if bool((distances < _ALIKE * length).any()):
            return True
    return False


def _names(tokens: Iterable[str]) -> str:
    names = sorted(tokens)
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{'the tokens' if len(names) > 1 else 'the token'} {', '.join(names[:_NAMED])}{more}"


def _remedy(missing: Mapping[int, str], rows: int, path: str) -> str:
    tokens = max(missing) + 1
    return (
        f"The tokenizer of {path} has {tokens:,} tokens, the model's embedding {rows:,} rows.\n"
        "Leave these texts out, pass a --template that does not write such a token, or give the base the rows first: "
        f"model.resize_token_embeddings({tokens})."
    )
