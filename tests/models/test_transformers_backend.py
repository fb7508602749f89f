"""TransformersBackend: grouping, end-of-sequence tokens, padding and the KV cache."""

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


def test_a_batch_gives_the_same_completions_as_single_prompts():
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
    (unstopped,) = backend().generate(model, [[40, 41]])[0]
    assert len(unstopped) == 12
    stop = unstopped[5]
    (ended,) = backend(eos=(1, stop)).generate(model, [[40, 41]])[0]
    assert ended == unstopped[: unstopped.index(stop) + 1]


def test_a_completion_that_ends_before_the_others_has_no_padding():
    model = make_model()
    prompts = [[40, 41], [50], [60, 61, 62]]
    first_tokens = [backend().generate(model, [prompt])[0][0][0] for prompt in prompts]
    completions = backend(eos=(1, first_tokens[0])).generate(model, prompts)
    assert completions[0] == [[first_tokens[0]]]
    assert max(len(group[0]) for group in completions) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_and_the_cache_is_used(training):
    model = make_model().train(training)
    model.config.use_cache = False  # the Trainer sets this
    widths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    backend().generate(model, [[40, 41, 42]])
    assert model.training is training
    assert widths == [3, *[1] * 11]


def test_fsdp_1_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2"):
        TransformersBackend(accelerator, 1, (1,), pad_token_id=0, sampling={})
