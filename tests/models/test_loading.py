"""Default devices and digests of weights."""

import torch

from cyclealign_trl.models.loading import default_device, digest_weights
from tests.conftest import make_model


def test_each_process_uses_its_own_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees only its own
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_a_digest_changes_only_with_the_weights():
    model, copy = make_model(), make_model()
    assert digest_weights(model) == digest_weights(copy)
    assert digest_weights(model) != digest_weights(make_model(seed=1))
    optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-4)
    copy(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    optimizer.step()
    assert digest_weights(model) != digest_weights(copy)
