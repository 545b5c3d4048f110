"""A hook of the site's build: formulas become MathML, which browsers draw without a script from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<latex>.*?)</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """A page with its formulas drawn."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    r"""\(...\) or \[...\] as MathML, in the element that it stood in."""
    latex = html.unescape(match["latex"]).strip()
    drawn = convert(latex[2:-2], display="block" if match["tag"] == "div" else "inline")
    return f'<{match["tag"]} class="arithmatex">{drawn}</{match["tag"]}>'
