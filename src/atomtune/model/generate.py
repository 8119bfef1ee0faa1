"""Generation: a prompt in the training template, then tokens until the stop token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from atomtune.data.encoding.chat_template import Message, Template
from atomtune.errors import BadModel
from atomtune.model.causal_lm import CausalLM
from atomtune.model.load import pad_id_of, read_config
from atomtune.model.modes import without_dropout

#: Settings of a generation config that force or delay tokens, whatever the model predicts.
_FORCING = ("min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id")
#: Settings that forbid tokens; dropped if they forbid a stop token, or a token that the model does not have.
_SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
#: Settings that matter only for sampling, and their neutral values.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
#: Other settings of a generation config that are used here: how a token is chosen, where an answer ends, and settings
#: without effect unless there is a second model. All others generate in another way (beams, an ensemble, a program from
#: the hub), return more than ids, or need something that only their author has.
_USED = {
    "do_sample", "use_cache", "cache_implementation", "disable_compile", "max_length", "max_new_tokens",
    "repetition_penalty", "no_repeat_ngram_size", "renormalize_logits", "remove_invalid_values", "pad_token_id",
    "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "transformers_version", "_from_model_config",
    *_FORCING, *_SUPPRESSING, *_SAMPLING,
}  # fmt: skip
#: Caches that need an extra package or a server.
_OTHER_CACHES = ("quantized", "paged")
#: Values that mean "not set" in configs that older versions wrote in full.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {})

#: Below this temperature the most likely token wins anyway, and dividing scores by so little gives infinity.
_COLDEST = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How the next token of an answer is chosen; None keeps the value of the base's generation config."""

    temperature: float = 0.0  # 0: always the most likely token
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def values(self) -> dict[str, Any]:
        """The settings as keyword arguments of transformers' generate."""
        is_drawn = self.temperature >= _COLDEST
        values: dict[str, Any] = {"do_sample": is_drawn}
        if self.repetition_penalty is not None:
            values["repetition_penalty"] = self.repetition_penalty
        if is_drawn:
            values["temperature"] = self.temperature
            drawn_from = {"top_p": self.top_p, "top_k": self.top_k}
            values |= {name: value for name, value in drawn_from.items() if value is not None}
        return values


class _StopEarly(StoppingCriteria):
    """Ends all answers of a batch as soon as `stop` returns True."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop(), dtype=torch.bool, device=input_ids.device)


def prompt_ids(template: Template, messages: Sequence[Message]) -> list[int]:
    """The ids of a prompt, made by the same template and rules as in training.

    Raises BadModel if there are none, because the tokenizer has no token for any of the text.
    """
    ids = template.tokens.ids_of([template.prompt_piece(messages)])[0]
    if not ids:
        raise BadModel(
            f"the tokenizer has no token for any part of what template {template.name} writes, so there is nothing to "
            "answer. Check tokenizer.json, or pass another --template."
        )
    return ids


def stop_ids(model: CausalLM, template: Template) -> list[int]:
    """The ids that end an answer: the template's ends of an assistant turn, the end of text, and the base's own."""
    return _stop_ids(model.generation_config, template)


def stop_ids_on(base_path: str, template: Template, *, trust_remote_code: bool = False) -> list[int]:
    """The same for a base that is not loaded."""
    return _stop_ids(_generation_config(base_path, trust_remote_code=trust_remote_code), template)


def samples_by_itself(model_path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model that is not loaded has `do_sample` in its generation config."""
    return bool(_generation_config(model_path, trust_remote_code=trust_remote_code).do_sample)


def _generation_config(model_path: str, *, trust_remote_code: bool) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model_path)
    except OSError:  # without a generation config, loading would derive one from the model config
        return GenerationConfig.from_model_config(read_config(model_path, trust_remote_code=trust_remote_code))


def _stop_ids(config: GenerationConfig, template: Template) -> list[int]:
    of_base = config.eos_token_id
    stops = set(of_base) if isinstance(of_base, list) else {of_base}
    stops |= {template.tokenizer.convert_tokens_to_ids(stop) for stop in template.stops}
    stops.add(template.tokenizer.eos_token_id)
    return sorted(stops - {None})


def ready_to_answer(model: CausalLM, template: Template, *, notice: Callable[[str], None]) -> None:
    """Set the stop ids and the cache, and drop settings of the base's generation config that would interfere."""
    config = model.generation_config
    stops = stop_ids(model, template)
    vocab_size = len(model.get_input_embeddings().weight)
    dropped = [name for name in _FORCING if getattr(config, name, None)]
    dropped += [name for name in _SUPPRESSING if _forbids(getattr(config, name, None), stops, vocab_size)]
    if config.cache_implementation in _OTHER_CACHES:
        dropped.append("cache_implementation")
    for name in vars(GenerationConfig()).keys() - _USED:
        value = getattr(config, name, None)
        if value is True or value not in _NEUTRAL:
            dropped.append(name)
        else:
            setattr(config, name, None)
    if not config.do_sample:  # greedy: sampling settings have no effect, and transformers refuses to save them
        dropped += [name for name, neutral in _SAMPLING.items() if getattr(config, name, None) not in (None, neutral)]
    for name in dropped:
        setattr(config, name, None)
    if dropped:
        dropped.sort()
        notice(
            f"not used from the base's generation config: {', '.join(dropped)}. They keep an answer from "
            "stopping, have no effect without do_sample, or do not apply when one token is generated after another."
        )
    config.eos_token_id = stops
    config.use_cache = True
    model.config.use_cache = True


def _forbids(ids: list[Any] | None, stops: list[int], vocab_size: int) -> bool:
    """Whether ids, or sequences of ids, forbid a stop token or contain an id that the model does not have."""
    for forbidden in ids or ():
        tokens = forbidden if isinstance(forbidden, list) else [forbidden]
        if not all(0 <= token < vocab_size for token in tokens) or (len(tokens) == 1 and tokens[0] in stops):
            return True
    return False


@torch.no_grad()
def answer_ids(
    model: CausalLM,
    template: Template,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    streamer: Any = None,  # a transformers BaseStreamer
    stop_early: Callable[[], bool] | None = None,
) -> list[int]:
    """The ids of one answer, including its stop token. Without `sampling`, equal prompts get equal answers.

    stop_early  called after each token; True ends the answer there
    """
    ids = torch.tensor([prompt_ids(template, messages)], device=model.device)  # [1, T]
    values = (sampling or Sampling()).values()
    if stop_early is not None:
        values["stopping_criteria"] = StoppingCriteriaList([_StopEarly(stop_early)])
    with without_dropout(model):
        written = model.generate(  # [1, T + new]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids(model, template),
            pad_token_id=pad_id_of(template.tokenizer),
            use_cache=True,
            streamer=streamer,
            **values,
        )
    return [int(token) for token in written[0, ids.shape[1] :]]
