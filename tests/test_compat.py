"""A contract with TRL and transformers: if an upgrade moves or changes what `_compat` takes, this says so."""

import inspect

import torch

from cyclealign_trl import _compat
from tests.conftest import make_model


def parameters(function):
    return set(inspect.signature(function).parameters)


def test_every_name_is_there():
    for name in _compat.__all__:
        assert hasattr(_compat, name)


def test_signatures():
    assert {"prompts", "completions", "rewards", "advantages", "step", "extra"} <= parameters(
        _compat.print_prompt_completions_sample
    )
    assert {"logits", "index"} <= parameters(_compat.selective_log_softmax)
    assert "model" in parameters(_compat.add_fused_lm_head)
    assert _compat.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert "metrics" in _compat.EvalLoopOutput._fields


def test_the_fused_head_returns_log_probabilities_of_labels():
    model = make_model()
    _compat.add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7]])
    labels = torch.tensor([[-100, 6, -100]])
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = model(input_ids=ids).logits[0, 0].log_softmax(-1)[6]
    torch.testing.assert_close(output.log_probs, torch.tensor([[expected.item(), 0.0]]), rtol=1e-5, atol=1e-5)


def test_the_names_of_a_checkpoint_are_the_trainers(tmp_path):
    from transformers.trainer import TRAINER_STATE_NAME

    from cyclealign_trl.trainer.cycle_state import TRAINER_STATE

    assert TRAINER_STATE == TRAINER_STATE_NAME
