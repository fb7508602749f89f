"""Arguments of `CycleAlignTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

from ..offline.ranking_config import RankingConfig
from ..training.config_checks import check_choice
from ..types import Corrector
from .demonstrations import DEFAULT, DemonstrationPool, Scope, Selection

SFTTarget = Literal["improved", "top_ranked", "corrector"]
AtBudgetCap = Literal["stop", "sft"]
PolicyScore = Literal["mean_logprob", "sum_logprob"]
Backend = Literal["transformers", "vllm"]
VLLMMode = Literal["colocate", "server"]


@dataclass
class CycleAlignConfig(RankingConfig):
    """
    Arguments of [`CycleAlignTrainer`], in addition to those of [`RankingConfig`]. `num_train_epochs` defaults to 1, as
    in the paper.

    Args:
        num_generations (`int`, *optional*, defaults to `3`):
            Number of completions per prompt, K. At least 2.
        num_interactions (`int`, *optional*, defaults to `5`):
            Number of interactions per prompt. Each one samples, ranks, agrees and takes one optimiser step.
        stop_on_agreement (`bool`, *optional*, defaults to `False`):
            Whether to skip the remaining interactions of a prompt once policy and ranker order all of its completions
            alike.
        sft_target (`str`, *optional*, defaults to `"improved"`):
            Target of the SFT loss: the ranker's `"improved"` completion (the top-ranked one if there is none), the
            `"top_ranked"` one, or the ranker's improved completion and if there is none the `"corrector"`'s.
        rank_improved_completion (`bool`, *optional*, defaults to `False`):
            Whether the improved completion, or the corrector's, also ranks above all others in the ranking loss.
        policy_score (`str`, *optional*, defaults to `"mean_logprob"`):
            Score by which the policy orders completions: `"mean_logprob"` per token or `"sum_logprob"`.
        use_static_demonstrations (`bool`, *optional*, defaults to `True`):
            Whether requests show the static demonstrations.
        use_dynamic_demonstrations (`bool`, *optional*, defaults to `True`):
            Whether requests show demonstrations from the agreements of earlier interactions.
        demonstration_scope (`str`, *optional*, defaults to `"prompt"`):
            Scope of dynamic demonstrations: a request shows those of its own `"prompt"` or those of the whole `"run"`.
        demonstration_selection (`str`, *optional*, defaults to `"recent"`):
            Dynamic demonstrations to keep if there are more than `max_demonstrations`: the most `"recent"` ones, or a
            `"random"` sample of all.
        max_demonstrations (`int`, *optional*, defaults to `4`):
            Maximum number of dynamic demonstrations per prompt or run.
        min_agreement (`int`, *optional*, defaults to `2`):
            Number of completions that policy and ranker must order alike to make a demonstration. At least 2.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. Scores are always computed at temperature 1.
        top_p (`float`, *optional*, defaults to `0.95`):
            Sample from the smallest set of tokens with this total probability.
        top_k (`int`, *optional*, defaults to `0`):
            Sample from this many most likely tokens. 0 samples from all.
        min_p (`float` or `None`, *optional*, defaults to `None`):
            Sample from tokens with at least this share of the most likely token's probability.
        generation_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Further generation parameters, which override the fields above: those of `GenerationConfig`, or of vLLM's
            `SamplingParams`.
        generation_batch_size (`int` or `None`, *optional*, defaults to `None`):
            Number of completions that a process samples at once, in whole micro-batches and at least one. The ranker
            starts on them while the next ones are sampled. `None` means 32 on a CPU, 128 on another device, and all of
            an optimiser step with vLLM.
        ranking_lookahead (`int`, *optional*, defaults to `0`):
            Number of optimiser steps that sampling is ahead of training, 0 or 1. With 1, the ranker has a whole step
            to answer, but the completions come from the policy before its last step, and the ranker is shown the
            demonstrations from before it.
        generation_backend (`str`, *optional*, defaults to `"transformers"`):
            Engine that samples: `"transformers"` (`model.generate`) or `"vllm"`.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            Where vLLM runs: on the training GPUs (`"colocate"`) or in a `"server"` on GPUs of its own.
        vllm_server_base_url (`str` or `None`, *optional*, defaults to `None`):
            Address of the vLLM server. `None` means `http://0.0.0.0:8000`.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of each training GPU's memory that vLLM reserves, including its copy of the weights.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of training GPUs over which one vLLM engine splits its copy of the weights.
        weight_by_consistency (`bool`, *optional*, defaults to `False`):
            Whether to multiply a prompt's loss by the agreement between the ranker's passes: Kendall's tau-b, 0 if it
            is negative. Needs a ranker with several passes, such as LLMRanker(num_passes=3).
        cache_rankings (`bool`, *optional*, defaults to `True`):
            Whether to store rankings in the output directory, so that none is paid for twice. Needs a ranker with a
            fingerprint.
        max_ranking_failures (`float`, *optional*, defaults to `0.5`):
            Share of failed rankings among the last 100 (at least 20, or 8 if none succeeded yet) above which the run
            saves a checkpoint and stops.
        ranking_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a step waits for its rankings after its completions are sampled. Rankings that are missing
            then count as failures.
        at_budget_cap (`str`, *optional*, defaults to `"stop"`):
            What to do when the ranker's budget is used up: `"stop"` saves a checkpoint and stops, `"sft"` goes on
            without the ranker, with SFT alone on the completion that the policy ranks first.
        max_eval_samples (`int` or `None`, *optional*, defaults to `None`):
            Maximum number of prompts per evaluation. Their rankings are paid for too.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a table of completions and both orders at every log, and to send it to W&B, trackio and
            TensorBoard if `report_to` names them. Needs `rich`.
    """

    _SAMPLING_STRATEGIES: ClassVar[tuple[str, ...]] = ("random",)  # the sampler repeats windows in an order of its own
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*RankingConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the prompts."})

    num_generations: int = field(default=3, metadata={"help": "Number of completions per prompt, K. At least 2."})
    num_interactions: int = field(
        default=5,
        metadata={
            "help": "Number of interactions per prompt. Each one samples, ranks, agrees and takes one optimiser step."
        },
    )
    stop_on_agreement: bool = field(
        default=False,
        metadata={
            "help": "Whether to skip the remaining interactions of a prompt once policy and ranker order all of its "
            "completions alike."
        },
    )
    sft_target: str = field(
        default="improved",
        metadata={
            "help": 'Target of the SFT loss: the ranker\'s "improved" completion (the top-ranked one if there is '
            'none), the "top_ranked" one, or the ranker\'s improved completion and if there is none the '
            '"corrector"\'s.'
        },
    )
    rank_improved_completion: bool = field(
        default=False,
        metadata={
            "help": "Whether the improved completion, or the corrector's, also ranks above all others in the ranking "
            "loss."
        },
    )
    policy_score: str = field(
        default="mean_logprob",
        metadata={"help": 'Score by which the policy orders completions: "mean_logprob" per token or "sum_logprob".'},
    )
    use_static_demonstrations: bool = field(
        default=True, metadata={"help": "Whether requests show the static demonstrations."}
    )
    use_dynamic_demonstrations: bool = field(
        default=True,
        metadata={"help": "Whether requests show demonstrations from the agreements of earlier interactions."},
    )
    demonstration_scope: str = field(
        default="prompt",
        metadata={
            "help": 'Scope of dynamic demonstrations: a request shows those of its own "prompt" or those of the whole '
            '"run".'
        },
    )
    demonstration_selection: str = field(
        default="recent",
        metadata={
            "help": 'Dynamic demonstrations to keep if there are more than max_demonstrations: the most "recent" '
            'ones, or a "random" sample of all.'
        },
    )
    max_demonstrations: int = field(
        default=4, metadata={"help": "Maximum number of dynamic demonstrations per prompt or run."}
    )
    min_agreement: int = field(
        default=2,
        metadata={
            "help": "Number of completions that policy and ranker must order alike to make a demonstration. "
            "At least 2."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature. Scores are always computed at temperature 1."},
    )
    top_p: float = field(
        default=0.95,
        metadata={"help": "Sample from the smallest set of tokens with this total probability."},
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many most likely tokens. 0 samples from all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Sample from tokens with at least this share of the most likely token's probability."},
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further generation parameters, which override the fields above: those of GenerationConfig, or of "
            "vLLM's SamplingParams."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of completions that a process samples at once, in whole micro-batches and at least one. "
            "The ranker starts on them while the next ones are sampled. None means 32 on a CPU, 128 on another "
            "device, and all of an optimiser step with vLLM."
        },
    )
    ranking_lookahead: int = field(
        default=0,
        metadata={
            "help": "Number of optimiser steps that sampling is ahead of training, 0 or 1. With 1, the ranker has a "
            "whole step to answer, but the completions come from the policy before its last step, and the ranker is "
            "shown the demonstrations from before it."
        },
    )
    generation_backend: str = field(
        default="transformers", metadata={"help": 'Engine that samples: "transformers" (model.generate) or "vllm".'}
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": 'Where vLLM runs: on the training GPUs ("colocate") or in a "server" on GPUs of its own.'},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Address of the vLLM server. None means http://0.0.0.0:8000."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of each training GPU's memory that vLLM reserves, including its copy of the weights."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "Number of training GPUs over which one vLLM engine splits its copy of the weights."},
    )
    weight_by_consistency: bool = field(
        default=False,
        metadata={
            "help": "Whether to multiply a prompt's loss by the agreement between the ranker's passes: Kendall's "
            "tau-b, 0 if it is negative. Needs a ranker with several passes, such as "
            "LLMRanker(num_passes=3)."
        },
    )
    cache_rankings: bool = field(
        default=True,
        metadata={
            "help": "Whether to store rankings in the output directory, so that none is paid for twice. Needs a "
            "ranker with a fingerprint."
        },
    )
    max_ranking_failures: float = field(
        default=0.5,
        metadata={
            "help": "Share of failed rankings among the last 100 (at least 20, or 8 if none succeeded yet) above "
            "which the run saves a checkpoint and stops."
        },
    )
    ranking_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Seconds that a step waits for its rankings after its completions are sampled. Rankings that are "
            "missing then count as failures."
        },
    )
    at_budget_cap: str = field(
        default="stop",
        metadata={
            "help": 'What to do when the ranker\'s budget is used up: "stop" saves a checkpoint and stops, "sft" '
            "goes on without the ranker, with SFT alone on the completion that the policy ranks first."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Maximum number of prompts per evaluation. Their rankings are paid for too."},
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether to print a table of completions and both orders at every log, and to send it to W&B, "
            "trackio and TensorBoard if report_to names them. Needs rich."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sft_target", self.sft_target, get_args(SFTTarget))
        check_choice("at_budget_cap", self.at_budget_cap, get_args(AtBudgetCap))
        check_choice("policy_score", self.policy_score, get_args(PolicyScore))
        check_choice("demonstration_scope", self.demonstration_scope, get_args(Scope))
        check_choice("demonstration_selection", self.demonstration_selection, get_args(Selection))
        check_choice("generation_backend", self.generation_backend, get_args(Backend))
        check_choice("vllm_mode", self.vllm_mode, get_args(VLLMMode))
        for name, minimum in (
            ("num_generations", 2),
            ("num_interactions", 1),
            ("max_demonstrations", 0),
            ("min_agreement", 2),
            ("top_k", 0),
            ("vllm_tensor_parallel_size", 1),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}.")
        check_choice("ranking_lookahead", self.ranking_lookahead, (0, 1))
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise ValueError(f"generation_batch_size must be at least 1 or None, got {self.generation_batch_size}.")
        if self.rank_improved_completion and self.sft_target == "top_ranked":
            raise ValueError(
                "rank_improved_completion=True has no effect with sft_target='top_ranked', which ignores improved "
                "completions. Set sft_target='improved' or 'corrector', or rank_improved_completion=False."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}: at 0, all K samples are equal.")
        if not 0 <= self.max_ranking_failures <= 1:
            raise ValueError(f"max_ranking_failures must be a share from 0 to 1, got {self.max_ranking_failures}.")
        if not self.ranking_timeout > 0:
            raise ValueError(f"ranking_timeout must be above 0 seconds, got {self.ranking_timeout}.")
        if self.world_size > 1 and self.ranking_timeout >= self.ddp_timeout:
            raise ValueError(
                f"ranking_timeout={self.ranking_timeout} must be below ddp_timeout={self.ddp_timeout}, after which "
                "the other processes stop waiting for one whose ranker hangs."
            )
        if self.at_budget_cap == "sft" and self.sft_weight == 0:
            raise ValueError(
                "at_budget_cap='sft' trains nothing with sft_weight=0. Set a weight, or at_budget_cap='stop'."
            )
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"max_eval_samples must be at least 1 prompt or None, got {self.max_eval_samples}.")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                "vllm_gpu_memory_utilization must be a share above 0 and at most 1, got "
                f"{self.vllm_gpu_memory_utilization}."
            )
        self._check_vllm_settings()

    def _check_vllm_settings(self) -> None:
        modes = {  # modes in which each setting has an effect
            "vllm_mode": ("colocate", "server"),
            "vllm_server_base_url": ("server",),
            "vllm_gpu_memory_utilization": ("colocate",),
            "vllm_tensor_parallel_size": ("colocate",),
        }
        for name in modes:
            value = getattr(self, name)
            if value == getattr(CycleAlignConfig, name):
                continue
            if self.generation_backend != "vllm":
                raise ValueError(
                    f"{name}={value!r} has no effect with generation_backend={self.generation_backend!r}. Set "
                    f"generation_backend='vllm', or leave {name} out."
                )
            if self.vllm_mode not in modes[name]:
                raise ValueError(
                    f"{name}={value!r} has no effect with vllm_mode={self.vllm_mode!r}, only with {modes[name][0]!r}: "
                    f"the server's own arguments set its memory and GPUs. Leave {name} out."
                )


def make_pool(args: CycleAlignConfig, given: DemonstrationPool | None) -> DemonstrationPool:
    """Return the given pool, or the one that the arguments describe.

    Raises:
        TypeError: If the given object is no pool.
        ValueError: If the arguments contradict the given pool.
    """
    static = (DEFAULT,) if args.use_static_demonstrations else ()
    capacity = args.max_demonstrations if args.use_dynamic_demonstrations else 0
    if given is None:
        scope, selection = cast("Scope", args.demonstration_scope), cast("Selection", args.demonstration_selection)
        return DemonstrationPool(static, capacity, scope, selection, args.seed)
    if not isinstance(given, DemonstrationPool):
        raise TypeError(f"demonstrations must be a DemonstrationPool, got {type(given).__name__}.")
    # A field with its default value does not contradict the pool.
    contradictions = {
        f"use_static_demonstrations={args.use_static_demonstrations}": not args.use_static_demonstrations
        and bool(given.static),
        f"use_dynamic_demonstrations={args.use_dynamic_demonstrations}": not args.use_dynamic_demonstrations
        and given.capacity > 0,
        f"max_demonstrations={args.max_demonstrations}": args.max_demonstrations
        not in (CycleAlignConfig.max_demonstrations, given.capacity),
        f"demonstration_scope={args.demonstration_scope!r}": args.demonstration_scope
        not in (CycleAlignConfig.demonstration_scope, given.scope),
        f"demonstration_selection={args.demonstration_selection!r}": args.demonstration_selection
        not in (CycleAlignConfig.demonstration_selection, given.selection),
    }
    if any(contradictions.values()):
        wrong = " and ".join(setting for setting, contradicts in contradictions.items() if contradicts)
        raise ValueError(
            f"The demonstration pool has {len(given.static)} static demonstrations, capacity {given.capacity}, scope "
            f"{given.scope!r} and selection {given.selection!r}, but args say {wrong}. Set either the pool or the "
            "arguments."
        )
    return given


def check_corrector(args: CycleAlignConfig, corrector: Corrector | None) -> None:
    """Raise `TypeError` if a corrector lacks its method, and `ValueError` if the arguments contradict it."""
    if corrector is not None and not isinstance(corrector, Corrector):
        name = repr(corrector) if isinstance(corrector, str) else "..."
        raise TypeError(
            f"corrector must have a method correct(prompts, answers), and {type(corrector).__name__} has none. To use "
            f"an aligner, pass Aligner.from_pretrained({name})."
        )
    if isinstance(corrector, type):
        raise TypeError(f"corrector is the class {corrector.__name__}. Pass an instance of it.")
    if (corrector is not None) != (args.sft_target == "corrector"):
        raise ValueError(
            f"A corrector and sft_target='corrector' must be set together, got "
            f"corrector={None if corrector is None else type(corrector).__name__} and sft_target={args.sft_target!r}."
        )
