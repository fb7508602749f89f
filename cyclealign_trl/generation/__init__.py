"""Who samples the completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from .base import GenerationBackend
from .transformers import TransformersBackend

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..trainer.collator import TextEncoder
    from ..trainer.cyclealign_config import CycleAlignConfig


def make_backend(
    args: CycleAlignConfig, model: PreTrainedModel, accelerator: Accelerator, encoder: TextEncoder
) -> GenerationBackend:
    """The backend that the arguments describe."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    further = cast("dict[str, Any]", args.generation_kwargs or {})
    if args.generation_backend == "transformers":
        return TransformersBackend(
            accelerator,
            args.num_generations,
            encoder.eos_token_ids,
            encoder.tokenizer.pad_token_id,
            {"max_new_tokens": args.max_completion_length, **sampling, **further},
        )

    from .vllm import VLLMBackend  # imports vLLM

    settings = {
        "mode": args.vllm_mode,
        "server_base_url": args.vllm_server_base_url,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        # Without it, vLLM reserves memory for one text of the model's full length.
        "max_model_length": args.max_prompt_length and args.max_prompt_length + args.max_completion_length,
        "max_completion_length": args.max_completion_length,
        "generation_kwargs": further,
        **sampling,
    }
    return VLLMBackend(model, accelerator, encoder.tokenizer, args.num_generations, encoder.eos_token_ids, settings)
