"""Names of TRL and transformers outside their public API, with the reason for each.

Only this module imports such names. `tests/test_compat.py` fails if an upgrade moves or changes one of them.

transformers:

- `PREFIX_CHECKPOINT_DIR`: name of a checkpoint folder, to write our state there before the Trainer fills it.
- `rotate_checkpoints`: delete old checkpoints, at a time of our own if each machine has its own.
- `PreTrainedModel.should_save_on_this_rank`: whether `save_pretrained` writes. It does on process 0 alone, even with
  `save_on_each_node`. `saving_on_this_process` replaces it.
- `EvalLoopOutput`: return type of `Trainer.evaluation_loop`, which we override.
- `trainer.hf_api`: client of all uploads, which have no argument for ignored files. `uploading_without` replaces it.

TRL:

- `create_model_from_path`: load a policy by name with the dtype and device map rules of TRL's trainers.
- `get_config_model_id`: name that a model was loaded by.
- `ChunkedLogProbFunction`: log-probabilities of tokens from hidden states on a GPU, without their logits.
- `maybe_gather_lm_head_ctx`: gather an output head that ZeRO-3 has sharded, to use its weight outside of its forward.
- `selective_log_softmax`: log-probabilities from logits, if the head cannot be fused.
- `print_prompt_completions_sample`: print prompts and completions as a table (needs `rich`).
- `add_hooks`, `remove_hooks`: disable ZeRO-3's hooks on forward passes while sampling.
- `VLLMGeneration`: vLLM engine and weight synchronisation for every way of sharding. Imported on first use, because it
  imports vLLM.
- `is_vllm_available`: check for vLLM, with a warning about versions that TRL does not support.
- `disable_dropout_in_model`: compare policy and reference without dropout.
- `prepare_deepspeed`, `prepare_fsdp`: shard the reference model like the policy.

torch:

- `_set_pg_timeout`, `_world.pg_map`: the timeout of every process group. transformers sets it for the default group on
  GPUs alone, and DeepSpeed makes groups of its own.

DeepSpeed:

- its logger, which warns that there is no accelerator when it is imported. accelerate imports it in every run, so the
  warning is dropped unless the run uses DeepSpeed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers import trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints
from trl.import_utils import is_vllm_available
from trl.kernels import ChunkedLogProbFunction
from trl.models.utils import add_hooks, prepare_deepspeed, prepare_fsdp, remove_hooks
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    print_prompt_completions_sample,
    selective_log_softmax,
)

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "ChunkedLogProbFunction",
    "EvalLoopOutput",
    "VLLMGeneration",
    "add_hooks",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "is_vllm_available",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "prepare_fsdp",
    "print_prompt_completions_sample",
    "remove_hooks",
    "rotate_checkpoints",
    "saving_on_this_process",
    "selective_log_softmax",
    "set_timeout_of_all_groups",
    "uploading_without",
]


class _UnlessUsed(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        used = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        return used or not record.getMessage().startswith("Setting accelerator to CPU")


logging.getLogger("DeepSpeed").addFilter(_UnlessUsed())


def __getattr__(name: str) -> Any:
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration


@contextmanager
def uploading_without(patterns: Sequence[str]) -> Iterator[None]:
    """Exclude files that match the patterns from all uploads that the Trainer starts inside the block."""

    class FilteringApi(HfApi):
        def upload_folder(self, *, ignore_patterns: Sequence[str] = (), **kwargs: Any) -> Any:  # type: ignore[override]
            return super().upload_folder(ignore_patterns=[*ignore_patterns, *patterns], **kwargs)

    hf_api = trainer.hf_api
    original = hf_api()
    api = FilteringApi(library_name=original.library_name, library_version=original.library_version)
    trainer.hf_api = lambda: api
    try:
        yield
    finally:
        trainer.hf_api = hf_api


@contextmanager
def saving_on_this_process(model: Any) -> Iterator[None]:
    """Let `save_pretrained` of a model write on this process inside the block, even if it is not process 0."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def set_timeout_of_all_groups(timeout: timedelta) -> None:
    """Set how long this process waits for others in any process group, if there are several processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backends other than NCCL and gloo keep their timeout
        for group in torch.distributed.distributed_c10d._world.pg_map:
            torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)
