"""Log-probabilities with the fused and with the plain head, against a direct computation."""

import pytest
import torch

from cyclealign_trl.models.logps import fuse_lm_head, fused_head_is_exact, sequence_logps
from tests.conftest import make_model

PROMPTS = [[40, 41, 42], [50], [60, 61]]
COMPLETIONS = [[43, 44, 1], [51, 52, 53, 54, 1], [62]]


def logps(model, prompts=PROMPTS, completions=COMPLETIONS, fused=True):
    device = torch.device("cpu")
    return sequence_logps(model, prompts, completions, pad_token_id=0, device=device, fused=fused)


def plain_logp(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(dim=-1)
    return sum(logits[len(prompt) - 1 + position, token] for position, token in enumerate(completion))


@pytest.mark.parametrize("fused", [True, False])
def test_sums_match_a_direct_computation(fused):
    model = make_model()
    fuse_lm_head(model)
    sums, lengths = logps(model, fused=fused)
    expected = [plain_logp(model, prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert lengths.tolist() == [3, 5, 1]


def test_both_heads_give_the_same_gradients():
    gradients = []
    for fused in (True, False):
        model = make_model()
        fuse_lm_head(model)
        sums, lengths = logps(model, fused=fused)
        (sums / lengths).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows():
    model = make_model()
    fuse_lm_head(model)
    together, _ = logps(model)
    alone = [logps(model, [prompt], [ids])[0] for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_an_absent_completion_has_a_zero_sum_and_no_gradient(fused):
    model = make_model()
    fuse_lm_head(model)
    sums, lengths = logps(model, PROMPTS[:1], [[]], fused=fused)
    sums.sum().backward()
    assert (sums.item(), lengths.item()) == (0, 0)
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_the_head_is_applied():
    peft = pytest.importorskip("peft")
    targets = {False: ["q_proj"], True: ["q_proj", "lm_head"]}
    for on_head, modules in targets.items():
        model = make_model()
        fuse_lm_head(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=modules, init_lora_weights=False))
        fused = fused_head_is_exact(wrapped, wrapped.get_base_model())
        assert fused is not on_head
        sums, _ = logps(wrapped, PROMPTS[:1], COMPLETIONS[:1], fused=fused)
        torch.testing.assert_close(sums[0], plain_logp(wrapped, PROMPTS[0], COMPLETIONS[0]), rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_fused_model_uses_its_own_weights():
    import copy

    model = make_model()
    fuse_lm_head(model)
    copied = copy.deepcopy(model)
    fuse_lm_head(copied)  # has no effect
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    plain = make_model()
    plain.load_state_dict(copied.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(copied(ids).logits, plain(ids).logits)
    assert torch.equal(copied.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    arguments = {"pad_token_id": 0, "device": torch.device("cpu")}
    torch.testing.assert_close(
        sequence_logps(copied, [[5]], [[6, 7]], **arguments),
        sequence_logps(plain, [[5]], [[6, 7]], **arguments, fused=False),
    )
    assert not torch.equal(copied(ids).logits, model(ids).logits)
