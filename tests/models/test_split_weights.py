"""Sampling from weights that are sharded over two processes, which sample different numbers of tokens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FSDP2 = """
import datetime
from types import SimpleNamespace
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from cyclealign_trl.models.transformers_backend import TransformersBackend
from tests.conftest import make_model

torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank = torch.distributed.get_rank()

def sample(model, split, eos):  # a stub, because accelerate turns FSDP into DDP on CPUs
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP if split else DistributedType.NO, is_fsdp2=split, num_processes=2,
        device=torch.device("cpu"), state=SimpleNamespace(deepspeed_plugin=None), unwrap_model=lambda model: model,
    )
    greedy = {"max_new_tokens": 12, "do_sample": False}
    return TransformersBackend(accelerator, 1, eos, 0, greedy).generate(model, [[[40, 41, 42]], [[50]]][rank])

whole, split = make_model(), make_model()
mesh = torch.distributed.init_device_mesh("cpu", (2,))
for layer in split.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(split, mesh=mesh)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, split)]
for step in range(2):
    ((free,),) = sample(whole, False, (1,))
    eos = (1, free[2]) if rank == 0 else (1,)
    expected = sample(whole, False, eos)
    assert sample(split, True, eos) == expected
    print(f"<{len(expected[0][0])}>")
    ids = torch.tensor([[40, 41, 42, 43]])
    losses = []
    for model, optimizer in zip((whole, split), optimizers):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    torch.testing.assert_close(*losses)
torch.distributed.destroy_process_group()
import os, sys
sys.stdout.flush()
os._exit(0)  # a normal exit of torch with gloo aborts now and then
"""

ZERO3 = """
import sys
from types import SimpleNamespace
import deepspeed, torch
from accelerate.utils import DistributedType
from cyclealign_trl.models.transformers_backend import TransformersBackend
from tests.conftest import make_model
from tests.cycle.stubs import config, make_trainer, prompts

automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
settings = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "adamw_torch",
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        **{name: "auto" for name in automatic},
    },
}
config(sys.argv[1], **settings)
deepspeed.init_distributed(dist_backend="gloo")
trainer = make_trainer(sys.argv[1], eval_dataset=prompts(2), eval_strategy="steps", eval_steps=1, **settings)
trainer.train()

whole = make_model()
with deepspeed.zero.GatheredParameters(trainer.model.parameters()):
    whole.load_state_dict(trainer.model.state_dict())
alone = SimpleNamespace(
    distributed_type=DistributedType.NO, is_fsdp2=False, num_processes=1, device=torch.device("cpu"),
    state=SimpleNamespace(deepspeed_plugin=None), unwrap_model=lambda model: model,
)
prompt_ids = [[[40, 41, 42]], [[50]]][trainer.args.process_index]
greedy, eos = {"max_new_tokens": 12, "do_sample": False}, (1,)
for _ in range(2):
    backend = TransformersBackend(trainer.accelerator, 1, eos, 0, greedy)
    ((sampled,),) = backend.generate(trainer.model_wrapped, prompt_ids)
    assert [[sampled]] == TransformersBackend(alone, 1, eos, 0, greedy).generate(whole, prompt_ids)
    print(f"<{len(sampled)}>")
    eos = (1, sampled[2]) if trainer.is_world_process_zero() else (1,)
trainer.end()
import os
sys.stdout.flush()
os._exit(0)  # as above
"""


def run(folder, code):
    script = folder / "script.py"
    script.write_text(code)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *launcher, str(script), str(folder / "out")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [int(length) for length in re.findall(r"<(\d+)>", finished.stdout)]


def test_fsdp2_matches_the_whole_model(tmp_path):
    lengths = run(tmp_path, FSDP2)
    assert len(lengths) == 4
    assert min(lengths) < max(lengths) == 12


def test_zero3_matches_the_whole_model(tmp_path):
    pytest.importorskip("deepspeed")
    lengths = run(tmp_path, ZERO3)
    assert len(lengths) == 4
    assert min(lengths) < max(lengths) == 12
