"""Whoever ranks. Each ranker is one file around the one method of `base.Ranker`; importing them loads no torch."""

from .base import Outcome, Ranker, StreamingRanker
from .cache import CachedRanker
from .function import FunctionRanker
from .llm import LLMRanker

__all__ = ["CachedRanker", "FunctionRanker", "LLMRanker", "Outcome", "Ranker", "StreamingRanker"]
