"""What may be spent: prices, caps on dollars and tokens, and each process's part of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import NamedTuple

from ..types import Usage
from .ledger import Ledger

BUDGET_EXHAUSTED = "budget_exhausted"
"""Why a request was not made: another one might have cost more than is left."""

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per million tokens.

    Args:
        input: For tokens sent.
        output: For tokens received.
        cached_input: For tokens sent that the endpoint had read before. `None` means as for others.

    Raises:
        ValueError: If a price is negative or no number.
    """

    input: float
    output: float
    cached_input: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached_input"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise ValueError(f"A price is in US dollars per million tokens, 0 or more; got {name}={price}.")

    def cost(self, usage: Usage) -> float:
        """What so many tokens cost, in US dollars."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_price = self.input if self.cached_input is None else self.cached_input
        dollars = (usage.prompt_tokens - cached) * self.input + cached * cached_price
        return (dollars + usage.completion_tokens * self.output) / _MILLION


class Amount(NamedTuple):
    """Dollars and tokens. Without prices, dollars are those that the endpoint stated."""

    cost: float = 0.0
    tokens: float = 0


class Budget:
    """Counts what is spent, reserves what may be, and says when the next call could pass a cap.

    A call is reserved at the most that it may take and settled at what it took, so that a cap is passed by no more
    than the reserved calls were underestimated. Any number of threads may use it.

    Of several processes, each has its part: an equal one at first, then whatever `share_out` says.

    Args:
        max_cost: US dollars that may be spent, over all processes. `None` means no cap.
        max_tokens: Tokens that may be sent and received, over all processes. `None` means no cap.
        prices: What tokens cost. `None` means that only the endpoint can say.
        num_processes: Processes that share the caps.

    Raises:
        ValueError: If a cap is not above 0, or `max_cost` is given and `prices` are not.
    """

    def __init__(
        self,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        prices: Prices | None = None,
        num_processes: int = 1,
    ) -> None:
        for name, cap in (("max_cost", max_cost), ("max_run_tokens", max_tokens)):
            if cap is not None and not 0 < cap < math.inf:
                raise ValueError(f"`{name}` must be above 0, or None for no cap; got {cap}.")
        if max_cost is not None and prices is None:
            raise ValueError(
                f"`max_cost`={max_cost} needs the prices that the endpoint charges: pass `prices` in US dollars per "
                'million tokens, such as {"input": 0.25, "cached_input": 0.025, "output": 2.0}.'
            )
        self.prices = prices
        self._caps = Amount(max_cost or math.inf, max_tokens or math.inf)
        self._part = Amount(self._caps.cost / num_processes, self._caps.tokens / num_processes)
        self._spent = Amount()
        self._reserved = Amount()
        self._open = 0  # calls that something is reserved for
        self._elsewhere = Amount()  # spent or reserved by other processes, when they were last heard of
        self._ledger: Ledger | None = None
        self._unwritten = Usage(attempts=0)  # spent before there was a ledger
        self._lock = threading.Lock()

    def __str__(self) -> str:
        spent = _sum([self.committed, self._elsewhere])
        dollars = f"${spent.cost:,.4g}" + ("" if math.isinf(self._caps.cost) else f" of max_cost={self._caps.cost:g}")
        cap = "" if math.isinf(self._caps.tokens) else f" of max_run_tokens={self._caps.tokens:,.0f}"
        tokens = f"{spent.tokens:,.0f}{cap} tokens"
        return tokens if self.prices is None and not spent.cost else f"{dollars} and {tokens}"

    @property
    def committed(self) -> Amount:
        """What this process has spent, and reserved for calls in flight."""
        with self._lock:
            return _sum([self._spent, self._reserved])

    def priced(self, usage: Usage) -> Usage:
        """The usage with its cost: as stated, else by the prices, else unknown."""
        if usage.cost is not None or self.prices is None:
            return usage
        return replace(usage, cost=self.prices.cost(usage))

    def describe(self, usage: Usage) -> str:
        """A usage in words: dollars, where they are known, and tokens."""
        amount = self._amount(usage)
        tokens = f"{amount.tokens:,.0f} tokens"
        return tokens if self.priced(usage).cost is None else f"${amount.cost:,.4g} and {tokens}"

    def reserve(self, expected: Usage) -> bool | None:
        """Reserves the most that a call may take.

        Returns:
            Whether it is reserved. `None` means that it would fit if calls in flight took less than is reserved for
            them: ask again when one is settled.
        """
        amount = self._amount(expected)
        with self._lock:
            if _fits(_sum([self._spent, self._reserved, amount]), self._part):
                self._reserved = _sum([self._reserved, amount])
                self._open += 1
                return True
            return None if self._open and _fits(_sum([self._spent, amount]), self._part) else False

    def settle(self, expected: Usage, taken: Usage) -> None:
        """Puts what a call took in the place of what was reserved for it."""
        taken = self.priced(taken)
        reserved, amount = self._amount(expected), self._amount(taken)
        with self._lock:
            self._open -= 1
            self._reserved = _difference(self._reserved, reserved) if self._open else Amount()
            self._spent = _sum([self._spent, amount])
            if self._ledger is None:
                self._unwritten = self._unwritten + taken
            elif any(amount):
                self._ledger.write(taken)

    def share_out(self, committed: Iterable[Amount]) -> None:
        """Gives this process an equal part of what is left.

        Args:
            committed: What each process has spent and reserved, this one included.
        """
        amounts = list(committed)
        total = _sum(amounts)
        with self._lock:
            own = _sum([self._spent, self._reserved])
            self._elsewhere = _difference(total, own)
            self._part = Amount(
                *(
                    mine + max(0.0, cap - all_of_it) / len(amounts)
                    for mine, cap, all_of_it in zip(own, self._caps, total, strict=True)
                )
            )

    def keep_ledger(self, folder: str | PathLike[str], process_index: int = 0, num_processes: int = 1) -> None:
        """Starts or continues a run: what is spent is written to a folder, and counts from what stands there.

        Args:
            folder: The run's folder of ledgers.
            process_index: This process.
            num_processes: Processes of the run. Ledgers of others, from when there were more, are divided among them.
        """
        ledger = Ledger(folder, process_index, num_processes)
        with self._lock:
            if any(self._amount(self._unwritten)):
                ledger.write(self._unwritten)
            self._unwritten = Usage(attempts=0)
            self._ledger = ledger
            self._spent = _sum(self._amount(usage) for usage in ledger.read())

    def _amount(self, usage: Usage) -> Amount:
        return Amount(self.priced(usage).cost or 0.0, usage.prompt_tokens + usage.completion_tokens)


def make_prices(prices: Prices | Mapping[str, float] | None) -> Prices | None:
    """The prices that a mapping, such as one from YAML, describes.

    Raises:
        ValueError: If it names another price than there are, or lacks one.
    """
    if prices is None or isinstance(prices, Prices):
        return prices
    try:
        return Prices(**prices)
    except TypeError:
        raise ValueError(
            "`prices` are `input`, `output` and, if it differs, `cached_input`, in US dollars per million tokens; "
            f"got {dict(prices)}."
        ) from None


def _sum(amounts: Iterable[Amount]) -> Amount:
    costs, tokens = zip(Amount(), *amounts, strict=True)
    return Amount(math.fsum(costs), sum(tokens))


def _difference(amount: Amount, part: Amount) -> Amount:
    return Amount(amount.cost - part.cost, amount.tokens - part.tokens)


def _fits(amount: Amount, part: Amount) -> bool:
    return all(one <= most for one, most in zip(amount, part, strict=True))
