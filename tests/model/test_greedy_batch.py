"""Law: a batch of answers equals the answers computed one at a time."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from atomtune.model.greedy_batch import generate_answers
from tests.tiny import SIZE

STOP, PAD, LIMIT = 5, 0, 12


@pytest.fixture(params=["llama", "gpt2", "gemma3_text", "mistral"])
def model(request, models):
    # float64: padding on the left only reorders sums, so only a tie closer than 1e-15 could change an answer.
    return AutoModelForCausalLM.from_pretrained(models(request.param), dtype=torch.float64).eval()


def alone(model, prompt: list[int]) -> tuple[list[int], bool]:
    """The simple way: a whole forward for every token, without cache and padding."""
    ids = list(prompt)
    for _ in range(LIMIT):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == STOP:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def prompts_of(beginning: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(10, 300, (beginning,), generator=generator).tolist()
    prompts = [shared + torch.randint(10, 300, (n,), generator=generator).tolist() for n in (3, 17, 1, 8)]
    return [*prompts, shared] if shared else prompts  # the last one is a prefix of all others


either_beginning = pytest.mark.parametrize("beginning", [0, 24], ids=["nothing shared", "24 tokens shared"])


@either_beginning
def test_a_batch_gives_the_same_answers_as_its_prompts_alone(model, beginning):
    prompts = prompts_of(beginning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # catches a name that transformers is about to drop
        together = generate_answers(model, prompts, stop_ids=[STOP], pad_id=PAD, max_new_tokens=LIMIT)
    assert [(list(answer.ids), answer.stopped) for answer in together] == [alone(model, prompt) for prompt in prompts]


@either_beginning
@pytest.mark.parametrize("family", ["minimax", "lfm2"])
def test_stateful_layers_give_the_same_answers_in_a_batch_as_alone(family, beginning):
    # MiniMax's linear attention decays with every position, including padding.
    values = {**SIZE, "head_dim": 8, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "lfm2":
        values |= {"layer_types": ["conv", "full_attention"]}
    else:
        values |= {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 16}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    prompts = prompts_of(beginning)
    together = generate_answers(model, prompts, stop_ids=[STOP], pad_id=PAD, max_new_tokens=LIMIT)
    assert [(list(answer.ids), answer.stopped) for answer in together] == [alone(model, prompt) for prompt in prompts]


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(model):
    (prompt,) = prompts_of(0)[:1]
    (free,) = generate_answers(model, [prompt], stop_ids=[10_000], pad_id=PAD, max_new_tokens=LIMIT)
    assert len(free.ids) == LIMIT and not free.stopped
    stop = free.ids[4]
    (ended,) = generate_answers(model, [prompt], stop_ids=[stop], pad_id=PAD, max_new_tokens=LIMIT)
    assert ended.stopped and ended.ids == free.ids[: free.ids.index(stop)]


def test_the_models_own_generation_config_is_ignored(model):
    prompts = prompts_of(0)
    before = generate_answers(model, prompts, stop_ids=[STOP], pad_id=PAD, max_new_tokens=LIMIT)
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=LIMIT, forced_eos_token_id=7)
    model.generation_config = own
    assert generate_answers(model, prompts, stop_ids=[STOP], pad_id=PAD, max_new_tokens=LIMIT) == before
    assert model.generation_config is own


def test_answers_end_at_the_models_position_limit(models):
    """gpt2's positions are rows of a matrix: the answer to a long prompt ended the evaluation with an index error."""
    model = AutoModelForCausalLM.from_pretrained(models("gpt2"), dtype=torch.float64).eval()
    ids = torch.randint(10, 300, (512,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [ids[:20], ids[:508], ids]
    together = generate_answers(model, prompts, stop_ids=[10_000], pad_id=PAD, max_new_tokens=LIMIT)
    assert [len(answer.ids) for answer in together] == [LIMIT, 4, 0]
    assert list(together[0].ids) == alone(model, prompts[0])[0] and not any(answer.stopped for answer in together)
