"""Spending: prices, caps on dollars and tokens, and each process's share of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import NamedTuple

from ..types import Usage
from . import forks
from .ledger import Ledger

BUDGET_EXHAUSTED = "budget_exhausted"
"""Reason of the failure of a request that was not made because it could exceed a cap."""

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per million tokens.

    Args:
        input: Price of tokens sent.
        output: Price of tokens received.
        cached_input: Price of tokens sent that the endpoint reads from its cache. `None` means the price of `input`.

    Raises:
        ValueError: If a price is negative or not finite.
    """

    input: float
    output: float
    cached_input: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached_input"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise ValueError(f"Prices must be at least 0 US dollars per million tokens, got {name}={price}.")

    def cost(self, usage: Usage) -> float:
        """Return the price of the tokens in US dollars."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_price = self.input if self.cached_input is None else self.cached_input
        dollars = (usage.prompt_tokens - cached) * self.input + cached * cached_price
        return (dollars + usage.completion_tokens * self.output) / _MILLION


class Amount(NamedTuple):
    """Dollars and tokens. Without prices, the dollars are those that the endpoint reported."""

    cost: float = 0.0
    tokens: float = 0


class Budget:
    """Account of what a run has spent, with caps on dollars and tokens.

    Each call is reserved at the most that it can use, and settled at what it used. A cap is therefore exceeded only
    by as much as calls in flight use more than was reserved for them. All methods are safe to call from any thread.

    Several processes share the caps: in equal parts at first, then as `share_out` divides what is left.

    Args:
        max_cost: Maximum to spend in US dollars, over all processes. `None` means no cap.
        max_tokens: Maximum number of tokens to send and receive, over all processes. `None` means no cap.
        prices: Prices of tokens. `None` counts only the costs that the endpoint reports.
        num_processes: Number of processes that share the caps.

    Raises:
        ValueError: If a cap is not positive, or if `max_cost` is given without `prices`.
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
                raise ValueError(f"`{name}` must be positive and finite, or None for no cap, got {cap}.")
        if max_cost is not None and prices is None:
            raise ValueError(
                f"`max_cost`={max_cost} needs the prices of the endpoint. Pass `prices` in US dollars per million "
                'tokens, such as {"input": 0.25, "cached_input": 0.025, "output": 2.0}. For known models, '
                "pip install 'cyclealign-trl[prices]' looks them up."
            )
        self.prices = prices
        self._caps = Amount(max_cost or math.inf, max_tokens or math.inf)
        self._share = Amount(self._caps.cost / num_processes, self._caps.tokens / num_processes)
        self._spent = Amount()
        self._reserved = Amount()
        self._num_reserved = 0  # calls in flight
        self._other_processes = Amount()  # spent or reserved, at the time of the last `share_out`
        self._ledger: Ledger | None = None
        self._unwritten: dict[bool, Usage] = {}  # spent before `keep_ledger`, by whether its cost is known
        self._lock = threading.Lock()
        forks.register(self)

    def rebuild_after_fork(self) -> None:
        """Forget the calls that the parent process has in flight. From here on, both processes count separately."""
        self._lock = threading.Lock()
        self._reserved, self._num_reserved = Amount(), 0

    def __str__(self) -> str:
        spent = _sum([self.committed, self._other_processes])
        dollars = f"${spent.cost:,.4g}" + ("" if math.isinf(self._caps.cost) else f" of max_cost={self._caps.cost:g}")
        cap = "" if math.isinf(self._caps.tokens) else f" of max_run_tokens={self._caps.tokens:,.0f}"
        tokens = f"{spent.tokens:,.0f}{cap} tokens"
        return tokens if self.prices is None and not spent.cost else f"{dollars} and {tokens}"

    @property
    def committed(self) -> Amount:
        """Amount that this process has spent, or reserved for calls in flight."""
        with self._lock:
            return _sum([self._spent, self._reserved])

    def priced(self, usage: Usage) -> Usage:
        """Return the usage with its cost: as reported, else computed from the prices, else unknown."""
        if usage.cost is not None or self.prices is None:
            return usage
        return replace(usage, cost=self.prices.cost(usage))

    def describe(self, usage: Usage) -> str:
        """Return a text with the tokens of a usage, and with its dollars if they are known."""
        amount = self._amount(usage)
        tokens = f"{amount.tokens:,.0f} tokens"
        return tokens if self.priced(usage).cost is None else f"${amount.cost:,.4g} and {tokens}"

    def reserve(self, expected: Usage) -> bool | None:
        """Reserve the most that a call can use.

        Returns:
            `True` if the call is reserved, and `False` if it exceeds a cap. `None` if it fits only in case that calls
            in flight use less than their reservations: try again when one of them is settled.
        """
        amount = self._amount(expected)
        with self._lock:
            if _fits(_sum([self._spent, self._reserved, amount]), self._share):
                self._reserved = _sum([self._reserved, amount])
                self._num_reserved += 1
                return True
            return None if self._num_reserved and _fits(_sum([self._spent, amount]), self._share) else False

    def settle(self, expected: Usage, taken: Usage) -> None:
        """Replace the reservation of a call by what it took.

        Args:
            expected: The usage that was reserved.
            taken: The usage of the call.
        """
        taken = self.priced(taken)
        reserved, amount = self._amount(expected), self._amount(taken)
        with self._lock:
            self._num_reserved -= 1
            self._reserved = _difference(self._reserved, reserved) if self._num_reserved else Amount()
            self._spent = _sum([self._spent, amount])
            if self._ledger is None:
                known = taken.cost is not None
                counted = replace(taken, cost=amount.cost) if known else taken
                self._unwritten[known] = self._unwritten.get(known, Usage(attempts=0)) + counted
            elif any(amount):
                self._ledger.write(taken)

    def share_out(self, committed: Iterable[Amount]) -> None:
        """Divide what is left of the caps equally among the processes.

        Args:
            committed: The amount that each process has committed, including this one.
        """
        amounts = list(committed)
        total = _sum(amounts)
        with self._lock:
            own = _sum([self._spent, self._reserved])
            self._other_processes = _difference(total, own)
            self._share = Amount(
                *(
                    own_amount + max(0.0, cap - total_amount) / len(amounts)
                    for own_amount, cap, total_amount in zip(own, self._caps, total, strict=True)
                )
            )

    def keep_ledger(self, folder: str | PathLike[str], process_index: int = 0, num_processes: int = 1) -> None:
        """Record all spending in a folder, and count what earlier parts of the run have recorded there.

        Args:
            folder: Folder of the run's ledgers, created if missing.
            process_index: Index of this process.
            num_processes: Number of processes in the run. If an earlier part had more, their ledgers are divided among
                the processes.
        """
        ledger = Ledger(folder, process_index, num_processes)
        with self._lock:
            for usage in self._unwritten.values():
                if any(self._amount(usage)):
                    ledger.write(usage)
            self._unwritten = {}
            self._ledger = ledger
            self._spent = _sum(self._amount(usage) for usage in ledger.read())

    def _amount(self, usage: Usage) -> Amount:
        """Return what counts against the caps. Of a reported cost and the one at our prices, the larger counts."""
        priced = 0.0 if self.prices is None else self.prices.cost(usage)
        return Amount(max(usage.cost or 0.0, priced), usage.prompt_tokens + usage.completion_tokens)


def make_prices(prices: Prices | Mapping[str, float] | None) -> Prices | None:
    """Build prices from a mapping, such as one from YAML.

    Raises:
        ValueError: If the mapping has an unknown key, or lacks a required one.
    """
    if prices is None or isinstance(prices, Prices):
        return prices
    try:
        return Prices(**prices)
    except TypeError:
        raise ValueError(
            "`prices` must have the keys `input`, `output` and, optionally, `cached_input`, in US dollars per million "
            f"tokens, got {dict(prices)}."
        ) from None


def _sum(amounts: Iterable[Amount]) -> Amount:
    costs, tokens = zip(Amount(), *amounts, strict=True)
    return Amount(math.fsum(costs), sum(tokens))


def _difference(amount: Amount, other: Amount) -> Amount:
    return Amount(amount.cost - other.cost, amount.tokens - other.tokens)


def _fits(amount: Amount, cap: Amount) -> bool:
    return amount.cost <= cap.cost and amount.tokens <= cap.tokens
