"""transformers in this process: makes the same calls as its server, without a server and without code of ours."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atomtune.engines.engine import OF_ANOTHER_BASE, EngineReply, Request, UnknownTokens
from atomtune.engines.served_folder import ServedFolder
from atomtune.errors import BadModel


class TransformersInProcess:
    """A tokenizer and a model, loaded as anyone would load them from a folder with an adapter or a merged model."""

    name = "in-process"
    version = f"transformers {transformers.__version__}"

    def __init__(self, served: ServedFolder, *, dtype: str, trust_remote_code: bool = False) -> None:
        self.served, self.dtype, self.trust_remote_code = served, dtype, trust_remote_code
        self.folder = served.folder

    def __enter__(self) -> "TransformersInProcess":
        self.folder = self.served.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.__dict__.pop("model", None)
        self.served.__exit__(*exc)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        if not tokenizer.chat_template:
            raise BadModel(
                f"{self.served.folder}: there is no chat template in it, so an engine cannot write a conversation for "
                "this model. Pass --served with a folder that `atomtune merge` wrote."
            )
        return tokenizer

    @cached_property
    def model(self) -> Any:
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        # As in `transformers serve`: a vision-language checkpoint is loaded as a whole, also for text.
        named = (config.architectures or [""])[0]
        served_class = getattr(transformers, named, AutoModelForCausalLM)
        return served_class.from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype), trust_remote_code=self.trust_remote_code
        ).eval()

    def prompt_ids(self, request: Request) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            list(request.messages),
            tools=list(request.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **request.variables,
        )
        return list(encoded["input_ids"])

    @torch.no_grad()
    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        if max(*prompt, *answer) >= self.model.get_input_embeddings().weight.shape[0]:
            raise UnknownTokens(OF_ANOTHER_BASE)
        ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # [A, V]
        scores = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        return scores.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()

    @torch.no_grad()
    def chat(self, request: Request, *, max_tokens: int) -> EngineReply:
        prompt = self.prompt_ids(request)
        ids = torch.tensor([prompt], device=self.model.device)
        written = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )[0, len(prompt) :]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return EngineReply(text, stopped=len(written) < max_tokens, prompt_tokens=len(prompt))
