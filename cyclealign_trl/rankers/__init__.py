"""Rankers: one file per ranker, each built around the single method of `base.Ranker`.

Importing this package does not import torch.
"""

from .base import Outcome, Ranker, StreamingRanker
from .cache import CachedRanker
from .function import FunctionRanker
from .llm import LLMRanker

__all__ = ["CachedRanker", "FunctionRanker", "LLMRanker", "Outcome", "Ranker", "StreamingRanker"]
