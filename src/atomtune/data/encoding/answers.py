"""Answers: what the template writes after each prompt, up to the stop token, by the shortest way that gives it.

1. Of a plain answer, the template's `form` gives the text, and nothing is rendered.
2. A later prompt of a long conversation holds the answer as history; some answers are rendered too and compared.
3. Any other is rendered with its prompt: `TemplatedRecord.answer_text`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from atomtune.data.encoding.chat_template import AnswerForm, WrittenAnswer
from atomtune.data.encoding.cuts import Cuts, spot_checks, whole, worth_cutting
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import is_no_thought, mentions_thoughts
from atomtune.data.records import Prompt


def answers_of(cuts: Cuts, learned: Sequence[int], prompts: Sequence[Prompt[str]]) -> Iterator[WrittenAnswer]:
    """The answer after each prompt, control strings hidden. Raises CannotExpress at one that cannot be found."""
    in_history = _answers_in_history(cuts, learned, prompts) if worth_cutting(len(learned)) else {}
    for at, prompt in zip(learned, prompts, strict=True):
        yield answer_at(cuts.templated, at, prompt, in_history.get(at))


def answer_at(
    templated: TemplatedRecord, at: int, prompt: Prompt[str], in_history: WrittenAnswer | None = None
) -> WrittenAnswer:
    """The answer at `at`, as its text is tokenized on its own.

    in_history   the answer as a later prompt has it, where that is known
    """
    turn, template = templated.record.turns[at], templated.template
    if turn.role == "text":
        return WrittenAnswer(templated.escaper.hide(turn.text), template.stop)
    form = _form_of(templated, at, prompt)
    if form is not None:
        text, stop = form.written(str(templated.message_of(at)["content"])), template.stop
        begins_with_the_templates_space = form.lead == " "
    else:
        text, stop = in_history or template.ended(templated.answer_text(at, whole(prompt)))
        begins_with_the_templates_space = text.startswith("  ") or not turn.text.startswith(" ")
    if begins_with_the_templates_space:
        text = template.tokens.without_written_space(text)
    return WrittenAnswer(text, stop)


def _form_of(templated: TemplatedRecord, at: int, prompt: Prompt[str]) -> AnswerForm | None:
    """How the answer at `at` is written; None where it has to be rendered to see that."""
    turn, template = templated.record.turns[at], templated.template
    is_plain = not (turn.reasoning or turn.calls or mentions_thoughts(turn.text))
    # After a tool's answer some prompts end in another way than those after a question.
    ends_as_usual = not templated.variables and prompt.asks.endswith(template.asks)
    return template.form if is_plain and ends_as_usual else None


def _answers_in_history(cuts: Cuts, learned: Sequence[int], prompts: Sequence[Prompt[str]]) -> dict[int, WrittenAnswer]:
    """What later prompts hold of the answers before them; those that have to be rendered are left out.

    Prompts that were cut out of one rendering have one history.
    """
    with_history: dict[int, dict[int, Prompt[str]]] = defaultdict(dict)
    for at, prompt in zip(learned, prompts, strict=True):
        with_history[id(prompt.history)][at] = prompt
    answers: dict[int, WrittenAnswer] = {}
    for prompt_of in with_history.values():
        if worth_cutting(len(prompt_of)):
            for alike in _alike_in_history(cuts, prompt_of):
                answers |= _as_the_last_would_be(cuts.templated, prompt_of, alike)
    return answers


def _alike_in_history(cuts: Cuts, prompt_of: Mapping[int, Prompt[str]]) -> list[dict[int, WrittenAnswer]]:
    """The answers that the history of these prompts holds, by kind: with or without calls, text, thoughts."""
    templated = cuts.templated
    last_at, last = max(prompt_of.items())
    question = templated.last_question(last_at)
    alike: dict[tuple[bool, ...], dict[int, WrittenAnswer]] = defaultdict(dict)
    for at, prompt in prompt_of.items():
        thinks = templated.thinks(at)
        may_lack_thoughts = thinks and at < question
        if prompt.length == last.length or may_lack_thoughts or _form_of(templated, at, prompt) is not None:
            continue
        answer = cuts.answer_in(prompt)
        if answer is not None:
            turn = templated.record.turns[at]
            alike[bool(turn.calls), bool(turn.text), thinks][at] = answer
    return list(alike.values())


def _as_the_last_would_be(
    templated: TemplatedRecord, prompt_of: Mapping[int, Prompt[str]], in_history: Mapping[int, WrittenAnswer]
) -> Mapping[int, WrittenAnswer]:
    """Answers of one kind as each would be written if the conversation ended with it.

    A few are rendered. An answer that ends the conversation may begin with empty thoughts, which history leaves out:

        in history    a2<end>
        at the end    <think></think>a2<end>     the others are given the same beginning

    Where one differs in anything else, the rendered ones are all that is known.
    """
    checked = list(spot_checks(list(in_history)))
    rendered = {at: templated.template.ended(templated.answer_text(at, whole(prompt_of[at]))) for at in checked}
    lead = rendered[checked[0]].text.removesuffix(in_history[checked[0]].text)
    answers = {at: answer._replace(text=lead + answer.text) for at, answer in in_history.items()}
    return answers if is_no_thought(lead) and rendered.items() <= answers.items() else rendered
