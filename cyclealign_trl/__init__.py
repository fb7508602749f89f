"""CycleAlign for the Hugging Face ecosystem: align a model you can train with one you can only call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import agreement_ranking as agreement_ranking
    from .agreement import kendall_tau as kendall_tau
    from .aligner import Aligner as Aligner
    from .aligner_template import AlignerTemplate as AlignerTemplate
    from .contrastive import ContrastivePrompts as ContrastivePrompts
    from .corrector import Corrector as Corrector
    from .data.black_box_corrections import collect_corrections as collect_corrections
    from .data.bootstrapping import bootstrap_preferences as bootstrap_preferences
    from .data.contrastive_pairs import add_self_rewards as add_self_rewards
    from .data.contrastive_pairs import generate_contrastive_pairs as generate_contrastive_pairs
    from .data.corrections import load_corrections as load_corrections
    from .data.hh_rlhf import load_hh_rlhf as load_hh_rlhf
    from .data.hh_rlhf import sample_prompts as sample_prompts
    from .data.interactions import export_interactions as export_interactions
    from .demonstrations import DemonstrationPool as DemonstrationPool
    from .errors import BudgetExhaustedError as BudgetExhaustedError
    from .errors import CheckpointError as CheckpointError
    from .errors import CycleAlignError as CycleAlignError
    from .errors import PromptError as PromptError
    from .errors import RankerError as RankerError
    from .errors import TooManyFailuresError as TooManyFailuresError
    from .errors import UpstreamError as UpstreamError
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
    from .trainer.aligner_config import AlignerConfig as AlignerConfig
    from .trainer.aligner_trainer import AlignerTrainer as AlignerTrainer
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
    from .upstreams import AlignedUpstream as AlignedUpstream
    from .upstreams import EndpointUpstream as EndpointUpstream
    from .upstreams import ModelUpstream as ModelUpstream
    from .upstreams import PipelineUpstream as PipelineUpstream
    from .upstreams import Upstream as Upstream

__version__ = "0.1.0"

# Every name is imported when it is first used: a script that only builds rankers never loads torch.
_MODULES = {
    "AlignedUpstream": "upstreams",
    "Aligner": "aligner",
    "AlignerConfig": "trainer.aligner_config",
    "AlignerTemplate": "aligner_template",
    "AlignerTrainer": "trainer.aligner_trainer",
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
    "EndpointUpstream": "upstreams",
    "FunctionRanker": "rankers.function",
    "JudgeReport": "evaluation.report",
    "LLMRanker": "rankers.llm",
    "ModelUpstream": "upstreams",
    "PipelineUpstream": "upstreams",
    "PromptError": "errors",
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
    "Upstream": "upstreams",
    "UpstreamError": "errors",
    "Usage": "types",
    "add_self_rewards": "data.contrastive_pairs",
    "agreement_ranking": "agreement",
    "bootstrap_preferences": "data.bootstrapping",
    "collect_corrections": "data.black_box_corrections",
    "dlma_loss": "losses",
    "evaluate_ranker": "evaluation.judge",
    "export_interactions": "data.interactions",
    "generate_contrastive_pairs": "data.contrastive_pairs",
    "kendall_tau": "agreement",
    "load_corrections": "data.corrections",
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
