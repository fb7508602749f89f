"""Align a model that you can train with one that you can only call: CycleAlign for the Hugging Face ecosystem."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aligner.aligner import Aligner as Aligner
    from .aligner.aligner_config import AlignerConfig as AlignerConfig
    from .aligner.aligner_template import AlignerTemplate as AlignerTemplate
    from .aligner.aligner_trainer import AlignerTrainer as AlignerTrainer
    from .aligner.black_box_corrections import collect_corrections as collect_corrections
    from .aligner.corrections import load_corrections as load_corrections
    from .aligner.preferences import bootstrap_preferences as bootstrap_preferences
    from .aligner.upstreams import AlignedUpstream as AlignedUpstream
    from .aligner.upstreams import EndpointUpstream as EndpointUpstream
    from .aligner.upstreams import FunctionUpstream as FunctionUpstream
    from .aligner.upstreams import ModelUpstream as ModelUpstream
    from .aligner.upstreams import PipelineUpstream as PipelineUpstream
    from .aligner.upstreams import Upstream as Upstream
    from .chat.budget import BUDGET_EXHAUSTED as BUDGET_EXHAUSTED
    from .chat.budget import Budget as Budget
    from .chat.budget import Prices as Prices
    from .cycle.agreement import agreement_ranking as agreement_ranking
    from .cycle.cyclealign_config import CycleAlignConfig as CycleAlignConfig
    from .cycle.cyclealign_trainer import CycleAlignTrainer as CycleAlignTrainer
    from .cycle.demonstrations import DemonstrationPool as DemonstrationPool
    from .cycle.interaction_log import export_interactions as export_interactions
    from .cycle.run_estimate import RunEstimate as RunEstimate
    from .cycle.run_estimate import assume_completions as assume_completions
    from .cycle.run_estimate import estimate_run as estimate_run
    from .cycle.run_estimate import sample_completions as sample_completions
    from .data.hh_rlhf import load_hh_rlhf as load_hh_rlhf
    from .data.hh_rlhf import sample_prompts as sample_prompts
    from .data.hh_rlhf import split_pair as split_pair
    from .dlma.contrastive_pairs import add_self_rewards as add_self_rewards
    from .dlma.contrastive_pairs import generate_contrastive_pairs as generate_contrastive_pairs
    from .dlma.dlma_config import DLMAConfig as DLMAConfig
    from .dlma.dlma_loss import dlma_loss as dlma_loss
    from .dlma.dlma_trainer import DLMATrainer as DLMATrainer
    from .errors import BudgetExhaustedError as BudgetExhaustedError
    from .errors import CheckpointError as CheckpointError
    from .errors import CycleAlignError as CycleAlignError
    from .errors import PromptError as PromptError
    from .errors import RankerError as RankerError
    from .errors import TooManyFailuresError as TooManyFailuresError
    from .errors import UpstreamError as UpstreamError
    from .evaluation.compare_models import compare_models as compare_models
    from .evaluation.comparison import Comparison as Comparison
    from .evaluation.comparison import ReplyPair as ReplyPair
    from .evaluation.comparison import compare_replies as compare_replies
    from .evaluation.comparison_report import ComparisonReport as ComparisonReport
    from .evaluation.evaluate_models import evaluate_models as evaluate_models
    from .evaluation.evaluate_ranker import evaluate_ranker as evaluate_ranker
    from .evaluation.pairwise_judge import PairwiseJudge as PairwiseJudge
    from .evaluation.prompts import EvaluationPrompt as EvaluationPrompt
    from .evaluation.prompts import PromptSet as PromptSet
    from .evaluation.prompts import load_prompts as load_prompts
    from .evaluation.prompts import read_prompts as read_prompts
    from .evaluation.ranking_accuracy_callback import RankingAccuracyCallback as RankingAccuracyCallback
    from .evaluation.references import ReferenceRanking as ReferenceRanking
    from .evaluation.references import read_references as read_references
    from .evaluation.replies import Reply as Reply
    from .evaluation.replies import collect_replies as collect_replies
    from .evaluation.report import JudgedRanking as JudgedRanking
    from .evaluation.report import JudgeReport as JudgeReport
    from .evaluation.reward_report import RewardReport as RewardReport
    from .evaluation.run_report.page import write_run_report as write_run_report
    from .evaluation.sources import ReplySettings as ReplySettings
    from .evaluation.sources import ReplySource as ReplySource
    from .evaluation.sources import parse_source as parse_source
    from .evaluation.win_rate_callback import WinRateCallback as WinRateCallback
    from .evaluation.win_rates import win_rates as win_rates
    from .models.gpt_neox_reward_model import OPEN_ASSISTANT_CHAT_TEMPLATE as OPEN_ASSISTANT_CHAT_TEMPLATE
    from .models.reward_scorer import RewardScorer as RewardScorer
    from .offline.losses import pro_loss as pro_loss
    from .offline.losses import rrhf_loss as rrhf_loss
    from .offline.ranking_config import RankingConfig as RankingConfig
    from .offline.ranking_trainer import RankingTrainer as RankingTrainer
    from .rankers.base import Outcome as Outcome
    from .rankers.base import Ranker as Ranker
    from .rankers.base import StreamingRanker as StreamingRanker
    from .rankers.cache import CachedRanker as CachedRanker
    from .rankers.contrastive_prompts import ContrastivePrompts as ContrastivePrompts
    from .rankers.function import FunctionRanker as FunctionRanker
    from .rankers.jury import JuryRanker as JuryRanker
    from .rankers.kendall_tau import kendall_tau as kendall_tau
    from .rankers.llm import LLMRanker as LLMRanker
    from .rankers.reward_model import RewardModelRanker as RewardModelRanker
    from .rankers.self_reward import SelfRewardRanker as SelfRewardRanker
    from .types import Corrector as Corrector
    from .types import Demonstration as Demonstration
    from .types import Prompt as Prompt
    from .types import RankingFailure as RankingFailure
    from .types import RankingRequest as RankingRequest
    from .types import RankingResult as RankingResult
    from .types import Trimmed as Trimmed
    from .types import Usage as Usage
    from .types import ranks_from_scores as ranks_from_scores

__version__ = "0.1.0"

# Each name is imported on first use, so that a script that only builds rankers never loads torch. Type checkers read
# the imports above; `tests/test_package.py` checks that both lists agree.
_MODULES = {
    "AlignedUpstream": "aligner.upstreams",
    "Aligner": "aligner.aligner",
    "AlignerConfig": "aligner.aligner_config",
    "AlignerTemplate": "aligner.aligner_template",
    "AlignerTrainer": "aligner.aligner_trainer",
    "BUDGET_EXHAUSTED": "chat.budget",
    "Budget": "chat.budget",
    "BudgetExhaustedError": "errors",
    "CachedRanker": "rankers.cache",
    "CheckpointError": "errors",
    "Comparison": "evaluation.comparison",
    "ComparisonReport": "evaluation.comparison_report",
    "ContrastivePrompts": "rankers.contrastive_prompts",
    "Corrector": "types",
    "CycleAlignConfig": "cycle.cyclealign_config",
    "CycleAlignError": "errors",
    "CycleAlignTrainer": "cycle.cyclealign_trainer",
    "DLMAConfig": "dlma.dlma_config",
    "DLMATrainer": "dlma.dlma_trainer",
    "Demonstration": "types",
    "DemonstrationPool": "cycle.demonstrations",
    "EndpointUpstream": "aligner.upstreams",
    "EvaluationPrompt": "evaluation.prompts",
    "FunctionRanker": "rankers.function",
    "FunctionUpstream": "aligner.upstreams",
    "JudgeReport": "evaluation.report",
    "JudgedRanking": "evaluation.report",
    "JuryRanker": "rankers.jury",
    "LLMRanker": "rankers.llm",
    "ModelUpstream": "aligner.upstreams",
    "OPEN_ASSISTANT_CHAT_TEMPLATE": "models.gpt_neox_reward_model",
    "Outcome": "rankers.base",
    "PairwiseJudge": "evaluation.pairwise_judge",
    "PipelineUpstream": "aligner.upstreams",
    "Prices": "chat.budget",
    "Prompt": "types",
    "PromptError": "errors",
    "PromptSet": "evaluation.prompts",
    "Ranker": "rankers.base",
    "RankerError": "errors",
    "RankingAccuracyCallback": "evaluation.ranking_accuracy_callback",
    "RankingConfig": "offline.ranking_config",
    "RankingFailure": "types",
    "RankingRequest": "types",
    "RankingResult": "types",
    "RankingTrainer": "offline.ranking_trainer",
    "ReferenceRanking": "evaluation.references",
    "Reply": "evaluation.replies",
    "ReplyPair": "evaluation.comparison",
    "ReplySettings": "evaluation.sources",
    "ReplySource": "evaluation.sources",
    "RewardModelRanker": "rankers.reward_model",
    "RewardReport": "evaluation.reward_report",
    "RewardScorer": "models.reward_scorer",
    "RunEstimate": "cycle.run_estimate",
    "SelfRewardRanker": "rankers.self_reward",
    "StreamingRanker": "rankers.base",
    "TooManyFailuresError": "errors",
    "Trimmed": "types",
    "Upstream": "aligner.upstreams",
    "UpstreamError": "errors",
    "Usage": "types",
    "WinRateCallback": "evaluation.win_rate_callback",
    "add_self_rewards": "dlma.contrastive_pairs",
    "agreement_ranking": "cycle.agreement",
    "assume_completions": "cycle.run_estimate",
    "bootstrap_preferences": "aligner.preferences",
    "collect_corrections": "aligner.black_box_corrections",
    "collect_replies": "evaluation.replies",
    "compare_models": "evaluation.compare_models",
    "compare_replies": "evaluation.comparison",
    "dlma_loss": "dlma.dlma_loss",
    "estimate_run": "cycle.run_estimate",
    "evaluate_models": "evaluation.evaluate_models",
    "evaluate_ranker": "evaluation.evaluate_ranker",
    "export_interactions": "cycle.interaction_log",
    "generate_contrastive_pairs": "dlma.contrastive_pairs",
    "kendall_tau": "rankers.kendall_tau",
    "load_corrections": "aligner.corrections",
    "load_hh_rlhf": "data.hh_rlhf",
    "load_prompts": "evaluation.prompts",
    "parse_source": "evaluation.sources",
    "pro_loss": "offline.losses",
    "ranks_from_scores": "types",
    "read_prompts": "evaluation.prompts",
    "read_references": "evaluation.references",
    "rrhf_loss": "offline.losses",
    "sample_completions": "cycle.run_estimate",
    "sample_prompts": "data.hh_rlhf",
    "split_pair": "data.hh_rlhf",
    "win_rates": "evaluation.win_rates",
    "write_run_report": "evaluation.run_report.page",
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
