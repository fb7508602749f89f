"""Sampling in batches outside of training."""

import torch

from cyclealign_trl.models.batched_generator import BatchedGenerator
from tests.conftest import make_model, make_tokenizer


def test_sampling_depends_on_its_seed_and_keeps_the_global_random_state():
    generator = BatchedGenerator(make_model(), make_tokenizer(), 4, 8)
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0, "top_p": 1.0}

    def generate(seed):
        return generator.generate([[5, 6, 7]] * 4, hot, seed)

    state = torch.get_rng_state()
    first = generate(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert generate(0) == first != generate(1)
    assert generate(None) != generate(None)


def test_the_repetition_penalty_ignores_the_prompt():
    model = make_model()
    generator = BatchedGenerator(model, make_tokenizer(), 2, 6)
    prompts = [[5, 6, 7, 8], [9]]
    plain = generator.generate(prompts, {"do_sample": False, "max_new_tokens": 1})
    penalised = generator.generate(prompts, {"do_sample": False, "max_new_tokens": 1, "repetition_penalty": 1e6})
    assert penalised == plain  # the first token has nothing generated before it
    text = generator.generate(prompts, {"do_sample": False, "repetition_penalty": 1e6})
    assert all(len(set(ids)) == len(ids) for ids in text)
