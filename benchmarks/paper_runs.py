"""Estimate the memory, hours and dollars of the runs in `examples/paper/` on one A100 with 40 GB.

    python -m benchmarks.paper_runs HH_RLHF_FOLDER

Nothing is measured: the estimates follow from the sizes of models and data, and from the assumptions below. Dollars
come from `estimate_run`, with every completion as long as `max_completion_length` allows. DeepSpeed estimates the
memory of weights and optimizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from cyclealign_trl import CycleAlignConfig, LLMRanker, assume_completions, estimate_run, load_hh_rlhf, sample_prompts

from .speed.limits import generation_flops, training_flops
from .speed.shapes import ModelShape

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "paper"))
from rows import ROWS, Row

SHAPES = {
    "LLaMA-7B": ModelShape(32_000, 4096, 11_008, 32, 32, 32, 128, tied=False),
    "Alpaca-7B": ModelShape(32_000, 4096, 11_008, 32, 32, 32, 128, tied=False),
    "Qwen3-4B": ModelShape(151_936, 2560, 9728, 36, 32, 8, 128),
}
# Data sheet of an A100 with 40 GB.
FLOPS = 312e12
BYTES_PER_SECOND = 1555e9
# Assumptions.
SHARE_OF_FLOPS = 0.4
SHARE_OF_BANDWIDTH = 0.6
HOST_BYTES_PER_SECOND = 100e9  # CPU memory, which Adam reads and writes: 28 bytes per weight
PCIE_BYTES_PER_SECOND = 20e9  # gradients to the host and weights back: 4 bytes per weight
JUDGE_SECONDS = 2.0  # for one ranking, which a step of one prompt waits for
EVALUATION_BATCH = 16
REWARD_MODEL_WEIGHTS = 6.9e9
BYTES_PER_TOKEN = 4

NUM_PAIRS, NUM_TEST_PROMPTS = 160_800, 8_552


def num_weights(shape: ModelShape) -> int:
    """Return the weights of a model, embeddings and head included."""
    return shape.body_weights + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)


def training_hours(row: Row, shape: ModelShape, prompt: int, lora: bool) -> float:
    """Return the hours of a training run: with LoRA, or with all weights and Adam on the host."""
    config = row.read_config()
    weights, length = num_weights(shape), int(config["max_completion_length"])
    prompt = min(prompt, int(config["max_prompt_length"]))
    update = 0.0 if lora else 28 * weights / HOST_BYTES_PER_SECOND + 4 * weights / PCIE_BYTES_PER_SECOND
    if row.command == "train":
        completions = [length] * config["num_generations"]
        # The improved completion is a completion more.
        flops = training_flops(shape, prompt, [*completions, length], lora=lora)
        flops += generation_flops(shape, prompt, [])
        decode = length * 2 * weights / (SHARE_OF_BANDWIDTH * BYTES_PER_SECOND)
        step = flops / (SHARE_OF_FLOPS * FLOPS) + decode + JUDGE_SECONDS + update
        return 1000 * int(config["num_interactions"]) * step / 3600
    flops = training_flops(shape, prompt, [length] * 2, lora=lora)
    prompts = NUM_PAIRS * int(config["num_train_epochs"])
    steps = prompts / int(config["per_device_train_batch_size"] * config["gradient_accumulation_steps"])
    return (prompts * flops / (SHARE_OF_FLOPS * FLOPS) + steps * update) / 3600


def evaluation_hours(shape: ModelShape, prompt: int) -> float:
    """Return the hours to reply to all test prompts with 128 tokens each, and to score the replies."""
    decode = 128 * 2 * num_weights(shape) / (SHARE_OF_BANDWIDTH * BYTES_PER_SECOND) / EVALUATION_BATCH
    scoring = 2 * REWARD_MODEL_WEIGHTS * (prompt + 128) / (SHARE_OF_FLOPS * FLOPS)
    prefill = generation_flops(shape, prompt, []) / (SHARE_OF_FLOPS * FLOPS)
    return NUM_TEST_PROMPTS * (decode + scoring + prefill) / 3600


def dollars(row: Row, hh_rlhf: str, folder: str) -> float | None:
    """Return the expected price of a run's rankings. `None` if the price of the ranker is not known."""
    config = row.read_config()
    names = {"num_generations", "num_interactions", "max_completion_length", "per_device_train_batch_size"}
    names |= {"use_dynamic_demonstrations", "use_static_demonstrations"}
    args = CycleAlignConfig(folder, use_cpu=True, **{name: value for name, value in config.items() if name in names})
    dataset = load_hh_rlhf(None, "test", hh_rlhf, dataset_type="prompt-only", conversational=row.conversational)
    prompts = sample_prompts(dataset, 1000)
    ranker = LLMRanker(config["ranker_model"], api_key="not used")
    estimate = estimate_run(args, ranker, assume_completions(args, prompts), len(prompts))
    ranker.close()
    return estimate.expected.cost


def describe(name: str, row: Row, prompt: int, hh_rlhf: str, folder: str) -> list[str]:
    """Return the cells of a row."""
    shape = SHAPES[row.backbone]
    weights = num_weights(shape)
    gigabytes = 1024**3
    frozen, evaluation = f"{2 * weights / gigabytes:.0f}", f"{evaluation_hours(shape, prompt):.1f}"
    if row.command is None:
        return [name, *["-"] * 5, evaluation, "-"]
    host, device = estimate_zero2_model_states_mem_needs(weights, cpu_offload=True, additional_buffer_factor=1.0)
    # DeepSpeed counts the weights on the device. Gradients wait there for their transfer, too.
    device += 2 * weights
    cost: float | None = dollars(row, hh_rlhf, folder) if row.command == "train" else 0.0
    return [
        name,
        f"{device / gigabytes:.0f}",
        f"{host / gigabytes:.0f}",
        f"{training_hours(row, shape, prompt, lora=False):.0f}",
        frozen,
        f"{training_hours(row, shape, prompt, lora=True):.0f}",
        evaluation,
        "unpriced" if cost is None else f"{cost:.2f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hh_rlhf", help="Folder with the test files of HH-RLHF.")
    args = parser.parse_args()
    texts = load_hh_rlhf(None, "test", args.hh_rlhf, dataset_type="prompt-only", conversational=False)["prompt"]
    prompt = round(fmean(len(text.encode()) for text in texts) / BYTES_PER_TOKEN)
    print(f"Mean prompt: {prompt} tokens.\n")
    header = ["row", "GPU GB", "host GB", "hours", "GPU GB, LoRA", "hours, LoRA", "hours of evaluation", "dollars"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    with TemporaryDirectory() as folder:
        for name, row in ROWS.items():
            if row.config is not None:
                print("| " + " | ".join(describe(name, row, prompt, args.hh_rlhf, folder)) + " |", flush=True)


if __name__ == "__main__":
    main()
