"""Pages: reports as HTML files that open from disk, and pictures of losses, in the language of the run.

A page loads nothing and runs no script, and texts of records are escaped. Its words are messages, as on the console:
`{{ t("Records") }}`.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from atomtune.disk import replacing
from atomtune.language import language_spoken, message, translated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Fonts with Chinese characters, by matplotlib's names.
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # the first font in the file with all of them
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Noto Serif CJK SC",
    "Noto Serif CJK JP",
)
_FLAG = re.compile(r"(?<!\w)(--[a-z]\w*)")


def rendered(room: str, template: str, **values: Any) -> str:
    """A template of a subpackage, rendered as HTML."""
    source = (resources.files(f"atomtune.{room}") / "html" / template).read_text(encoding="utf-8")
    style = resources.files("atomtune") / "html" / "page.css"  # all pages share one style
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"t": translated, "language": language_spoken()}
    environment.filters["flags_whole"] = flags_whole
    return environment.from_string(source).render(style=style.read_text(encoding="utf-8"), **values)


def flags_whole(text: str) -> Markup:
    """A text with each `--flag` as code, which is not broken across lines; browsers break lines after a hyphen."""
    return Markup(_FLAG.sub(r"<code>\1</code>", str(escape(text))))


@contextlib.contextmanager
def picture(path: Path, *, loss: str, title: str = "") -> Iterator["Axes"]:
    """Yield axes for curves of losses by step, and save them to `path`. loss: label of the vertical axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A name with two dollar signs is not a formula.
    settings = {"font.family": ["DejaVu Sans", *_chinese_fonts()], "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a title may be in any script
        # Small, so that its letters are readable on a phone. pyplot is not used, so that a notebook's figures do not
        # change.
        figure = Figure(figsize=(5.6, 3.6), dpi=150)
        axes = figure.subplots()
        yield axes
        axes.set_xlabel(label(message("step")))
        axes.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )  # no ticks at fractions of a step
        axes.set_ylabel(label(loss))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=9)
        figure.tight_layout()
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix.lstrip(".") or "png")


def label(text: str) -> str:
    """A message in the language in use if this machine has a font for it, else in English."""
    return translated(text) if _chinese_fonts() else text


def _chinese_fonts() -> list[str]:
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _CHINESE_FONTS if name in here]
