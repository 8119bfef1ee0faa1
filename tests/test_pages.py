"""Texts are escaped on pages, and lines do not break after a flag's hyphens."""

from atomtune.pages import flags_whole


def test_flags_are_wrapped_in_code_tags_and_text_is_html_escaped():
    text = flags_whole("try --max_steps 60 <b>, not --2 or a--b")
    assert str(text) == "try <code>--max_steps</code> 60 &lt;b&gt;, not --2 or a--b"
