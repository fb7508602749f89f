"""Render equations and the docstring grammar of TRL on the pages of the site."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

# "`int`, *optional*, defaults to `3`" in the type column, and "[`RankingConfig`]" or "[`~module.Name`]" in texts.
_OPTIONAL = re.compile(r"<code>`([^`]+)`, \*optional\*, defaults to `([^`]+)`</code>")
_OR_NONE = re.compile(r"<code>`(\w+)` or `None`, \*optional\*, defaults to `([^`]+)`</code>")
_REFERENCE = re.compile(r"\[<code>(?:~[\w.]+\.)?(\w+)</code>\]")


def _mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Convert ```math blocks to MathML, which browsers draw without a script or a network."""
    fence = {"name": "math", "class": "math", "format": _mathml}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Render the types, defaults and references of TRL's docstring grammar."""
    html = _OR_NONE.sub(r"<code>\1</code> or <code>None</code>, default <code>\2</code>", html)
    html = _OPTIONAL.sub(r"<code>\1</code>, default <code>\2</code>", html)
    return _REFERENCE.sub(r"<code>\1</code>", html)
