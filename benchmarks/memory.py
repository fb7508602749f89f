"""Measure seconds and peak memory of a CycleAlign step on one GPU, for different training settings.

The policy is a Qwen3 with about one billion random weights in bfloat16. Each variant runs in its own process.

    python benchmarks/memory.py            # needs a GPU
    python benchmarks/memory.py --tiny     # a tiny model on any device, to check that the benchmark runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

TIMES = ("generate", "forward", "rank_wait", "backward")
VARIANTS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, activation checkpointing": {"activation_checkpointing": True},
    "LoRA": {"lora": True},
    "LoRA, activation checkpointing": {"lora": True, "activation_checkpointing": True},
    "all weights, ZeRO-2": {"deepspeed": True},
    "LoRA, activation checkpointing, ZeRO-2": {"lora": True, "activation_checkpointing": True, "deepspeed": True},
}
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


def measure(variant: dict[str, Any], steps: int, batch_size: int, tiny: bool) -> dict[str, float]:
    """Return the seconds of each phase of a step, the peak memory in GiB and the number of weights of one variant."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, FunctionRanker

    size = 512 if tiny else 151936
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        if tiny
        else {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 14, "num_attention_heads": 16}
    )
    config = Qwen3Config(
        vocab_size=size, **shape, num_key_value_heads=4, head_dim=16 if tiny else 128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=1024,
    )  # fmt: skip
    peft_config = None
    if variant.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    length = 16 if tiny else 256
    prompts = [" ".join(f"w{3 + (row * 7 + index) % 500}" for index in range(length)) for row in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        deepspeed = None
        if variant.get("deepspeed"):
            deepspeed = str(Path(folder, "zero2.json"))
            Path(deepspeed).write_text(json.dumps(ZERO2), encoding="utf-8")
        args = CycleAlignConfig(
            folder,
            num_generations=4,
            num_interactions=1,
            per_device_train_batch_size=batch_size,
            max_prompt_length=length,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            activation_checkpointing=variant.get("activation_checkpointing", False),
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch",
            deepspeed=deepspeed,
        )
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(torch.float32 if args.use_cpu else torch.bfloat16)
        trainer = CycleAlignTrainer(
            model,
            FunctionRanker(lambda completions, **_: [float(len(set(text.split()))) for text in completions]),
            args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        logs = [log for log in trainer.state.log_history if "time/generate" in log][1:]  # without the warm-up step
    measured = {name: fmean(log[f"time/{name}"] for log in logs) for name in TIMES}
    measured["memory"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    measured["weights"] = float(sum(parameter.numel() for parameter in model.parameters()))
    return measured


def main() -> None:
    """Measure each variant in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="Optimiser steps, including one warm-up step.")
    parser.add_argument("--batch_size", type=int, default=4, help="Prompts per step, with 4 completions each.")
    parser.add_argument("--tiny", action="store_true", help="Use a tiny model, which also runs on a CPU.")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is not None:
        measured = measure(VARIANTS[args.variant], args.steps, args.batch_size, args.tiny)
        print(f"measured {json.dumps(measured)}")
        return

    print(f"{'variant':<42}{'GiB':>7}{'ratio':>7}{'step, s':>9}{'ratio':>7}   generate, forward, wait, backward")
    baseline: tuple[float, float] | None = None
    for name, variant in VARIANTS.items():
        # DeepSpeed needs the environment of a launcher even for one process.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        command = [sys.executable, *(launcher if variant.get("deepspeed") else []), *sys.argv, "--variant", name]
        finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
        line = next((line for line in finished.stdout.splitlines() if line.startswith("measured ")), None)
        if line is None:
            print(f"{name:<42}failed: {finished.stderr.strip().splitlines()[-1:]}")
            continue
        measured = json.loads(line.removeprefix("measured "))
        step = sum(measured[time] for time in TIMES)
        baseline = baseline or (measured["memory"], step)
        print(
            f"{name:<42}{measured['memory']:7.1f}{measured['memory'] / (baseline[0] or 1):7.2f}{step:9.2f}"
            f"{step / baseline[1]:7.2f}   " + ", ".join(f"{measured[time]:.2f}" for time in TIMES),
            flush=True,
        )


if __name__ == "__main__":
    main()
