"""The only importer of TRL and transformers names outside their public API; `tests/test_compat.py` watches them."""

# Loads a causal LM by name with TRL's own rules for dtype and device map, so that `model="org/name"` means the same
# in every trainer of a script.
# Per-token log-probabilities without the (rows, length, vocabulary) logits: the head runs tile by tile, forward and
# backward, with logit scaling and soft-capping as each architecture has them.
# Prints prompts and completions as a table; needs `rich`.
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    print_prompt_completions_sample,
    selective_log_softmax,
)

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "add_fused_lm_head",
    "create_model_from_path",
    "get_config_model_id",
    "print_prompt_completions_sample",
    "selective_log_softmax",
]
