"""Make ``src/atomtune/demo/base``: a Llama of about two million weights that answers simple questions plainly.

``python tools/make_demo_base.py`` builds the corpus (``demo_text.py``), trains the SentencePiece tokenizer, pretrains
the model from seeded weights and writes the folder. Nothing is downloaded. The shipped weights were made with torch
2.13.0+cpu, transformers 5.23.0, sentencepiece 0.2.3 and tokenizers 0.23.3, seed 7, one thread (several threads add sums
in another order, which rounds differently). A second run gave the same tokenizer byte for byte; the weights
were made only once.
"""

import argparse
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from demo_text import Dialogue, corpus_lines, dialogues, tokenizer_lines
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

TARGET = Path(__file__).parents[1] / "src" / "atomtune" / "demo" / "base"
VOCABULARY = 2000
LONGEST = 512
IGNORED = -100


def train_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece BPE tokenizer like Llama's, saved as tokenizer.model and as tokenizer.json."""
    proto = io.BytesIO()  # a file would contain its own path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_lines()),
        model_writer=proto,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentencepiece_length=9,
        num_threads=1,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(proto.getvalue())
    (folder / "tokenizer.json").unlink(missing_ok=True)  # an older one would be loaded in place of the new model
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=False)
    tokenizer.model_max_length = LONGEST
    for key in ("is_local", "local_files_only", "add_prefix_space"):  # they say how it was loaded here
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """A small Atom-7B-Chat: Llama blocks, but tied embeddings, because the vocabulary is a fifth of the weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def encode(sample: Dialogue | str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids and the length of the prompt; prompt and answer are tokenized separately, as atomtune does."""
    prompt, answer = ("<s>", sample) if isinstance(sample, str) else (sample.prompt, sample.output)
    head = tokenizer(prompt, add_special_tokens=False).input_ids
    tail = tokenizer(answer, add_special_tokens=False).input_ids
    return [*head, *tail, tokenizer.eos_token_id], len(head)


def batches(samples: list[tuple[list[int], int]], size: int, rng: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches of samples with similar lengths, so that there is almost no padding."""
    ordered = sorted(samples, key=lambda sample: (len(sample[0]), rng.random()))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    rng.shuffle(groups)
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        weights = torch.zeros(len(group), width)
        for row, (tokens, head) in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            weights[row, :head] = 0.3  # questions are learned too, but with less weight: they are never generated
            weights[row, head : len(tokens)] = 1.0
        yield {"ids": ids, "weights": weights}


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted next-token loss. Padding on the right has weight zero and needs no mask under causal attention."""
    logits = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1].float()
    weights = batch["weights"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, passes: int, rng: random.Random) -> None:
    """Train for ``passes`` passes over newly drawn dialogues and the plain text: AdamW, one-cycle schedule."""
    plain = [encode(line, tokenizer) for line in corpus_lines("plain.txt")] * 2
    rounds = [[encode(sample, tokenizer) for sample in dialogues(rng)] + plain for _ in range(passes)]
    steps = sum(-(-len(samples) // 64) for samples in rounds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.06)
    started, step = time.monotonic(), 0
    model.train()
    for samples in rounds:
        for batch in batches(samples, 64, rng):
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 100 == 0 or step == steps:
                print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Write tokenizer, weights and configuration to the target folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--passes", type=int, default=10, help="passes over the corpus")
    parser.add_argument("--threads", type=int, default=1, help="more is faster, but gives slightly other weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.target.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.target)
    model = new_model(len(tokenizer))
    pretrain(model, tokenizer, options.passes, random.Random(options.seed))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=False, max_new_tokens=60)
    model.to(torch.bfloat16).save_pretrained(options.target)
    print(f"{sum(p.numel() for p in model.parameters())} weights in {options.target}")


if __name__ == "__main__":
    main()
