"""The rollouts of the current optimiser step and, if sampling is ahead of training, of the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..models.renderer import Renderer
from ..offline.ranking_collator import TokenIds
from ..types import Prompt, RankingRequest, prompt_key
from .demonstrations import DemonstrationPool
from .interaction import open_interaction
from .pending_rankings import PendingRankings
from .rollout import Context, PromptBatch, Rollout, in_chunks, saved_completions, saved_contexts

if TYPE_CHECKING:
    from .cyclealign_config import CycleAlignConfig

Generate = Callable[[list[TokenIds]], list[list[TokenIds]]]
"""Samples K completions for each of B prompts."""
Rank = Callable[[Sequence[RankingRequest]], PendingRankings]
"""Sends requests to the ranker, without waiting for it."""


class RolloutQueue:
    """Sample completions, send them to the ranker, and keep the rollouts until the policy trains on them.

    Args:
        args: The arguments.
        renderer: Decodes completions.
        demonstrations: The pool that requests take their demonstrations from.
        generate: Samples completions.
        rank: Sends requests to the ranker.
    """

    def __init__(
        self,
        args: CycleAlignConfig,
        renderer: Renderer,
        demonstrations: DemonstrationPool,
        generate: Generate,
        rank: Rank,
    ) -> None:
        self._args = args
        self._renderer = renderer
        self._demonstrations = demonstrations
        self._generate = generate
        self._rank = rank
        self.agreed: set[str] = set()
        """Keys of the window's prompts that need no further interaction (`stop_on_agreement`)."""
        self.deadline = 0.0
        """Time to stop waiting for the rankings of the current step, on the clock of `time.monotonic`."""
        self.next_batches: list[PromptBatch] = []
        """Micro-batches of the next step, if they are known already."""
        self._batches: list[PromptBatch] = []  # of the current step, without completions yet
        self._rollouts: deque[Rollout] = deque()  # of the current step, not trained on yet
        self._ahead: list[Rollout] = []  # of the next step
        self._saved: list[list[dict[str, Any]]] = []  # of the step after a checkpoint

    def begin_step(self, batches: Sequence[PromptBatch], next_batches: Sequence[PromptBatch]) -> None:
        """Set the micro-batches of the step, and of the next one if it is to be sampled ahead."""
        self._batches, self.next_batches = list(batches), list(next_batches)
        self._rollouts.clear()

    def pop(self, ends_window: bool) -> Rollout:
        """Return the rollout of the next micro-batch.

        The first micro-batch of a step starts the rollouts of all of them, so that gradient accumulation does not
        change what is sampled, and the ranker works while the policy trains.

        Args:
            ends_window: Whether the prompts of the next step belong to another window.
        """
        if self._batches:
            self._rollouts.extend(self._ahead or self._reopen(self._batches) or self.roll_out(self._batches))
            self._ahead = self.roll_out(self.next_batches, starts_window=ends_window)
            self._batches = []
        return self._rollouts.popleft()

    def roll_out(self, batches: list[PromptBatch], starts_window: bool = False) -> list[Rollout]:
        """Sample completions for micro-batches, and send them to the ranker. The deadline counts from then on.

        Args:
            batches: The micro-batches.
            starts_window: Whether their window has not started yet, so that nothing is known about their prompts.
        """
        rollouts = []
        for chunk in in_chunks(batches, self._args):
            completion_ids = iter(self._generate([ids for batch in chunk for ids in batch.prompt_ids]))
            for batch in chunk:
                own_ids = [next(completion_ids) for _ in batch.prompts]
                contexts = [self._context(prompt, starts_window) for prompt in batch.prompts]
                rollouts.append(self._open(batch, own_ids, contexts))
        self.deadline = time.monotonic() + self._args.ranking_timeout
        return rollouts

    def state(self) -> list[list[dict[str, Any]]]:
        """Return the completions that are sampled ahead, as JSON."""
        return [rollout.state() for rollout in self._ahead]

    def restart(self, saved: list[list[dict[str, Any]]]) -> None:
        """Forget all rollouts, and continue with the `state` of a checkpoint."""
        self.begin_step([], [])
        self._ahead = []
        self._saved = saved if self._args.ranking_lookahead else []

    def _context(self, prompt: Prompt, starts_window: bool) -> Context:
        if starts_window and self._demonstrations.scope == "prompt":
            return Context(self._demonstrations.static, already_agreed=False)
        agreed = not starts_window and prompt_key(prompt) in self.agreed
        return Context(self._demonstrations.select(prompt), agreed)

    def _reopen(self, batches: list[PromptBatch]) -> list[Rollout]:
        """Send saved completions to the ranker again. A cache of rankings has the answers that had arrived."""
        saved, self._saved = self._saved, []
        return [
            self._open(batch, saved_completions(state), saved_contexts(state))
            for batch, state in zip(batches, saved, strict=bool(saved))
        ]

    def _open(self, batch: PromptBatch, completion_ids: list[list[TokenIds]], contexts: list[Context]) -> Rollout:
        """Send the completions of a micro-batch to the ranker."""
        interactions = [
            open_interaction(
                prompt,
                self._renderer.decode(prompt, ids),
                context.demonstrations,
                metadata,
                already_agreed=context.already_agreed,
                num_static=len(self._demonstrations.static),
            )
            for prompt, metadata, ids, context in zip(
                batch.prompts, batch.metadata, completion_ids, contexts, strict=True
            )
        ]
        rankings = self._rank([interaction.request for interaction in interactions if interaction.request is not None])
        return Rollout(batch.prompt_ids, batch.prompt_truncated, completion_ids, interactions, rankings)
