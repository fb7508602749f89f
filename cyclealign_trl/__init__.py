"""CycleAlign for the Hugging Face ecosystem: align a model you can train with one you can only call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import agreement_ranking as agreement_ranking
    from .agreement import kendall_tau as kendall_tau
    from .contrastive import ContrastivePrompts as ContrastivePrompts
    from .corrector import Corrector as Corrector
    from .data.contrastive_pairs import add_self_rewards as add_self_rewards
    from .data.contrastive_pairs import generate_contrastive_pairs as generate_contrastive_pairs
    from .data.hh_rlhf import load_hh_rlhf as load_hh_rlhf
    from .data.hh_rlhf import sample_prompts as sample_prompts
    from .data.interactions import export_interactions as export_interactions
    from .demonstrations import DemonstrationPool as DemonstrationPool
    from .errors import BudgetExhaustedError as BudgetExhaustedError
    from .errors import CheckpointError as CheckpointError
    from .errors import CycleAlignError as CycleAlignError
    from .errors import RankerError as RankerError
    from .errors import TooManyFailuresError as TooManyFailuresError
    from .evaluation.judge import evaluate_ranker as evaluate_ranker
    from .evaluation.report import JudgeReport as JudgeReport
    from .losses import dlma_loss as dlma_loss
    from .losses import pro_loss as pro_loss
    from .losses import rrhf_loss as rrhf_loss
    from .rankers.base import Ranker as Ranker
    from .rankers.cache import CachedRanker as CachedRanker
    from .rankers.function import FunctionRanker as FunctionRanker
    from .rankers.llm import LLMRanker as LLMRanker
    from .rankers.reward_model import RewardModelRanker as RewardModelRanker
    from .rankers.self_reward import SelfRewardRanker as SelfRewardRanker
    from .trainer.cyclealign_config import CycleAlignConfig as CycleAlignConfig
    from .trainer.cyclealign_trainer import CycleAlignTrainer as CycleAlignTrainer
    from .trainer.dlma_config import DLMAConfig as DLMAConfig
    from .trainer.dlma_trainer import DLMATrainer as DLMATrainer
    from .trainer.ranking_config import RankingConfig as RankingConfig
    from .trainer.ranking_trainer import RankingTrainer as RankingTrainer
    from .types import Demonstration as Demonstration
    from .types import RankingFailure as RankingFailure
    from .types import RankingRequest as RankingRequest
    from .types import RankingResult as RankingResult
    from .types import Usage as Usage

__version__ = "0.1.0"

# Every name is imported when it is first used: a script that only builds rankers never loads torch.
_MODULES = {
    "BudgetExhaustedError": "errors",
    "CachedRanker": "rankers.cache",
    "CheckpointError": "errors",
    "ContrastivePrompts": "contrastive",
    "Corrector": "corrector",
    "CycleAlignConfig": "trainer.cyclealign_config",
    "CycleAlignError": "errors",
    "CycleAlignTrainer": "trainer.cyclealign_trainer",
    "DLMAConfig": "trainer.dlma_config",
    "DLMATrainer": "trainer.dlma_trainer",
    "Demonstration": "types",
    "DemonstrationPool": "demonstrations",
    "FunctionRanker": "rankers.function",
    "JudgeReport": "evaluation.report",
    "LLMRanker": "rankers.llm",
    "Ranker": "rankers.base",
    "RankerError": "errors",
    "RankingConfig": "trainer.ranking_config",
    "RankingFailure": "types",
    "RankingRequest": "types",
    "RankingResult": "types",
    "RankingTrainer": "trainer.ranking_trainer",
    "RewardModelRanker": "rankers.reward_model",
    "SelfRewardRanker": "rankers.self_reward",
    "TooManyFailuresError": "errors",
    "Usage": "types",
    "add_self_rewards": "data.contrastive_pairs",
    "agreement_ranking": "agreement",
    "dlma_loss": "losses",
    "evaluate_ranker": "evaluation.judge",
    "export_interactions": "data.interactions",
    "generate_contrastive_pairs": "data.contrastive_pairs",
    "kendall_tau": "agreement",
    "load_hh_rlhf": "data.hh_rlhf",
    "pro_loss": "losses",
    "rrhf_loss": "losses",
    "sample_prompts": "data.hh_rlhf",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
