"""Losses against golden values, with ties, absent completions and extreme scores."""

import pytest
import torch

from cyclealign_trl import pro_loss, rrhf_loss
from cyclealign_trl.models.logps import PLAIN, _reduce_logits, sequence_logps
from cyclealign_trl.types import ranks_from_scores

FLOAT64 = {"rtol": 0, "atol": 1e-9}


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def in_order(scores):
    return torch.arange(scores.shape[1]).expand(scores.shape)


def close(value, expected, **tolerance):
    torch.testing.assert_close(float(value), expected, **(tolerance or FLOAT64))


def test_pro_of_golden_scores(golden):
    assert len(golden["pro"]["score_level"]) == 7
    for case in golden["pro"]["score_level"]:
        inputs, expected = case["inputs"], case["expected"]
        scores, rewards = float64(inputs["mean_logprob"]), float64(inputs["rewards"])
        plain, with_temperature = pro_loss(scores, in_order(scores)), pro_loss(scores, in_order(scores), rewards)
        close(plain.mean(), expected["no_temperature"]["rank_loss"])
        close(with_temperature.mean(), expected["with_temperature_exact"]["rank_loss"])
        factor = inputs["sft_weight"] * (scores.shape[1] - 1) ** 2
        sums = float64(inputs["sum_logprob"])
        sft = -sums[torch.arange(len(sums)), torch.tensor(inputs["sft_index"])].mean()
        close(plain.mean() + factor * sft, expected["no_temperature"]["total"])
        close(with_temperature.mean() + factor * sft, expected["with_temperature_exact"]["total"])


class FixedLogits(torch.nn.Module):
    """Language model that returns fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache):
        assert input_ids.shape == attention_mask.shape == self.logits.shape[:2]
        return self


def test_pro_of_golden_tokens(golden):
    assert len(golden["pro"]["token_level"]) == 2
    for case in golden["pro"]["token_level"]:
        inputs, expected = case["inputs"], case["expected"]["clean"]
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            start = inputs["prefix_lens"][row]
            real = [tokens[: sum(seen)] for tokens, seen in zip(ids, mask, strict=True)]
            sums, lengths = sequence_logps(
                FixedLogits(float64(inputs["logits"][row])),
                [tokens[:start] for tokens in real],
                [tokens[start:] for tokens in real],
                pad_token_id=inputs["pad_id"],
                device=torch.device("cpu"),
                scoring=PLAIN,
            )
            torch.testing.assert_close(sums.tolist(), expected["sum_logprob"][row], rtol=2e-4, atol=2e-4)
            assert lengths.tolist() == expected["num_tokens"][row]
        scores = float64(expected["mean_logprob"])
        close(pro_loss(scores, in_order(scores)).mean(), expected["no_temperature"]["rank_loss"])


def test_rrhf_of_golden_scores(golden):
    assert len(golden["rrhf"]["score_level"]) == 6
    for case in golden["rrhf"]["score_level"]:
        inputs, expected = case["inputs"], case["expected"]
        sums = float64([inputs["sum_logprob"]])
        scores = sums / float64([inputs["num_tokens"]])
        ranks = torch.tensor([ranks_from_scores(inputs["rewards"])])
        close(rrhf_loss(scores, ranks)[0], expected["rank_loss"])
        best = int(ranks[0].argmin())
        assert best == expected["best_index"]
        close(-sums[0, best], expected["sft_loss_sum"])
        close(rrhf_loss(scores, ranks)[0] - sums[0, best], expected["total_paper"])


def test_rrhf_of_golden_tokens(golden):
    assert len(golden["rrhf"]["token_level"]) == 2
    for case in golden["rrhf"]["token_level"]:
        inputs, expected = case["inputs"], case["expected"]
        labels = torch.tensor(inputs["labels_shifted"])
        counted = labels >= 0
        logps = torch.zeros(labels.shape, dtype=torch.float64)
        logps[counted] = _reduce_logits(float64(inputs["logits"])[counted], labels[counted])
        sums, lengths = logps.sum(dim=1), counted.sum(dim=1)
        torch.testing.assert_close(sums.tolist(), expected["sum_logprob"], rtol=2e-4, atol=2e-4)
        assert lengths.tolist() == expected["num_tokens"]
        ranks = torch.tensor([ranks_from_scores(inputs["rewards"])])
        close(rrhf_loss((sums / lengths)[None], ranks)[0], expected["paper"]["rank_loss"], rtol=2e-4, atol=2e-4)


def test_tied_completions_are_not_compared():
    scores = float64([[-0.3, -0.9, -0.5]])
    tied_first = torch.tensor([[0, 0, 1]])
    a, b, c = scores[0].exp()
    close(pro_loss(scores, tied_first)[0], float(-(a / (a + c)).log() - (b / (b + c)).log()))
    assert pro_loss(scores, torch.tensor([[0, 0, 0]])).item() == 0
    assert rrhf_loss(scores, torch.tensor([[0, 0, 0]])).item() == 0


@pytest.mark.parametrize("loss", [pro_loss, rrhf_loss])
def test_absent_completions_change_neither_loss_nor_gradients(loss):
    scores = float64([[-0.3, -0.9, -0.5]])
    ranks = torch.tensor([[2, 0, 1]])
    padded = torch.tensor([[-0.3, float("nan"), -0.9, -0.5, float("inf")]], dtype=torch.float64, requires_grad=True)
    value = loss(padded, torch.tensor([[2, -1, 0, 1, -1]]))
    torch.testing.assert_close(value, loss(scores, ranks))
    value.sum().backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert padded.grad[0, 1] == padded.grad[0, 4] == 0


@pytest.mark.parametrize("loss", [pro_loss, rrhf_loss])
@pytest.mark.parametrize("ranks", [[-1, -1, -1], [0, -1, -1]])
def test_the_loss_is_zero_without_a_pair_to_compare(loss, ranks):
    scores = torch.tensor([[-0.3, -0.9, -0.5]], requires_grad=True)
    value = loss(scores, torch.tensor([ranks]))
    value.sum().backward()
    assert value.item() == 0
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("loss", [pro_loss, rrhf_loss])
def test_the_order_of_completions_does_not_matter(loss):
    generator = torch.Generator().manual_seed(0)
    scores, ranks = torch.randn(1, 6, generator=generator), torch.randperm(6, generator=generator)[None]
    shuffle = torch.randperm(6, generator=generator)
    torch.testing.assert_close(loss(scores, ranks), loss(scores[:, shuffle], ranks[:, shuffle]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_finite_for_extreme_scores_and_computed_in_float32(dtype):
    scores = torch.tensor([[-1e-4, -9e3, -2e4], [-2e4, -9e3, -1e-4]], dtype=dtype, requires_grad=True)
    ranks, rewards = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[60.0, 1.0, -80.0]] * 2)
    for value in (pro_loss(scores, ranks), pro_loss(scores, ranks, rewards), rrhf_loss(scores, ranks)):
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        assert gradient.isfinite().all()


def test_rewards_that_contradict_the_ranks_raise():
    with pytest.raises(ValueError, match=r"reward 2 larger"):
        pro_loss(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.tensor([[1.0, 3.0]]))


def test_different_shapes_raise():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        rrhf_loss(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.long))
