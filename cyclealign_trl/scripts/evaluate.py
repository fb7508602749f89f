"""`cyclealign evaluate`: measure models by the rewards of their replies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.hh_rlhf import HUB_ID
from ..evaluation.evaluate_models import evaluate_models
from ..evaluation.prompts import load_prompts
from ..evaluation.reward_report import RewardReport
from ..evaluation.sources import ReplySettings
from .arguments import CommandParser
from .inputs import parse_json_object
from .one_line_errors import one_line_errors


@dataclass
class PromptArguments:
    """Prompts to evaluate on."""

    dataset_name: str = field(
        default=HUB_ID,
        metadata={
            "help": "Dataset with prompts: a name on the Hub, a folder, or a JSON, Parquet or CSV file. HH-RLHF can "
            "be a folder with its files."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset. For HH-RLHF, the subset; all four by default."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the dataset."})
    group_column: str = field(
        default="subset", metadata={"help": "Column whose values divide the prompts into groups."}
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Number of prompts per group, drawn at random with the seed. Defaults to all prompts."},
    )


@dataclass
class GenerationArguments:
    """How models reply: greedily, and cut off where they go on with the next turns."""

    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of a reply, in tokens."})
    max_prompt_length: int | None = field(
        default=384,
        metadata={"help": "Maximum length of a prompt, in tokens. A longer prompt loses its beginning."},
    )
    prompt_format: str = field(
        default="auto",
        metadata={
            "help": "How a model sees a conversation: by its chat template (chat), as HH-RLHF writes dialogues "
            "(text), or by its chat template if it has one (auto)."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Number of prompts that a model answers at once."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model weights."})
    device: str | None = field(
        default=None, metadata={"help": "Device of the models. Defaults to the accelerator, if there is one."}
    )
    endpoint_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for EndpointUpstream, as JSON: max_concurrency, prices, max_cost, sampling, ..."
        },
    )

    def to_settings(self) -> ReplySettings:
        """Return the settings of the replies.

        Raises:
            ValueError: If an argument is out of range, or `endpoint_kwargs` contain an API key.
        """
        return ReplySettings(
            max_new_tokens=self.max_new_tokens,
            max_prompt_length=self.max_prompt_length,
            prompt_format=self.prompt_format,  # type: ignore[arg-type]  # checked by ReplySettings
            batch_size=self.batch_size,
            device=self.device,
            model_init_kwargs={"dtype": self.dtype},
            endpoint_kwargs=parse_json_object("endpoint_kwargs", self.endpoint_kwargs),
        )


@dataclass
class EvaluateArguments:
    """Models and the reward model."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Models to evaluate: a model or a PEFT adapter (folder or name on the Hub), endpoint:MODEL@URL, "
            "ALIGNER+MODEL, or replies (a file, or dataset:NAME, with columns prompt and completion). LABEL=MODEL "
            "names one in the tables."
        },
    )
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Reward model: a sequence classifier with one output, such as the paper's "
            "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1."
        },
    )
    reward_model_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for RewardScorer, as JSON: max_length, batch_size, chat_template, ..."},
    )
    transform: str = field(
        default="sigmoid",
        metadata={"help": "Report 100 times the sigmoid of the rewards (sigmoid), or the rewards themselves (none)."},
    )
    output_dir: str = field(
        default="outputs/evaluation", metadata={"help": "Folder for the report, the replies and their scores."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampled prompts and confidence intervals."})


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (EvaluateArguments, PromptArguments, GenerationArguments),
        prog="cyclealign evaluate",
        description="Evaluate models by the rewards of their greedy replies to the test prompts of HH-RLHF, or to "
        "other prompts.",
        positional="models",
    )


def main(argv: Sequence[str]) -> None:
    """Collect replies and scores, print the tables and write the report."""
    parser = make_parser()
    with one_line_errors(parser.prog):
        own_argv, accelerate_argv = parser.split(argv)
        if accelerate_argv:
            parser.error(f"unknown argument {accelerate_argv[0]}.")
        args, prompt_args, generation_args = parser.parse(own_argv)
        if not args.models:
            parser.error("no model to evaluate. Name at least one, before the other arguments.")
        if args.reward_model is None:
            parser.error("no reward model. Set --reward_model.")
        try:
            report = _evaluate(args, prompt_args, generation_args)
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted. Run the same command again to continue.")
            sys.exit(130)
        written = report.save(args.output_dir)
    print(report.to_markdown())
    print(f"\nWritten to {args.output_dir}: {', '.join(written)}.")


def _evaluate(
    args: EvaluateArguments, prompt_args: PromptArguments, generation_args: GenerationArguments
) -> RewardReport:
    settings = generation_args.to_settings()
    reward_model_kwargs = {
        "device": generation_args.device,
        "model_init_kwargs": {"dtype": generation_args.dtype},
        **parse_json_object("reward_model_kwargs", args.reward_model_kwargs),
    }
    prompts = load_prompts(
        prompt_args.dataset_name,
        prompt_args.dataset_config,
        prompt_args.dataset_split,
        group_column=prompt_args.group_column,
        max_samples=prompt_args.max_samples,
        seed=args.seed,
    )
    return evaluate_models(
        args.models,
        str(args.reward_model),
        prompts,
        output_dir=args.output_dir,
        settings=settings,
        reward_model_kwargs=reward_model_kwargs,
        transform=args.transform,
        seed=args.seed,
    )
