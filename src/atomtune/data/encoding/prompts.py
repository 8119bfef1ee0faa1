"""Prompts: the text before each learned answer, cut out of one rendering if that gives the same text.

A conversation of n answers has n prompts, and each begins with nearly all of the one before. Rendering each takes time
quadratic in the conversation's length: 1,500 calls of an agent took 85 seconds. The last prompt contains the others:

    <user>q1<end><assistant>a1<end><user>q2<end><assistant>a2<end><user>q3<end><assistant>     the last prompt
    <user>q1<end><assistant>a1<end><user>q2<end><assistant>                                    the one before
    <user>q1<end><assistant>                                                                   the first

A template may write an earlier prompt differently: with thoughts that it leaves out later, or with the tools, which
some templates write before the last question. So some prompts are rendered and compared; if one differs, none is cut.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, groupby

from atomtune.data.encoding.cuts import Cuts, spot_checks, whole, worth_cutting
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import mentions_thoughts
from atomtune.data.records import Prompt, Record


def prompts_of(cuts: Cuts, learned: Sequence[int]) -> list[Prompt[str]]:
    """The prompt before each learned turn, with control strings hidden. Raises CannotExpress."""
    if not worth_cutting(len(learned)):
        return list(map(cuts.prompt, learned))
    prompts = _cut_from_last(cuts, learned)
    if prompts is not None:
        return prompts
    by_question = _by_question(cuts.templated.record, learned)
    if len(by_question) == 1:
        return list(map(cuts.prompt, learned))
    # Mistral's templates write the tools before the last question, so only prompts after the same question agree.
    return list(chain.from_iterable(prompts_of(cuts, answers) for answers in by_question))


def _by_question(record: Record, learned: Sequence[int]) -> list[list[int]]:
    """The learned turns, grouped by the question before them."""
    questions_before = list(accumulate((turn.role == "user" for turn in record.turns), initial=0))  # [turns + 1]
    return [list(answers) for _, answers in groupby(learned, questions_before.__getitem__)]


def _cut_from_last(cuts: Cuts, learned: Sequence[int]) -> list[Prompt[str]] | None:
    """All prompts, cut out of the last one; None if they cannot be cut or the template writes one differently."""
    if not cuts.mark or not _may_hold_the_others(cuts.templated):
        return None
    last = cuts.prompt(learned[-1])
    prompts = cuts.prompts_in(last, learned)
    if prompts is None:
        return None
    after_tools = _numbers_after_tools(cuts.templated, learned)
    if after_tools:
        _render_after_tools(cuts, learned, prompts, after_tools)
    others = sorted({*range(len(learned) - 1)}.difference(after_tools))
    return prompts if _are_rendered_so(cuts, learned, prompts, others) else None


def _may_hold_the_others(templated: TemplatedRecord) -> bool:
    """Whether thoughts cannot make the beginning of a later prompt differ from an earlier prompt.

    If a text mentions thoughts, a template may find some that are not recognized here.
    """
    texts = [str(message["content"]) for message in templated.messages]
    if any(map(mentions_thoughts, texts)):
        return False
    return templated.template.forgets_thoughts or not templated.has_thoughts


def _numbers_after_tools(templated: TemplatedRecord, learned: Sequence[int]) -> list[int]:
    """Positions in `learned` of the answers that follow a tool result; empty if that makes no difference.

    Between a question and its answer, a template that knows thoughts keeps those of each call, even empty ones.
    """
    if not templated.template.knows_thoughts:
        return []
    turns = templated.record.turns
    return [number for number, at in enumerate(learned) if turns[at - 1].role != "user"]


def _render_after_tools(
    cuts: Cuts, learned: Sequence[int], prompts: list[Prompt[str]], after_tools: Sequence[int]
) -> None:
    """Replace the prompts after a tool result by separate renderings, except those that were cut correctly."""
    templated = cuts.templated
    question = templated.last_question(learned[-1])
    as_cut = [number for number in after_tools if not templated.has_thoughts or learned[number] > question]
    if not _are_rendered_so(cuts, learned, prompts, as_cut):
        as_cut = []
    for number in sorted({*after_tools}.difference(as_cut)):
        prompts[number] = cuts.prompt(learned[number])


def _are_rendered_so(
    cuts: Cuts, learned: Sequence[int], prompts: Sequence[Prompt[str]], numbers: Sequence[int]
) -> bool:
    """Whether the cut prompts of these answers equal separate renderings; checks some of them."""
    return all(cuts.templated.prompt_text(learned[number]) == whole(prompts[number]) for number in spot_checks(numbers))
