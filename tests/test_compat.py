"""Contract tests for the private names of TRL and transformers in `_compat`, which upgrades may move or change."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch

from cyclealign_trl import _compat
from tests.conftest import make_model


def parameters(function):
    return set(inspect.signature(function).parameters)


def test_every_name_exists():
    for name in _compat.__all__:
        assert hasattr(_compat, name)


def test_functions_accept_our_arguments():
    assert {"prompts", "completions", "rewards", "advantages", "step", "extra"} <= parameters(
        _compat.print_prompt_completions_sample
    )
    assert {"logits", "index"} <= parameters(_compat.selective_log_softmax)
    assert _compat.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert "metrics" in _compat.EvalLoopOutput._fields
    rotation = list(inspect.signature(_compat.rotate_checkpoints).parameters)
    assert rotation[:4] == ["output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"]
    assert "model" in parameters(_compat.remove_hooks) & parameters(_compat.add_hooks)


def test_models_are_saved_on_process_0_alone_unless_told_otherwise():
    from transformers import PreTrainedModel

    assert "self.should_save_on_this_rank(is_main_process)" in inspect.getsource(PreTrainedModel.save_pretrained)
    model = make_model()
    with _compat.saving_on_this_process(model):
        assert model.should_save_on_this_rank(True)
        assert not model.should_save_on_this_rank(False)
        assert model.should_save_on_this_rank.__name__ == "<lambda>"
    assert model.should_save_on_this_rank.__name__ == "should_save_on_this_rank"


TIMEOUTS = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from cyclealign_trl._compat import set_timeout_of_all_groups

set_timeout_of_all_groups(timedelta(seconds=9))  # without groups
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
groups = [dist.group.WORLD, dist.new_group([0])]
set_timeout_of_all_groups(timedelta(seconds=9))
print([group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups])
"""


def test_the_timeout_of_all_groups_is_set(tmp_path):
    command = [sys.executable, "-c", TIMEOUTS, str(tmp_path / "store")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.stdout.strip() == "[9.0, 9.0]", finished.stderr


def test_vllm_generation_accepts_our_arguments():
    engine = _compat.VLLMGeneration
    settings = {"mode", "server_base_url", "tensor_parallel_size", "gpu_memory_utilization", "max_model_length"}
    sampling = {"temperature", "top_p", "top_k", "min_p", "max_completion_length", "logprobs", "generation_kwargs"}
    assert {"model", "accelerator", "processing_class"} | settings | sampling <= parameters(engine)
    assert parameters(engine.generate) == {"self", "prompts", "images", "num_generations", "profiler"}
    assert parameters(engine.sync_weights) == {"self"}


def test_trainers_have_the_methods_that_the_aligner_trainer_overrides():
    from transformers import Trainer
    from trl import SFTTrainer

    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters)[1:] == [
        "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"
    ]  # fmt: skip
    assert 'is_processed = "input_ids" in column_names' in inspect.getsource(SFTTrainer._prepare_dataset)
    assert "self._metrics[mode].items()" in inspect.getsource(SFTTrainer.log)
    assert list(inspect.signature(Trainer._save).parameters) == ["self", "output_dir", "state_dict"]
    values = inspect.getsource(Trainer.set_initial_training_values).rpartition("return (")[2]
    assert values.split()[:7] == [
        "num_train_epochs,", "num_update_steps_per_epoch,", "num_examples,", "num_train_samples,",
        "total_train_batch_size,", "steps_in_epoch,", "max_steps,",
    ]  # fmt: skip


def test_importing_the_trainer_does_not_import_vllm():
    code = (
        "import sys, cyclealign_trl.cycle.cyclealign_trainer; print('trl.generation.vllm_generation' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == "False"


def test_the_kernel_returns_log_probabilities_of_targets():
    hidden, weight, bias, targets = torch.randn(3, 8), torch.randn(50, 8), torch.randn(50), torch.tensor([4, 0, 49])
    logps, *_ = _compat.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16, 5.0, 0.5, ("log_probs",))
    logits = 5.0 * torch.tanh((hidden @ weight.t() + bias) * 0.5 / 5.0)
    expected = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_only_sharded_heads_are_gathered():
    with _compat.maybe_gather_lm_head_ctx(torch.nn.Parameter(torch.zeros(2)), None):
        pass


def test_uploading_without_excludes_files_from_every_upload_of_the_trainer(monkeypatch):
    from huggingface_hub import HfApi
    from transformers import Trainer, trainer

    for method, num_uploads in ((Trainer.push_to_hub, 1), (Trainer._push_from_checkpoint, 2)):
        assert inspect.getsource(method).count("hf_api().upload_folder(") == num_uploads
    uploads = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: uploads.append(kwargs))
    original = trainer.hf_api
    with _compat.uploading_without(["*.sqlite"]):
        trainer.hf_api().upload_folder(repo_id="a", ignore_patterns=["_*"])
        trainer.hf_api().upload_folder(repo_id="b")
    assert trainer.hf_api is original
    assert uploads == [
        {"repo_id": "a", "ignore_patterns": ["_*", "*.sqlite"]},
        {"repo_id": "b", "ignore_patterns": ["*.sqlite"]},
    ]


def test_the_trainer_state_file_has_the_trainers_name():
    from transformers.trainer import TRAINER_STATE_NAME

    from cyclealign_trl.training.checkpoints import TRAINER_STATE

    assert TRAINER_STATE == TRAINER_STATE_NAME


@pytest.mark.parametrize("used", ["false", "true"])
def test_deepspeed_is_silent_unless_it_is_used(monkeypatch, used):
    real_accelerator = pytest.importorskip("deepspeed.accelerator.real_accelerator")
    note = "Setting accelerator to CPU. If you have GPU"
    assert note in inspect.getsource(real_accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", used)
    logger = real_accelerator.accel_logger
    assert logger is logging.getLogger("DeepSpeed")
    record, other = (logger.makeRecord(logger.name, 30, "", 0, text, (), None) for text in (note, "Out of memory"))
    assert bool(logger.filter(record)) == (used == "true")
    assert logger.filter(other)
