"""Prices of known models, from the optional package `genai-prices`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .budget import Prices


def known_prices(model: str, url: str) -> Prices | None:
    """Return the prices of a model, or `None` if they are unknown or `genai-prices` is not installed.

    Args:
        model: Name of the model at the endpoint.
        url: Address of the endpoint. A model with the same name costs something else at another endpoint.
    """
    if importlib.util.find_spec("genai_prices") is None:
        return None
    genai_prices: Any = importlib.import_module("genai_prices")
    tokens = genai_prices.Usage(input_tokens=1, output_tokens=1)
    try:
        price = genai_prices.calc_price(tokens, model, provider_api_url=url).model_price
    except LookupError:
        return None
    sent, received, cached = (_highest(getattr(price, f"{kind}_mtok")) for kind in ("input", "output", "cache_read"))
    return None if sent is None or received is None else Prices(sent, received, cached)


def _highest(price: Any) -> float | None:
    """Return a price per million tokens, the highest one if it depends on the length of the request."""
    if price is None:
        return None
    tiers = [tier.price for tier in getattr(price, "tiers", ())]
    return float(max([getattr(price, "base", price), *tiers]))
