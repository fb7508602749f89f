# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""Align a policy with an aligner's corrections in rounds: it answers, the aligner corrects, it learns to prefer the
corrections, and so on (arXiv 2402.02416, "multi-round").

    accelerate launch examples/aligner_bootstrap.py \
        --model_name_or_path Qwen/Qwen3-0.6B --aligner outputs/aligner \
        --dataset_name trl-lib/ultrafeedback-prompt --num_prompts 1000 --output_dir outputs/bootstrapped

`--scorer my_module.my_reward` says how good the policy's answers are in each round: any TRL reward function.
"""

import copy
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import Aligner, ModelUpstream, RankingConfig, RankingTrainer, bootstrap_preferences


@dataclass
class BootstrapArguments:
    """Who corrects, and what."""

    aligner: str = field(metadata={"help": "The aligner: a folder or a name on the Hub."})
    num_rounds: int = field(default=3, metadata={"help": "Rounds of answers, corrections, training."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts answered in each round."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer and correction."})
    scorer: str | None = field(default=None, metadata={"help": "Dotted path of a TRL reward function."})


def mean_score(scorer: str, prompts: list[Any], answers: list[str]) -> float:
    """The mean reward of answers."""
    module, _, name = scorer.rpartition(".")
    completions = [
        answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return fmean(getattr(importlib.import_module(module), name)(prompts=prompts, completions=completions))


def main() -> None:
    """Reads the arguments, goes through the rounds, saves the policy of each."""
    parser = TrlParser((ScriptArguments, BootstrapArguments, RankingConfig, ModelConfig))
    script_args, bootstrap_args, training_args, model_args = parser.parse_args_and_config()
    dataset = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    device = "cpu" if training_args.use_cpu else None
    room = bootstrap_args.max_new_tokens
    aligner = Aligner.from_pretrained(bootstrap_args.aligner, device=device, max_new_tokens=room)

    policy = model_args.model_name_or_path
    for number in range(bootstrap_args.num_rounds + 1):
        rows = dataset.shuffle(seed=training_args.seed + number)
        prompts = list(rows["prompt"][: bootstrap_args.num_prompts])
        # Every process answers all prompts alike, from one seed, and so trains on the same pairs.
        upstream = ModelUpstream(policy, max_new_tokens=room, seed=training_args.seed, device=device)
        answers = upstream(prompts)
        del upstream
        if bootstrap_args.scorer is not None:
            print(f"Score after {number} rounds: {mean_score(bootstrap_args.scorer, prompts, answers):.3f}")
        if number == bootstrap_args.num_rounds:
            break
        pairs = bootstrap_preferences(lambda _, given=answers: given, aligner, prompts)
        print(f"Round {number + 1}: {pairs.info.description}")
        if not len(pairs):
            break  # nothing is left to correct
        args = copy.copy(training_args)
        args.output_dir = str(Path(training_args.output_dir, f"round-{number + 1}"))
        trainer = RankingTrainer(policy, args, train_dataset=pairs, peft_config=get_peft_config(model_args))
        trainer.train()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        policy = args.output_dir


if __name__ == "__main__":
    main()
