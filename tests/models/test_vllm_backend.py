"""VLLMBackend with TRL's `VLLMGeneration` around a fake engine or client that records requests."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from trl.generation import vllm_generation

from cyclealign_trl import CycleAlignConfig
from cyclealign_trl.cycle import cyclealign_trainer
from cyclealign_trl.models import vllm_backend as vllm
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import K, make_trainer, prompts

EOS = 1


class FakeEngine(vllm_generation.VLLMGeneration):
    """VLLMGeneration without vLLM. A completion is the prompt's last token, 40 + its index, EOS and one more token."""

    def _init_vllm(self):
        self.requests, self.sampling, self.syncs = [], [], []
        self.vllm_client = SimpleNamespace(
            generate=self._serve,
            update_named_params=lambda metadata, params: self._load(params),
            reset_prefix_cache=lambda: None,
        )
        loader = SimpleNamespace(load_weights=self._load)
        runner = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(
            model_runner=SimpleNamespace(model=loader))))  # fmt: skip
        self.llm = SimpleNamespace(generate=self._colocated, llm_engine=runner, reset_prefix_cache=lambda: None)
        self.weights = {}

    def sync_weights(self):
        self.syncs.append(len(self.requests))
        super().sync_weights()

    def _load(self, params):
        self.weights.update((name, value.detach().clone()) for name, value in params)

    def _colocated(self, prompts, sampling_params, use_tqdm):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        self._record(ids, vars(sampling_params))
        return [
            SimpleNamespace(
                prompt_token_ids=prompt,
                outputs=[SimpleNamespace(token_ids=[prompt[-1], 40 + index % K, EOS, 50], logprobs=None)],
            )
            for index, prompt in enumerate(ids)
        ]

    def _serve(self, prompts, features, n, generation_kwargs, **sampling):
        self._record(prompts, {"n": n, **sampling, **generation_kwargs})
        completions = [[prompt[-1], 40 + index, EOS, 50] for prompt in prompts for index in range(n)]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    def _record(self, prompts, sampling):
        self.requests.append(prompts)
        self.sampling.append(sampling)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(vllm, "VLLMGeneration", FakeEngine)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(cyclealign_trainer, "is_vllm_available", lambda: True)


def named_model():
    model = make_model()
    model.name_or_path = "a-policy"
    return model


def backend(mode, eos=(EOS,), **settings):
    return vllm.VLLMBackend(named_model(), Accelerator(cpu=True), make_tokenizer(), K, eos, {"mode": mode, **settings})


MODES = pytest.mark.parametrize("mode", ["colocate", "server"])


@MODES
def test_completions_are_grouped_by_prompt_and_truncated_after_their_end(mode):
    sampled = backend(mode).generate(None, [[10, 11], [20]])
    assert sampled == [[[last, 40 + index, EOS] for index in range(K)] for last in (11, 20)]


@MODES
def test_every_end_of_sequence_token_ends_a_completion(mode):
    engine = backend(mode, eos=(EOS, 41))
    assert engine.generate(None, [[20]]) == [[[20, 40, EOS], [20, 41], [20, 42, EOS]]]
    assert engine._engine.sampling[0]["stop_token_ids"] == [EOS, 41]


@MODES
def test_a_completion_without_an_end_is_not_truncated(mode):
    assert backend(mode, eos=(2,)).generate(None, [[20]])[0][0] == [20, 40, EOS, 50]


def test_a_colocated_engine_gets_each_prompt_k_times():
    engine = backend("colocate")
    engine.generate(None, [[10, 11], (20,)])
    assert engine._engine.requests == [[[10, 11]] * K + [[20]] * K]
    assert engine._engine.sampling[0]["n"] == 1


def test_a_server_gets_each_prompt_once():
    engine = backend("server")
    engine.generate(None, [[10, 11], (20,)])
    assert engine._engine.requests == [[[10, 11], [20]]]
    assert engine._engine.sampling[0]["n"] == K


@MODES
def test_sampling_arguments_reach_vllm(mode):
    engine = backend(
        mode, max_completion_length=9, temperature=0.7, top_p=0.9, top_k=5, min_p=None,
        generation_kwargs={"presence_penalty": 0.5},
    )  # fmt: skip
    engine.generate(None, [[10]])
    expected = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "presence_penalty": 0.5}
    assert expected.items() <= engine._engine.sampling[0].items()


def test_a_colocated_policy_needs_a_name():
    with pytest.raises(ValueError, match="this model has none"):
        vllm.VLLMBackend(make_model(), Accelerator(cpu=True), make_tokenizer(), K, (EOS,), {"mode": "colocate"})
    vllm.VLLMBackend(make_model(), Accelerator(cpu=True), make_tokenizer(), K, (EOS,), {"mode": "server"})


# In the trainer


@MODES
def test_weights_are_synchronised_once_per_optimiser_step(tmp_path, mode):
    trainer = make_trainer(
        tmp_path, model=named_model(), generation_backend="vllm", vllm_mode=mode, max_steps=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    engine, in_sync = trainer.generation._engine, []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            in_sync.append(same_weights(engine, model))

    trainer.add_callback(Watch())
    trainer.train()
    # One call per step, for the prompts of both micro-batches.
    assert [len(batch) for batch in engine.requests] == [4 * (K if mode == "colocate" else 1)] * 3
    assert engine.syncs == [0, 1, 2]
    assert in_sync == [True] * 3


def test_an_evaluation_samples_from_the_current_weights(tmp_path):
    trainer = make_trainer(
        tmp_path, model=named_model(), generation_backend="vllm", eval_dataset=prompts(2), eval_strategy="steps",
        save_strategy="steps", save_steps=1, eval_steps=1, max_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_completions/mean_length",
    )  # fmt: skip
    engine = trainer.generation._engine
    trainer.evaluate()
    trainer.train()
    # Synchronised before training, at its start, and after each step.
    assert engine.syncs == [0, 1, 2, 4]
    assert not same_weights(engine, trainer.model)  # training ends with the weights of step 1 loaded
    trainer.evaluate()
    assert same_weights(engine, trainer.model)


def same_weights(engine, model):
    return all(torch.equal(engine.weights[name], value) for name, value in model.named_parameters())


def test_vllm_gets_weights_with_the_adapter_merged(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(
        tmp_path, model=named_model(), generation_backend="vllm", max_steps=1,
        peft_config=peft.LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    engine = trainer.generation._engine
    engine.sync_weights()
    assert set(engine.weights) == set(dict(make_model().named_parameters()))
    merged = trainer.model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(engine.weights[name], merged[name])
    assert not torch.equal(merged[name], make_model().state_dict()[name])


def test_config_fields_reach_vllm(tmp_path):
    trainer = make_trainer(
        tmp_path, model=named_model(), generation_backend="vllm", vllm_gpu_memory_utilization=0.4,
        max_prompt_length=20, max_completion_length=10, temperature=0.8, generation_kwargs={"seed": 7},
    )  # fmt: skip
    engine = trainer.generation._engine
    assert engine.model is trainer.model
    assert engine.accelerator is trainer.accelerator
    assert (engine.mode, engine.gpu_memory_utilization, engine.tensor_parallel_size) == ("colocate", 0.4, 1)
    assert (engine.max_model_length, engine.max_completion_length, engine.temperature) == (30, 10, 0.8)
    assert engine.generation_kwargs == {"stop_token_ids": [EOS], "seed": 7}

    address = "http://10.0.0.1:8000"
    trainer = make_trainer(
        tmp_path, generation_backend="vllm", vllm_mode="server", vllm_server_base_url=address, max_prompt_length=None
    )
    engine = trainer.generation._engine
    assert (engine.mode, engine.server_base_url, engine.max_model_length) == ("server", address, None)


def test_a_missing_vllm_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(cyclealign_trainer, "is_vllm_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'cyclealign-trl\[vllm\]'"):
        make_trainer(tmp_path, generation_backend="vllm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_backend": "tgi"}, "generation_backend must be one of 'transformers', 'vllm', got 'tgi'"),
        ({"generation_backend": "vllm", "vllm_mode": "remote"}, "vllm_mode must be one of 'colocate', 'server'"),
        ({"vllm_mode": "server"}, "vllm_mode='server' has no effect with generation_backend='transformers'"),
        ({"vllm_gpu_memory_utilization": 0.5}, "Set generation_backend='vllm', or leave vllm_gpu_memory_utilization"),
        (
            {"generation_backend": "vllm", "vllm_server_base_url": "http://gpu:8000"},
            "vllm_server_base_url='http://gpu:8000' has no effect with vllm_mode='colocate', only with 'server'",
        ),
        (
            {"generation_backend": "vllm", "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=2 has no effect with vllm_mode='server', only with 'colocate'",
        ),
        ({"generation_backend": "vllm", "vllm_gpu_memory_utilization": 1.5}, "at most 1, got 1.5"),
        ({"generation_backend": "vllm", "vllm_tensor_parallel_size": 0}, "must be at least 1, got 0"),
    ],
)
def test_contradictory_settings_raise(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CycleAlignConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None, reason="needs a GPU and vLLM"
)
def test_cyclealign_trains_with_vllm(tmp_path, monkeypatch):
    monkeypatch.undo()  # removes the fake engine
    policy = tmp_path / "policy"
    make_model(hidden_size=256, intermediate_size=256).to(torch.bfloat16).save_pretrained(policy)  # head size 64
    make_tokenizer().save_pretrained(policy)
    trainer = make_trainer(
        tmp_path, model=str(policy), generation_backend="vllm", use_cpu=False, max_steps=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-2]["completions/mean_length"] > 1
