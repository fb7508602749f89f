"""The only importer of TRL and transformers names outside their public API; `tests/test_compat.py` watches them.

From transformers:

- `PREFIX_CHECKPOINT_DIR`: our part of a checkpoint goes into the folder that the Trainer is about to fill.
- `EvalLoopOutput`: what `Trainer.evaluation_loop`, which we extend, returns.

From TRL:

- `create_model_from_path`: `model="org/name"` follows the rules of TRL's own trainers for dtype and device map.
- `get_config_model_id`: the name that a model was loaded by.
- `add_fused_lm_head`: log-probabilities without the (rows, length, vocabulary) logits. The head runs tile by tile,
  forward and backward, with logit scaling and soft-capping as each architecture has them.
- `selective_log_softmax`: the same from logits, where the head cannot be fused.
- `print_prompt_completions_sample`: prompts and completions as a table; needs `rich`.
"""

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    print_prompt_completions_sample,
    selective_log_softmax,
)

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "EvalLoopOutput",
    "add_fused_lm_head",
    "create_model_from_path",
    "get_config_model_id",
    "print_prompt_completions_sample",
    "selective_log_softmax",
]
