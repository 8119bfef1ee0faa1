"""Ledger notices: what became of a run's records, and what a user may not expect of them."""

from collections.abc import Iterator

from atomtune.choices import RUN_RECORD
from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.data.ledger import Ledger, first_few
from atomtune.errors import listing


def say_ledger(ledger: Ledger, template: Template, console: Console) -> None:
    """Print what became of the records in one line, and a notice for each thing a user may not expect."""
    console.say(
        f"{ledger.records_read:,} records read ({ledger.format}), {ledger.records_used:,} used, "
        f"{len(ledger.records_refused):,} refused, {ledger.records_cut:,} shortened; "
        f"{ledger.prompt_tokens:,} prompt and {ledger.target_tokens:,} target tokens; "
        f"template {template.name}, stops at {template.stop}."
    )
    for notice in (*ledger.sentences(), *_about_template(ledger, template), *_about_records(ledger)):
        console.notice(notice)


def _about_template(ledger: Ledger, template: Template) -> Iterator[str]:
    if ledger.split_origins:
        yield (
            f"template {template.name} writes an earlier answer differently once another turn follows it. In these "
            "records every answer is therefore an example of its own, with the prompt that a server would send: "
            f"{first_few(ledger.split_origins, all_in=RUN_RECORD)}."
        )
    if template.why:
        yield f"{template.why}."
    thoughts = template.about_thoughts(ledger.records_used, ledger.records_with_thoughts)
    if thoughts and not ledger.records_with_thoughts:
        yield f"{thoughts}."
    if not template.writes_bos:
        yield (
            f"template {template.name} does not begin with {template.tokenizer.bos_token}, the tokenizer's "
            "beginning-of-text token. Training leaves it out, as a server with this template does."
        )
    if template.unknown_controls:
        yield (
            f"template {template.name} uses {', '.join(template.unknown_controls)}, which this tokenizer does not have "
            "as control tokens: they are read as plain text. Another --template suits this model better."
        )


def _about_records(ledger: Ledger) -> Iterator[str]:
    if ledger.records_copied:
        yield f"Exact copies of earlier records: {ledger.records_copied:,}. Copies are trained on as well."
    if ledger.cut_origins:
        yield f"shortened to fit --max_seq_length: {first_few(ledger.cut_origins, all_in=RUN_RECORD)}."
    if ledger.control_origins:
        yield (
            "the text of these records contains control tokens such as an end-of-turn mark; they are kept as plain "
            f"text: {first_few(ledger.control_origins, all_in=RUN_RECORD)}."
        )
    if ledger.unknown_tokens:
        yield (
            f"{ledger.unknown_tokens:,} target tokens are the unknown token: this tokenizer cannot write that text, "
            "and the model learns the unknown token in its place."
        )
    if ledger.shared_instruction is not None:
        yield "nearly all records share one instruction; it is stored with the adapter as chat's default."
    refused = [f"{refusal.origin}  {refusal.reason}" for refusal in ledger.records_refused if not refusal.broken]
    if refused:
        yield f"not trained on:\n{listing(refused, 5)}"
