"""The demonstrations that the ranker is shown: static ones that always stand, dynamic ones that the cycle earns."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..types import Demonstration, Prompt, prompt_key

Scope = Literal["prompt", "run"]
Selection = Literal["recent", "random"]

STATE_VERSION = 2

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


@dataclass
class _Group:
    """The dynamic demonstrations that are shown together, oldest first, and how many there ever were."""

    observed: int = 0
    demonstrations: list[Demonstration] = field(default_factory=list)


class DemonstrationPool:
    """Static and dynamic demonstrations, and which of them a request shows.

    Args:
        static: Demonstrations that every request shows, first and in this order.
        capacity: How many dynamic demonstrations are kept, per prompt or per run. 0 keeps none.
        scope: `"prompt"`: a demonstration is shown for its own prompt only. `"run"`: for every prompt.
        selection: `"recent"`: the oldest demonstration leaves first. `"random"`: those kept are a uniform sample of
            all that were ever observed, per prompt or per run (reservoir sampling).
        seed: Seed of the random selection. Pools of one seed that observe the same keep the same.

    Raises:
        ValueError: If `capacity` is negative, or `scope` or `selection` unknown.
    """

    def __init__(
        self,
        static: Iterable[Demonstration] = (DEFAULT,),
        capacity: int = 4,
        scope: Scope = "prompt",
        selection: Selection = "recent",
        seed: int = 0,
    ) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must be 0 or more dynamic demonstrations, got {capacity}.")
        if scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {scope!r}.")
        if selection not in get_args(Selection):
            raise ValueError(f"selection must be one of {get_args(Selection)}, got {selection!r}.")
        self.static = tuple(static)
        self.capacity = capacity
        self.scope: Scope = scope
        self.selection: Selection = selection
        self.seed = seed
        self._dynamic: dict[Hashable, _Group] = {}

    def __len__(self) -> int:
        """The number of dynamic demonstrations held."""
        return sum(len(group.demonstrations) for group in self._dynamic.values())

    def select(self, prompt: Prompt) -> tuple[Demonstration, ...]:
        """What a request for `prompt` shows: static demonstrations, then dynamic ones from oldest to newest."""
        group = self._dynamic.get(self._key(prompt), _Group())
        return (*self.static, *group.demonstrations)

    def observe(self, demonstrations: Iterable[Demonstration]) -> None:
        """Takes in dynamic demonstrations, oldest first."""
        for demonstration in demonstrations:
            key = self._key(demonstration.prompt)
            group = self._dynamic.setdefault(key, _Group())
            group.observed += 1
            group.demonstrations.append(demonstration)
            if len(group.demonstrations) > self.capacity:
                del group.demonstrations[self._leaving(key, group.observed)]

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
            "selection": self.selection,
            "dynamic": [
                {
                    "observed": group.observed,
                    "demonstrations": [
                        {"prompt": demo.prompt, "completions": list(demo.completions), "order": list(demo.order)}
                        for demo in group.demonstrations
                    ],
                }
                for group in self._dynamic.values()
                if group.demonstrations
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the dynamic demonstrations by those of `state_dict`; of more than `capacity`, the newest stay.

        Raises:
            ValueError: If the state is of another version, scope or selection.
        """
        saved = (state["version"], state["scope"], state.get("selection"))
        if saved != (STATE_VERSION, self.scope, self.selection):
            raise ValueError(
                f"The saved demonstrations have version {saved[0]}, scope {saved[1]!r} and selection {saved[2]!r}; "
                f"this pool has version {STATE_VERSION}, scope {self.scope!r} and selection {self.selection!r}. "
                "Resume with the settings of the saved run."
            )
        self._dynamic.clear()
        for entry in state["dynamic"]:
            demonstrations = [Demonstration(**demo) for demo in entry["demonstrations"]]
            excess = max(0, len(demonstrations) - self.capacity)
            group = _Group(entry["observed"], demonstrations[excess:])
            self._dynamic[self._key(demonstrations[0].prompt)] = group

    def _leaving(self, key: Hashable, observed: int) -> int:
        """Position of the one that leaves when there is one too many; the newcomer stands last."""
        if self.selection == "recent":
            return 0
        # Algorithm R: the newcomer stays with probability capacity / observed, in place of any other. No generator is
        # carried along, so that every process of a run, and a resumed one, draws the same.
        draw = random.Random(f"{self.seed}:{key}:{observed}").randrange(observed)  # noqa: S311
        return min(draw, self.capacity)

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
