"""Build our trainer and those of other projects for the same steps, each with a judge that costs nothing."""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from benchmarks import peer_adapter

from .plans import GRPO, ONLINE_DPO, OURS, RLOO, UNSLOTH, StepWork
from .shapes import LORA_MODULES, lora_config

ZERO2 = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}
TRL_PHASES = {
    "generate": ["_generate", "_generate_vllm"],
    "train": [
        "_get_per_token_logps_and_entropies",
        "_forward",
        "compute_loss",
        "accelerator.backward",
        "accelerator.clip_grad_norm_",
    ],
}


def free_judge(completions: Sequence[str], **_: Any) -> list[float]:
    """Return a score for each text that depends on nothing but its characters."""
    return [float(zlib.crc32(text.encode())) / 2**32 for text in completions]


@dataclass(frozen=True)
class Setting:
    """Parts of a trainer: `folder` is empty, and `model_folder` has the model if something loads it."""

    work: StepWork
    model: Any
    tokenizer: Any
    dataset: Any
    folder: str
    model_folder: str
    steps: int
    device: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Training arguments that all trainers know."""
        work = self.work
        return {
            "use_cpu": self.device == "cpu",
            "bf16": self.device != "cpu",
            "learning_rate": 1e-6,
            "optim": "adamw_torch",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 0,
            "deepspeed": ZERO2 if work.zero2 else None,
            # Every completion has the same number of tokens, so that all trainers do the same work.
            "generation_kwargs": {"min_tokens" if work.vllm else "min_new_tokens": work.new_tokens},
        }

    @property
    def trl_arguments(self) -> dict[str, Any]:
        """Arguments that TRL's trainers share, set so that they do the same work as ours."""
        vllm = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3} if self.work.vllm else {}
        return {
            **self.arguments,
            "output_dir": self.folder,
            "max_steps": self.steps,
            "gradient_checkpointing": self.work.activation_checkpointing,
            "use_vllm": self.work.vllm,
            **vllm,
        }

    @property
    def peft_config(self) -> Any:
        """The adapter, or `None`."""
        return lora_config() if self.work.lora else None


def _cyclealign(setting: Setting) -> Any:
    from cyclealign_trl import FunctionRanker

    work = setting.work
    return peer_adapter.trainer(
        setting.model,
        setting.tokenizer,
        setting.dataset,
        setting.folder,
        setting.steps,
        work.prompts,
        work.n,
        work.new_tokens,
        ranker=FunctionRanker(free_judge),
        peft_config=setting.peft_config,
        max_prompt_length=work.prompt_length,
        activation_checkpointing=work.activation_checkpointing,
        generation_backend="vllm" if work.vllm else "transformers",
        **setting.arguments,
    )


def _trl_trainer(setting: Setting, module: str, name: str, model: Any, peft_config: Any, **arguments: Any) -> Any:
    """Return a trainer of TRL with the arguments that all of them share."""
    imported = importlib.import_module(module)
    return getattr(imported, f"{name}Trainer")(
        model=model,
        reward_funcs=free_judge,
        args=getattr(imported, f"{name}Config")(**setting.trl_arguments, **arguments),
        train_dataset=setting.dataset,
        processing_class=setting.tokenizer,
        peft_config=peft_config,
    )


def _grouped(setting: Setting, name: str, model: Any, peft_config: Any) -> Any:
    """Return a trainer of TRL that samples a group of completions for each prompt."""
    work = setting.work
    return _trl_trainer(
        setting,
        "trl",
        name,
        model,
        peft_config,
        per_device_train_batch_size=work.prompts * work.n,
        num_generations=work.n,
        max_completion_length=work.new_tokens,
        beta=0.0,  # no reference model: ours has none
    )


def _grpo(setting: Setting) -> Any:
    return _grouped(setting, "GRPO", setting.model, setting.peft_config)


def _rloo(setting: Setting) -> Any:
    return _grouped(setting, "RLOO", setting.model, setting.peft_config)


def _online_dpo(setting: Setting) -> Any:
    work = setting.work
    return _trl_trainer(
        setting,
        "trl.experimental.online_dpo",
        "OnlineDPO",
        setting.model,
        setting.peft_config,
        per_device_train_batch_size=work.prompts,
        max_new_tokens=work.new_tokens,
        max_length=max(512, work.prompt_length + work.new_tokens),
        temperature=1.0,
    )


def _unsloth(setting: Setting) -> Any:
    """Return TRL's GRPOTrainer as Unsloth changes it. Unsloth loads the model itself."""
    work = setting.work
    unsloth = importlib.import_module("unsloth")  # changes TRL when it is imported, so it comes first
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        setting.model_folder,
        max_seq_length=work.prompt_length + work.new_tokens,
        load_in_4bit=False,
        fast_inference=work.vllm,
        full_finetuning=not work.lora,
    )
    if work.lora:
        model = unsloth.FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=LORA_MODULES)
    return _grouped(setting, "GRPO", model, peft_config=None)


@dataclass(frozen=True)
class Peer:
    """A trainer that can be measured.

    Args:
        build: Builds it.
        phases: Attribute paths on the trainer of the calls that make up each phase.
        module: What is imported first.
        n: Completions per prompt, if the trainer does not take their number.
        loads_model: Whether the trainer loads the model from a folder.
    """

    build: Callable[[Setting], Any]
    phases: dict[str, list[str]]
    module: str = "trl"
    n: int | None = None
    loads_model: bool = False


TRAINERS = {
    OURS: Peer(_cyclealign, peer_adapter.TRAINER_PHASES, "cyclealign_trl"),
    GRPO: Peer(_grpo, TRL_PHASES),
    RLOO: Peer(_rloo, TRL_PHASES),
    ONLINE_DPO: Peer(_online_dpo, TRL_PHASES, "trl.experimental.online_dpo", n=2),
    UNSLOTH: Peer(_unsloth, TRL_PHASES, "unsloth", loads_model=True),
}
"""Trainers by the name in the tables."""


def missing(peer: Peer, work: StepWork, device: str) -> str:
    """Return what keeps a trainer from running, or nothing if it can run."""
    modules = [peer.module, *["vllm"] * work.vllm, *["deepspeed"] * work.zero2, *["peft"] * work.lora]
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None:
            return f"absent from TRL {version('trl')}" if module.startswith("trl.") else f"not installed: {module}"
    return "needs a GPU" if device == "cpu" and (work.vllm or peer.module == "unsloth") else ""
