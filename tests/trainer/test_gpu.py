"""What only an accelerator shows."""

import pytest
import torch

from cyclealign_trl.trainer.logps import fuse_lm_head, sequence_logps
from tests.conftest import make_model
from tests.trainer.stubs import make_trainer, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_run_in_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(4), use_cpu=False)
    assert trainer.args.bf16
    assert trainer.accelerator.device.type == "cuda"
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert trainer.state.log_history[0]["time/backward"] > 0


def test_scores_are_those_of_the_cpu():
    prompt_ids, completion_ids = [[40, 41, 42], [50]], [[43, 44, 1], [51, 1]]
    sums = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        fuse_lm_head(model)
        scored, _ = sequence_logps(model, prompt_ids, completion_ids, pad_token_id=0, device=torch.device(device))
        sums.append(scored.cpu())
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)
