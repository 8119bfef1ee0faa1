"""No text becomes a tag or a picture on the page. The oracle is another implementation of Markdown, markdown-it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from atomtune.serve.markdown import as_code, as_markdown, from_markdown

MARKDOWN = MarkdownIt("commonmark")
PIECES = ("<b>", "![p](http://x/y)", "`", "``", "```", "```py", "~~~", "\\", "\n", "\n\n", " ", "a", "&lt;", "&#33;[")
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
every_time = settings(derandomize=True, database=None, deadline=None, max_examples=400)


def kinds(markdown: str) -> set[str]:
    """The kinds of all tokens of a rendered text."""
    tokens = MARKDOWN.parse(markdown)
    return {inner.type for token in tokens for inner in (token, *(token.children or ()))}


@every_time
@given(text=texts)
@example("`` <b> `")  # two runs of another length are no code
@example("\\`<b>\\`")  # nor are escaped backticks
@example("```\na\n```py\nb\n```\n<b>")  # a fence with a language closes none
@example("~~~\n```\n~~~\n<b>")
@example("a ``` b <b>")
def test_no_tag_or_picture_of_a_text_is_rendered(text):
    assert not kinds(as_markdown(text)) & {"html_inline", "html_block", "image"}


@every_time
@given(text=texts)
def test_an_edited_question_is_the_text_that_was_typed(text):
    assert from_markdown(as_markdown(text)) == text


@pytest.mark.parametrize(
    "text",
    ["`<b>`", "``a ` <b>``", "```html\n<b>&</b>\n```", "1. so:\n   ```\n   <b>\n   ```", "```\n<b>", "~~~\n<b>\n~~~"],
)
def test_code_is_shown_as_it_is(text):
    assert as_markdown(text) == text


@pytest.mark.parametrize("text", ["plain", "a ` b", "Use ``x`` and <b>", "```", "`", "two\nlines"])
def test_a_text_as_code_is_one_piece_of_code(text):
    (paragraph,) = [token for token in MARKDOWN.parse(f"**{as_code(text)}** end") if token.type == "inline"]
    assert [child.content for child in paragraph.children if child.type == "code_inline"] == [" ".join(text.split())]
