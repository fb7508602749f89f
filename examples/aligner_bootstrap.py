"""Align a policy with the corrections of an aligner, in several rounds (arXiv 2402.02416, "multi-round").

In each round, the policy answers prompts, the aligner corrects the answers, and the policy is trained to prefer the
corrections. Train the aligner first: cyclealign init aligner; cyclealign aligner --config aligner.yaml

accelerate launch examples/aligner_bootstrap.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --aligner outputs/aligner \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --num_prompts 1000 \
    --output_dir outputs/bootstrapped

Add `--scorer my_module.my_reward`, a TRL reward function, to print the mean score of the answers of each round.
"""

import copy
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import Aligner, ModelUpstream, RankingConfig, RankingTrainer, bootstrap_preferences
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


@dataclass
class BootstrapArguments:
    """Settings of the aligner and of the rounds."""

    aligner: str = field(metadata={"help": "Name or path of the aligner."})
    num_rounds: int = field(default=3, metadata={"help": "Number of rounds."})
    num_prompts: int = field(default=1000, metadata={"help": "Number of prompts per round."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of an answer or a correction. Defaults to the limit of Aligner."},
    )
    scorer: str | None = field(
        default=None, metadata={"help": "Dotted path of a TRL reward function that scores the answers."}
    )


def mean_score(scorer: str, prompts: list[Any], answers: list[str]) -> float:
    """Return the mean reward of the answers."""
    module, _, name = scorer.rpartition(".")
    completions = [
        answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return fmean(getattr(importlib.import_module(module), name)(prompts=prompts, completions=completions))


def main() -> None:
    """Parse the arguments, run the rounds and save the policy of each round."""
    parser = TrlParser((ScriptArguments, BootstrapArguments, RankingConfig, ModelConfig, DatasetMixtureConfig))
    script_args, bootstrap_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    dataset, _ = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    device = "cpu" if training_args.use_cpu else None
    max_new_tokens = bootstrap_args.max_new_tokens
    aligner = Aligner.from_pretrained(bootstrap_args.aligner, device=device, max_new_tokens=max_new_tokens)

    policy = model_args.model_name_or_path
    for number in range(bootstrap_args.num_rounds + 1):
        rows = dataset.shuffle(seed=training_args.seed + number)
        prompts = list(rows["prompt"][: bootstrap_args.num_prompts])
        # Every process samples the same answers, because all use the same seed, and so has the same pairs.
        loading = {"device": device, "model_init_kwargs": training_args.model_init_kwargs}
        upstream = ModelUpstream(policy, max_new_tokens=max_new_tokens, seed=training_args.seed, **loading)
        answers = upstream(prompts)
        del upstream
        if bootstrap_args.scorer is not None:
            print(f"Score after {number} rounds: {mean_score(bootstrap_args.scorer, prompts, answers):.3f}")
        if number == bootstrap_args.num_rounds:
            break
        pairs = bootstrap_preferences(lambda _, given=answers: given, aligner, prompts)
        print(f"Round {number + 1}: {pairs.info.description}")
        if not len(pairs):
            break  # no answer was corrected
        args = copy.copy(training_args)
        args.output_dir = str(Path(training_args.output_dir, f"round-{number + 1}"))
        trainer = RankingTrainer(policy, args, train_dataset=pairs, peft_config=get_peft_config(model_args))
        trainer.train()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        policy = args.output_dir


if __name__ == "__main__":
    main()
