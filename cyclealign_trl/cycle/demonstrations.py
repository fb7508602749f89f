"""The pool of demonstrations for the ranker: static ones, and dynamic ones from agreements."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
"""The default static demonstration, in the layout of the paper: one helpful completion, one useless, two harmful."""


@dataclass
class _Group:
    """Dynamic demonstrations that are shown together, oldest first, and the number ever observed."""

    observed: int = 0
    demonstrations: list[Demonstration] = field(default_factory=list)


class DemonstrationPool:
    """Pool of static and dynamic demonstrations.

    Args:
        static: Demonstrations that every request shows first, in this order.
        capacity: Maximum number of dynamic demonstrations, per prompt or per run. 0 keeps none.
        scope: `"prompt"` shows a dynamic demonstration for its own prompt only, `"run"` for every prompt.
        selection: `"recent"` drops the oldest demonstration first. `"random"` keeps a uniform sample of all that were
            observed, per prompt or per run (reservoir sampling).
        seed: Seed of the random selection. Pools with equal seeds and observations keep the same demonstrations.

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
        """Return the number of dynamic demonstrations."""
        return sum(len(group.demonstrations) for group in self._dynamic.values())

    @property
    def dynamic(self) -> tuple[Demonstration, ...]:
        """All dynamic demonstrations."""
        return tuple(demonstration for group in self._dynamic.values() for demonstration in group.demonstrations)

    def select(self, prompt: Prompt) -> tuple[Demonstration, ...]:
        """Return the demonstrations for a prompt: static ones, then dynamic ones from oldest to newest."""
        group = self._dynamic.get(self._key(prompt), _Group())
        return (*self.static, *group.demonstrations)

    def groups(self) -> list[tuple[Demonstration, ...]]:
        """Return the dynamic demonstrations that are shown together, oldest first, of every prompt that has any."""
        return [tuple(group.demonstrations) for group in self._dynamic.values() if group.demonstrations]

    def observe(self, demonstrations: Iterable[Demonstration]) -> None:
        """Add dynamic demonstrations, oldest first."""
        for demonstration in demonstrations:
            key = self._key(demonstration.prompt)
            group = self._dynamic.setdefault(key, _Group())
            group.observed += 1
            group.demonstrations.append(demonstration)
            if len(group.demonstrations) > self.capacity:
                del group.demonstrations[self._leaving(key, group.observed)]

    def forget(self, prompts: Iterable[Prompt]) -> None:
        """Drop the dynamic demonstrations of prompts without further interactions, unless the scope is "run"."""
        if self.scope == "prompt":
            for prompt in prompts:
                self._dynamic.pop(self._key(prompt), None)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides what `select` returns after the same observations, as JSON data.

        `from_settings` makes an equal pool of it.
        """
        return {
            "static": [_to_json(demonstration) for demonstration in self.static],
            "capacity": self.capacity,
            "seed": self.seed,
            "state": self.state_dict(),
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> DemonstrationPool:
        """Return the pool of which `settings` is the data."""
        state = settings["state"]
        static = [Demonstration(**demonstration) for demonstration in settings["static"]]
        pool = cls(static, settings["capacity"], state["scope"], state["selection"], settings["seed"])
        pool.load_state_dict(state)
        return pool

    def state_dict(self) -> dict[str, Any]:
        """Return the dynamic demonstrations as JSON data."""
        return {
            "version": STATE_VERSION,
            "scope": self.scope,
            "selection": self.selection,
            "dynamic": [
                {
                    "observed": group.observed,
                    "demonstrations": [_to_json(demonstration) for demonstration in group.demonstrations],
                }
                for group in self._dynamic.values()
                if group.demonstrations
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the dynamic demonstrations by those of a `state_dict`, the newest ones up to `capacity`.

        Raises:
            ValueError: If the state has another version, scope or selection.
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
        """Return the position of the demonstration to drop if there is one too many. The new one is last."""
        if self.selection == "recent":
            return 0
        # Algorithm R: the new one stays with probability capacity / observed, in place of any other. The draw depends
        # on the arguments alone, so that every process of a run, and a resumed run, draws the same.
        draw = random.Random(f"{self.seed}:{key}:{observed}").randrange(observed)  # noqa: S311
        return min(draw, self.capacity)

    def _key(self, prompt: Prompt) -> Hashable:
        return prompt_key(prompt) if self.scope == "prompt" else None


def _to_json(demonstration: Demonstration) -> dict[str, Any]:
    return {
        "prompt": demonstration.prompt,
        "completions": list(demonstration.completions),
        "order": list(demonstration.order),
    }


def from_agreement(prompt: Prompt, completions: Sequence[str], agreement: Sequence[int]) -> Demonstration:
    """Return a demonstration of the agreed completions alone, renumbered in their original order.

    Args:
        prompt: The prompt.
        completions: All completions that were ranked.
        agreement: Indices of at least two completions that both rankings order alike, best first.
    """
    shown = sorted(agreement)
    return Demonstration(
        prompt=prompt,
        completions=tuple(completions[index] for index in shown),
        order=tuple(shown.index(index) for index in agreement),
    )
