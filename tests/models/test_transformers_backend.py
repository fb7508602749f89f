"""TransformersBackend: grouping, end-of-sequence tokens, padding and the KV cache."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cyclealign_trl.models.transformers_backend import TransformersBackend
from tests.conftest import make_model, make_tokenizer


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
    backend().generate(model, [[40]])  # compares the loop with a forward pass once
    widths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    backend().generate(model, [[40, 41, 42]])
    assert model.training is training
    assert widths == [3, *[1] * 11]


def test_fsdp_1_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2"):
        TransformersBackend(accelerator, 1, (1,), pad_token_id=0, sampling={})


CHECKPOINT_SETTINGS = {  # fields of a checkpoint's generation config that would change what is sampled
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "num_beams": 3,
    "suppress_tokens": list(range(3, 90)),
    "bad_words_ids": [[index] for index in range(3, 90)],
    "top_k": 1,
    "temperature": 0.01,
    "forced_eos_token_id": 1,
    "min_new_tokens": 12,
    "exponential_decay_length_penalty": (1, 10.0),
    "begin_suppress_tokens": list(range(3, 90)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", CHECKPOINT_SETTINGS)
@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_the_generation_config_of_the_checkpoint_changes_nothing(field, adapter):
    def sample(**fields):
        model = make_model()
        for name, value in fields.items():
            setattr(model.generation_config, name, value)
        before = model.generation_config
        if adapter:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        torch.manual_seed(0)
        groups = backend(2, do_sample=True, temperature=1.0, top_k=0).generate(model, [[40, 41], [50]])
        assert model.generation_config is before  # it is saved with the model
        return groups

    assert sample(**{field: CHECKPOINT_SETTINGS[field]}) == sample()


def test_stop_strings_end_a_completion():
    model = make_model()
    tokenizer = make_tokenizer()
    (whole,) = backend().generate(model, [[40, 41]])[0]
    stop = tokenizer.decode(whole[4:6])
    sampling = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop]}
    stopping = TransformersBackend(Accelerator(cpu=True), 1, (1,), 0, sampling, tokenizer)
    (ended,) = stopping.generate(model, [[40, 41]])[0]
    assert tokenizer.decode(ended).endswith(stop)
    assert len(ended) < len(whole)
