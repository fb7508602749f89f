"""Prices from the optional package `genai-prices`."""

import sys
import types
from decimal import Decimal
from types import SimpleNamespace as Namespace

import pytest

from cyclealign_trl.chat.budget import Prices
from cyclealign_trl.chat.known_prices import known_prices
from cyclealign_trl.rankers.llm import LLMRanker

OPENAI = "https://api.openai.com/v1"
TIERS = Namespace(base=Decimal("1.25"), tiers=[Namespace(start=200_000, price=Decimal("2.5"))])
PRICES = {
    "gpt-5-mini": Namespace(input_mtok=Decimal("0.25"), output_mtok=Decimal(2), cache_read_mtok=Decimal("0.025")),
    "no-cache": Namespace(input_mtok=Decimal(1), output_mtok=Decimal(2), cache_read_mtok=None),
    "tiers": Namespace(input_mtok=TIERS, output_mtok=Decimal(10), cache_read_mtok=None),
    "per-request": Namespace(input_mtok=None, output_mtok=None, cache_read_mtok=None),
}


@pytest.fixture
def package(monkeypatch):
    """Install a small `genai_prices` with the interface of the real one."""

    def calc_price(usage, model_ref, *, provider_api_url):
        if provider_api_url != OPENAI or model_ref not in PRICES:
            raise LookupError(model_ref)
        return Namespace(model_price=PRICES[model_ref])

    module = types.ModuleType("genai_prices")
    module.__spec__ = Namespace(name="genai_prices")
    module.calc_price, module.Usage = calc_price, lambda **counts: Namespace(**counts)
    monkeypatch.setitem(sys.modules, "genai_prices", module)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("model", "url", "prices"),
    [
        ("gpt-5-mini", OPENAI, Prices(0.25, 2.0, 0.025)),
        ("no-cache", OPENAI, Prices(1.0, 2.0)),
        ("tiers", OPENAI, Prices(2.5, 10.0)),
        ("per-request", OPENAI, None),
        ("unknown", OPENAI, None),
        ("gpt-5-mini", "http://localhost:8000/v1", None),
    ],
)
def test_looks_up_the_model_at_its_endpoint(model, url, prices):
    assert known_prices(model, url) == prices
    ranker = LLMRanker(model, url, api_key="sk-none")
    assert ranker.budget.prices == prices


@pytest.mark.usefixtures("package")
def test_a_cap_needs_no_prices_for_a_known_model(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert LLMRanker("gpt-5-mini", api_key="sk-none", max_cost=1.0).budget.prices == Prices(0.25, 2.0, 0.025)
    own = LLMRanker("gpt-5-mini", api_key="sk-none", prices={"input": 9, "output": 9})
    assert own.budget.prices == Prices(9, 9)
    with pytest.raises(ValueError, match=r"needs the prices.*cyclealign-trl\[prices\]"):
        LLMRanker("unknown", api_key="sk-none", max_cost=1.0)


def test_without_the_package_prices_are_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    assert LLMRanker("gpt-5-mini", OPENAI, api_key="sk-none").budget.prices is None


def test_the_real_package_has_the_same_interface():
    pytest.importorskip("genai_prices")
    prices = known_prices("gpt-5-mini", OPENAI)
    assert prices.output > prices.input > prices.cached_input > 0
    assert known_prices("gpt-5-mini", "http://localhost:8000/v1") is None
