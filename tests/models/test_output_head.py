"""Log-probabilities from hidden states, against full logits."""

import itertools

import pytest
import torch

from cyclealign_trl.models import output_head
from cyclealign_trl.models.output_head import LogitTransform, head_logps

TRANSFORMS = [LogitTransform(), LogitTransform(0.25), LogitTransform(cap=3.0), LogitTransform(2.0, 3.0)]
TRAINED = ["hidden", "hidden weight", "hidden weight bias", "weight", "hidden bias"]


def make_inputs(rows=23, vocabulary=61, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def expected_logps(hidden, weight, bias, targets, transform):
    logits = (hidden @ weight.t() + bias) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def gradients(function, inputs, trained, transform):
    named = dict(zip(("hidden", "weight", "bias"), inputs[:3], strict=True))
    leaves = {name: tensor.clone().requires_grad_(name in trained.split()) for name, tensor in named.items()}
    logps = function(*leaves.values(), inputs[3], transform)
    logps.backward(torch.linspace(-1, 2, len(logps), dtype=logps.dtype))
    return logps.detach(), [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("tile", [(512, 1024), (5, 7), (23, 61)])
@pytest.mark.parametrize(("trained", "transform"), list(itertools.product(TRAINED, TRANSFORMS)))
def test_values_and_gradients_match_full_logits(trained, transform, tile, monkeypatch):
    monkeypatch.setattr(output_head, "_ROWS", tile[0])
    monkeypatch.setattr(output_head, "_COLUMNS", tile[1])
    inputs = make_inputs()
    logps, actual = gradients(head_logps, inputs, trained, transform)
    expected_values, expected = gradients(expected_logps, inputs, trained, transform)
    torch.testing.assert_close(logps, expected_values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_low_precision_is_rounded_once(dtype, trained):
    inputs = make_inputs(dtype=dtype)
    logps, actual = gradients(head_logps, inputs, trained, LogitTransform())
    exact = [tensor.double() for tensor in inputs[:3]] + [inputs[3]]
    expected_values, expected = gradients(expected_logps, exact, trained, LogitTransform())
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected_values, rtol=1e-5, atol=1e-5)
    tolerance = max(2e-5, 4 * torch.finfo(dtype).eps)
    for gradient, reference in zip(actual, expected, strict=True):
        if reference is not None:
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=tolerance)


def test_large_logits_stay_finite():
    hidden, weight, bias, targets = make_inputs(dtype=torch.float32)
    logps = head_logps((1000 * hidden).requires_grad_(), weight, bias, targets, LogitTransform())
    logps.sum().backward()
    assert torch.isfinite(logps).all()


def test_no_rows_have_no_gradient():
    hidden, weight, bias, targets = make_inputs()
    weight.requires_grad_()
    head_logps(hidden[:0], weight, bias, targets[:0], LogitTransform()).sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_a_tile_is_the_largest_tensor(trained, monkeypatch):
    monkeypatch.setattr(output_head, "_ROWS", 8)
    monkeypatch.setattr(output_head, "_COLUMNS", 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output._base is None:
                largest = max(largest, output.numel())
            return output

    inputs = make_inputs(rows=64, vocabulary=640, width=4)
    with Watch():
        gradients(head_logps, inputs, trained, LogitTransform())
    assert largest == 640 * 4  # the head's weight and its gradient, not 64 x 640 logits
