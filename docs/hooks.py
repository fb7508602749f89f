"""Equations of ```math blocks as MathML: browsers draw it themselves, without a script or a network."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def _mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Has the fences of the Markdown pages drawn by this file."""
    fence = {"name": "math", "class": "math", "format": _mathml}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config
