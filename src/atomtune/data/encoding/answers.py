"""Answers: what the template writes after each prompt, up to the stop token, with as few renderings as possible.

1. Plain answers follow from the template's `form`, without a rendering.
2. In a long conversation, a later prompt has the answer in its history. Some answers are also rendered, to compare.
3. All others are rendered with their prompt: `TemplatedRecord.answer_text`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from atomtune.data.encoding.chat_template import AnswerForm, WrittenAnswer
from atomtune.data.encoding.cuts import Cuts, space_around, spot_checks, whole, worth_cutting
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import is_no_thought, mentions_thoughts
from atomtune.data.records import Prompt


def answers_of(cuts: Cuts, learned: Sequence[int], prompts: Sequence[Prompt[str]]) -> Iterator[WrittenAnswer]:
    """The answer after each prompt, with control strings hidden. Raises CannotExpress if one cannot be found."""
    in_history = _answers_in_history(cuts, learned, prompts) if worth_cutting(len(learned)) else {}
    for at, prompt in zip(learned, prompts, strict=True):
        yield answer_at(cuts.templated, at, prompt, in_history.get(at))


def answer_at(
    templated: TemplatedRecord, at: int, prompt: Prompt[str], in_history: WrittenAnswer | None = None
) -> WrittenAnswer:
    """The answer at `at`, with its text as it must be tokenized on its own.

    in_history   the answer as written in a later prompt, if that is known
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
    """How the answer at `at` is written; None if it must be rendered to see that."""
    turn, template = templated.record.turns[at], templated.template
    is_plain = not (turn.reasoning or turn.calls or mentions_thoughts(turn.text))
    # The form is that of an answer to a question. Without a question, after another answer or after a tool result, some
    # templates write an answer differently (Qwen3), or refuse the conversation once the answer is there (Gemma).
    answers_a_question = at > 0 and templated.record.turns[at - 1].role == "user"
    ends_as_usual = not templated.variables and prompt.asks.endswith(template.asks)
    return template.form if is_plain and answers_a_question and ends_as_usual else None


def _answers_in_history(cuts: Cuts, learned: Sequence[int], prompts: Sequence[Prompt[str]]) -> dict[int, WrittenAnswer]:
    """Answers as written in the history of later prompts, by turn; without those that must be rendered.

    Prompts that were cut out of one rendering share one history.
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
    """The answers in the history of these prompts, grouped by what may make a template write the last one differently.

    That is whether they have calls, text and thoughts, and the white space around the text.
    """
    templated = cuts.templated
    last_at, last = max(prompt_of.items())
    question = templated.last_question(last_at)
    alike: dict[tuple[bool, bool, bool, str, str], dict[int, WrittenAnswer]] = defaultdict(dict)
    for at, prompt in prompt_of.items():
        thinks = templated.thinks(at)
        may_lack_thoughts = thinks and at < question
        if prompt.length == last.length or may_lack_thoughts or _form_of(templated, at, prompt) is not None:
            continue
        answer = cuts.answer_in(prompt)
        if answer is not None:
            turn = templated.record.turns[at]
            before, after = space_around(turn.text)
            alike[bool(turn.calls), bool(turn.text), thinks, before, after][at] = answer
    return list(alike.values())


def _as_the_last_would_be(
    templated: TemplatedRecord, prompt_of: Mapping[int, Prompt[str]], in_history: Mapping[int, WrittenAnswer]
) -> Mapping[int, WrittenAnswer]:
    """Answers of one kind, each as the template would write it if the conversation ended there.

    A few are rendered. An answer that ends the conversation may begin with empty thoughts, which history leaves out:

        in history    a2<end>
        at the end    <think></think>a2<end>     the others get the same beginning

    If a rendered answer differs in anything else, only the rendered ones are returned.
    """
    checked = list(spot_checks(list(in_history)))
    rendered = {at: templated.template.ended(templated.answer_text(at, whole(prompt_of[at]))) for at in checked}
    lead = rendered[checked[0]].text.removesuffix(in_history[checked[0]].text)
    answers = {at: answer._replace(text=lead + answer.text) for at, answer in in_history.items()}
    return answers if is_no_thought(lead) and rendered.items() <= answers.items() else rendered
