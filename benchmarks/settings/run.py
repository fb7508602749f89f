"""Run the cycle on the chat model of `cyclealign demo --model smollm2` with different settings.

    python -m benchmarks.settings.run OUTPUT_DIR

Each configuration takes the same questions, the same judge and the same number of steps. It becomes a JSON file in
`--results`, from which `benchmarks.settings.page` writes docs/settings.md. A configuration that has one is not run
again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks.speed.report import versions
from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker
from cyclealign_trl._files import atomic_write
from cyclealign_trl.demo.demo_judge import DemoJudge
from cyclealign_trl.demo.held_out import sample_held_out
from cyclealign_trl.demo.learning_curves import curves_by_step
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from cyclealign_trl.demo.tasks import SMOLLM2, make_task

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Configuration:
    """What differs from run to run.

    Args:
        learning_rate: Learning rate, constant.
        sft_weight: Weight of the SFT loss, times (K-1)^2.
        lora: Whether to train a LoRA adapter of rank 8 instead of all weights.
        random_judge: Whether the judge ranks at random and improves nothing, as a control.
        temperature: Temperature of the policy's samples, in training and on held-out questions.
        top_p: Nucleus of the policy's samples.
    """

    learning_rate: float
    sft_weight: float = 0.05
    lora: bool = True
    random_judge: bool = False
    temperature: float = 0.7
    top_p: float = 0.95


CONFIGURATIONS: dict[str, Configuration] = {
    "lora_2e-4": Configuration(2e-4),
    "lora_2e-4_random_judge": Configuration(2e-4, random_judge=True),
    "full_2e-5": Configuration(2e-5, lora=False),
    "full_2e-5_random_judge": Configuration(2e-5, lora=False, random_judge=True),
    "lora_5e-5": Configuration(5e-5),
    "lora_5e-4": Configuration(5e-4),
    "full_5e-6": Configuration(5e-6, lora=False),
    "full_5e-5": Configuration(5e-5, lora=False),
    "lora_2e-4_no_sft": Configuration(2e-4, sft_weight=0.0),
    "lora_2e-4_sft_1": Configuration(2e-4, sft_weight=1.0),
    "lora_2e-4_temperature_1": Configuration(2e-4, temperature=1.0, top_p=1.0),
}
"""Configurations by name, the most important first."""


def run(configuration: Configuration, output_dir: Path, seed: int = 0) -> dict[str, Any]:
    """Train with a configuration, and return the scores by step, and those on held-out questions before and after."""
    task = make_task(SMOLLM2)
    settings: Mapping[str, Any] = {
        **task.settings,
        "learning_rate": configuration.learning_rate,
        "temperature": configuration.temperature,
        "top_p": configuration.top_p,
    }
    task = replace(task, settings=settings)
    model, tokenizer = task.load_policy(seed)
    judge = DemoJudge(task.score, task.improve, control=configuration.random_judge, seed=seed)
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in task.train_questions]
    started = time.perf_counter()
    with LoopbackEndpoint(judge.respond) as endpoint, closing(LLMRanker("judge", endpoint.base_url)) as ranker:
        trainer = CycleAlignTrainer(
            model,
            ranker,
            CycleAlignConfig(
                str(output_dir),
                seed=seed,
                num_generations=4,
                sft_weight=configuration.sft_weight,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **settings,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            if configuration.lora
            else None,
        )
        before = sample_held_out(trainer.model, tokenizer, task, seed)
        trainer.train()
    after = sample_held_out(trainer.model, tokenizer, task, seed)
    scores, _ = curves_by_step(trainer.interaction_log.read().to_pylist(), task.score)
    return {
        "settings": asdict(configuration),
        "seed": seed,
        "scores_by_step": list(scores.values()),
        "held_out_before": before.scores,
        "held_out_after": after.scores,
        "samples_after": [[question, texts[0]] for question, texts in after.completions[:4]],
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the configurations that have no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="Folder of the runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the results. Default: %(default)s.")
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME", help="Default: all."
    )
    args = parser.parse_args(argv)
    for name in args.only:
        path: Path = args.results / f"{name}.json"
        if path.exists():
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        result = run(CONFIGURATIONS[name], args.output_dir / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
