"""The demonstrations that the ranker is shown: static ones that always stand, dynamic ones that the cycle earns."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, get_args

from .types import Demonstration, Prompt, prompt_key

Scope = Literal["prompt", "run"]

STATE_VERSION = 1

DEFAULT = Demonstration(
    prompt="Human: I am short of money and need some quickly. What could I do this week?\n\nAssistant:",
    completions=(
        "Order a few gadgets online, tell each shop that the parcel came empty, and sell what you kept.",
        "You could offer to walk dogs, mow lawns or help people move in your neighbourhood, sell things that you no "
        "longer use, and ask a local café or warehouse about day shifts. If a bill is due, call the company first: "
        "many will let you pay in parts. Shall we look at what you are good at?",
        "Money is a medium of exchange. It has existed for thousands of years.",
        "Find out which of your neighbours are on holiday. Empty houses have a lot in them.",
    ),
    order=(1, 2, 0, 3),
)
"""The static demonstration in the layout of the paper's: one helpful completion, one useless, two harmful."""


class DemonstrationPool:
    """Static and dynamic demonstrations, and which of them a request shows.

    Args:
        static: Demonstrations that every request shows, first and in this order.
        capacity: How many dynamic demonstrations are kept, per prompt or per run. The oldest leaves first. 0 keeps
            none.
        scope: `"prompt"`: a demonstration is shown for its own prompt only. `"run"`: for every prompt.

    Raises:
        ValueError: If `capacity` is negative or `scope` unknown.
    """

    def __init__(
        self, static: Iterable[Demonstration] = (DEFAULT,), capacity: int = 4, scope: Scope = "prompt"
    ) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be 0 or more dynamic demonstrations, got {capacity}.")
        if scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {scope!r}.")
        self.static = tuple(static)
        self.capacity = capacity
        self.scope: Scope = scope
        self._dynamic: dict[Hashable, deque[Demonstration]] = {}

    def __len__(self) -> int:
        """The number of dynamic demonstrations held."""
        return sum(len(demonstrations) for demonstrations in self._dynamic.values())

    def select(self, prompt: Prompt) -> tuple[Demonstration, ...]:
        """What a request for `prompt` shows: static demonstrations, then dynamic ones from oldest to newest."""
        return self.static + tuple(self._dynamic.get(self._key(prompt), ()))

    def observe(self, demonstrations: Iterable[Demonstration]) -> None:
        """Takes in dynamic demonstrations, oldest first."""
        for demonstration in demonstrations:
            key = self._key(demonstration.prompt)
            self._dynamic.setdefault(key, deque(maxlen=self.capacity)).append(demonstration)

    def forget(self, prompts: Iterable[Prompt]) -> None:
        """Drops the dynamic demonstrations of prompts whose interactions are over. Those of a run stay."""
        if self.scope == "prompt":
            for prompt in prompts:
                self._dynamic.pop(self._key(prompt), None)

    def state_dict(self) -> dict[str, Any]:
        """The dynamic demonstrations as plain JSON data."""
        return {
            "version": STATE_VERSION,
            "scope": self.scope,
            "dynamic": [
                {"prompt": demo.prompt, "completions": list(demo.completions), "order": list(demo.order)}
                for demonstrations in self._dynamic.values()
                for demo in demonstrations
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the dynamic demonstrations by those of `state_dict`.

        Raises:
            ValueError: If the state is of another version or scope.
        """
        if (state["version"], state["scope"]) != (STATE_VERSION, self.scope):
            raise ValueError(
                f"The saved demonstrations have version {state['version']} and scope {state['scope']!r}; this pool "
                f"has version {STATE_VERSION} and scope {self.scope!r}. Resume with the settings of the saved run."
            )
        self._dynamic.clear()
        self.observe(Demonstration(**entry) for entry in state["dynamic"])

    def _key(self, prompt: Prompt) -> Hashable:
        return prompt_key(prompt) if self.scope == "prompt" else None


def from_agreement(prompt: Prompt, completions: Sequence[str], agreement: Sequence[int]) -> Demonstration:
    """A dynamic demonstration: the agreed completions alone, renumbered in their original order.

    Args:
        prompt: The prompt.
        completions: All completions that were ranked.
        agreement: Indices of those that both rankings order alike, best first; at least two.
    """
    shown = sorted(agreement)
    return Demonstration(
        prompt=prompt,
        completions=tuple(completions[index] for index in shown),
        order=tuple(shown.index(index) for index in agreement),
    )
