"""Sampling: grouping, ends, padding, cache."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cyclealign_trl.models.transformers_backend import TransformersBackend
from tests.conftest import make_model


def backend(num_generations=1, eos=(1,), **sampling):
    sampling = {"max_new_tokens": 12, "do_sample": False, **sampling}
    return TransformersBackend(Accelerator(cpu=True), num_generations, eos, pad_token_id=0, sampling=sampling)


def test_batched_prompts_continue_as_they_do_alone():
    model = make_model()
    prompts = [[40, 41, 42, 43, 44], [50], [60, 61, 62]]
    together = backend().generate(model, prompts)
    assert together == [backend().generate(model, [prompt])[0] for prompt in prompts]


def test_completions_are_grouped_by_prompt():
    model = make_model()
    torch.manual_seed(0)
    groups = backend(num_generations=3, do_sample=True, top_k=0).generate(model, [[40, 41], [50]])
    assert [len(group) for group in groups] == [3, 3]
    assert len({tuple(ids) for ids in groups[0]}) == 3


def test_every_end_of_sequence_token_ends_a_completion():
    model = make_model()
    (free,) = backend().generate(model, [[40, 41]])[0]
    assert len(free) == 12
    stop = free[5]
    (ended,) = backend(eos=(1, stop)).generate(model, [[40, 41]])[0]
    assert ended == free[: free.index(stop) + 1]


def test_a_completion_that_ends_beside_longer_ones_carries_no_padding():
    model = make_model()
    prompts = [[40, 41], [50], [60, 61, 62]]
    first_tokens = [backend().generate(model, [prompt])[0][0][0] for prompt in prompts]
    completions = backend(eos=(1, first_tokens[0])).generate(model, prompts)
    assert completions[0] == [[first_tokens[0]]]
    assert max(len(group[0]) for group in completions) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_and_the_cache_is_used(training):
    model = make_model().train(training)
    model.config.use_cache = False  # as the Trainer leaves it
    widths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    backend().generate(model, [[40, 41, 42]])
    assert model.training is training
    assert widths == [3, *[1] * 11]


def test_a_policy_that_fsdp_1_splits():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2"):
        TransformersBackend(accelerator, 1, (1,), pad_token_id=0, sampling={})
