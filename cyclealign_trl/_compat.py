"""The only importer of TRL and transformers names outside their public API; `tests/test_compat.py` watches them.

From transformers:

- `PREFIX_CHECKPOINT_DIR`: our part of a checkpoint goes into the folder that the Trainer is about to fill.
- `EvalLoopOutput`: what `Trainer.evaluation_loop`, which we extend, returns.
- `uploading_without`: makes the Trainer's uploads leave files out, at the one function where it gets its client from.
  They have no argument for it.

From TRL:

- `create_model_from_path`: `model="org/name"` follows the rules of TRL's own trainers for dtype and device map.
- `get_config_model_id`: the name that a model was loaded by.
- `add_fused_lm_head`: log-probabilities without the (rows, length, vocabulary) logits. The head runs tile by tile,
  forward and backward, with logit scaling and soft-capping as each architecture has them.
- `selective_log_softmax`: the same from logits, where the head cannot be fused.
- `print_prompt_completions_sample`: prompts and completions as a table; needs `rich`.
- `remove_hooks`, `add_hooks`: what ZeRO-3 does in every forward of training would disturb sampling.
- `VLLMGeneration`: the engine, beside the training or as a server, and how each way of splitting weights fills it.
  Imported when first used, because it imports vLLM.
- `disable_dropout_in_model`: policy and reference of DPO are compared without noise.
- `prepare_deepspeed`, `prepare_fsdp`: a reference that is split as the policy is, or stays whole, and never trains.
- `is_vllm_available`: says so, and warns of versions that TRL does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers import trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl.import_utils import is_vllm_available
from trl.models.utils import add_hooks, prepare_deepspeed, prepare_fsdp, remove_hooks
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    print_prompt_completions_sample,
    selective_log_softmax,
)

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "EvalLoopOutput",
    "VLLMGeneration",
    "add_fused_lm_head",
    "add_hooks",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "is_vllm_available",
    "prepare_deepspeed",
    "prepare_fsdp",
    "print_prompt_completions_sample",
    "remove_hooks",
    "selective_log_softmax",
    "uploading_without",
]


def __getattr__(name: str) -> Any:
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration


@contextmanager
def uploading_without(patterns: Sequence[str]) -> Iterator[None]:
    """Whatever folder the Trainer uploads meanwhile, or starts to, goes without the files of these patterns."""

    class Api(HfApi):
        def upload_folder(self, *, ignore_patterns: Sequence[str] = (), **kwargs: Any) -> Any:  # type: ignore[override]
            return super().upload_folder(ignore_patterns=[*ignore_patterns, *patterns], **kwargs)

    hf_api = trainer.hf_api
    given = hf_api()
    api = Api(library_name=given.library_name, library_version=given.library_version)
    trainer.hf_api = lambda: api
    try:
        yield
    finally:
        trainer.hf_api = hf_api
