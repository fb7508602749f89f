"""The loss of DLMA against golden values, and its precision."""

import pytest
import torch

from cyclealign_trl import dlma_loss
from cyclealign_trl.models.logps import _reduce_logits

FLOAT64 = {"rtol": 0, "atol": 1e-9}


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(value, expected, **tolerance):
    torch.testing.assert_close(float(value), expected, **(tolerance or FLOAT64))


def test_dlma_of_golden_log_probabilities(golden):
    cases = golden["dlma"]["margin_loss"]
    assert len(cases) == 6
    for case in cases:
        inputs, expected = case["inputs"], case["expected"]
        policy = [float64(inputs[f"policy_{side}"]) for side in ("chosen", "rejected")]
        reference = [float64(inputs[f"ref_{side}"]) for side in ("chosen", "rejected")]
        if inputs.get("reference_free"):
            reference = [torch.zeros_like(logps) for logps in reference]
        beta, weight, clip = (inputs["beta"], inputs["margin_loss_weight"], (inputs["min_range"], inputs["max_range"]))
        margins = float64(inputs["margin"])
        losses = dlma_loss(*policy, *reference, margins, beta, weight, clip)
        torch.testing.assert_close(losses, float64(expected["losses"]), **FLOAT64)
        close(losses.mean(), expected["loss_mean"])
        plain = dlma_loss(*policy, *reference, margins, beta, margin_weight=0.0)
        if not inputs.get("reference_free"):
            torch.testing.assert_close(plain, float64(expected["plain_dpo_losses"]), **FLOAT64)
        assert beta * weight == pytest.approx(expected["beta1_in_paper_form"])
    defaults = cases[0]["inputs"]
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin")
    losses = dlma_loss(*(float64(defaults[name]) for name in names))
    torch.testing.assert_close(losses, float64(cases[0]["expected"]["losses"]), **FLOAT64)


def test_golden_log_probabilities_of_tokens(golden):
    (case,) = golden["dlma"]["token_logprob"]
    logits, labels = float64(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
    counted = labels[:, 1:] >= 0
    logps = torch.zeros(counted.shape, dtype=logits.dtype)
    logps[counted] = _reduce_logits(logits[:, :-1][counted], labels[:, 1:][counted])
    sums = logps.sum(dim=1)
    torch.testing.assert_close(sums.double(), float64(case["expected"]["sum_logprob"]), rtol=0, atol=1e-5)


def test_dlma_of_bfloat16_is_computed_in_float32():
    halves = torch.tensor([[-412.3], [-400.1], [-411.0], [-401.0]], dtype=torch.bfloat16)
    loss = dlma_loss(*halves, torch.tensor([3.0]))
    assert loss.dtype == torch.float32
    expected = dlma_loss(*halves.float(), torch.tensor([3.0]))
    assert torch.equal(loss, expected)
