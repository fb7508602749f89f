"""Repeat one row of the tables in the CycleAlign paper: prepare the data, train, and evaluate.

    python examples/paper/run.py cyclealign_pro_alpaca
    python examples/paper/run.py cyclealign_pro_alpaca --use_peft true --learning_rate 2e-4   # LoRA

Arguments that are not listed below are those of `cyclealign train` or `cyclealign train-ranked`, and replace values of
the row's configuration. A command that was interrupted continues where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rows import CONFIGS, ROWS, Row

from cyclealign_trl import load_hh_rlhf, sample_prompts

REWARD_MODEL = "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"  # the paper's
ZERO2_OFFLOAD = Path(__file__).parents[1] / "deepspeed" / "zero2_offload.json"


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of this script, and those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("row", choices=[name for name, row in ROWS.items() if row.config is not None], metavar="ROW")
    parser.add_argument("--results", type=Path, default=Path("outputs/paper"), help="Folder of all rows.")
    parser.add_argument("--hh_rlhf", default=None, help="Folder with the files of HH-RLHF. Defaults to the Hub.")
    parser.add_argument("--train_split", default="train", help="Split of HH-RLHF to train on.")
    parser.add_argument("--num_prompts", type=int, default=1000, help="Prompts of a cycle; the paper uses about 1000.")
    parser.add_argument("--reward_model", default=REWARD_MODEL, help="Reward model of the evaluation.")
    parser.add_argument(
        "--evaluation_samples", type=int, default=None, help="Test prompts per subset. All by default."
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> None:
    """Prepare, train and evaluate."""
    args, training_argv = parse_args(argv)
    row, folder = ROWS[args.row], args.results / args.row
    model = row.model
    if "--model_name_or_path" in training_argv:
        model = training_argv[training_argv.index("--model_name_or_path") + 1]
    if row.command is not None:
        model = str(folder / "model")
        if not _is_trained(Path(model)):
            data = prepare_data(row, args)
            train(row, data, Path(model), training_argv)
    evaluate(model, folder / "evaluation", args)


def prepare_data(row: Row, args: argparse.Namespace) -> Path:
    """Write the prompts of a cycle, or the ranked pairs of an offline method, unless they are there."""
    kind = "prompts" if row.command == "train" else "ranked"
    path: Path = args.results / "data" / f"{kind}-{'messages' if row.conversational else 'text'}.jsonl"
    if path.exists():
        return path
    # `keep_paragraphs=False` reads dialogues as the loader of Open-Assistant does, which the paper names.
    dataset: Dataset = load_hh_rlhf(
        None,
        args.train_split,
        args.hh_rlhf,
        dataset_type="prompt-only" if kind == "prompts" else "ranked",
        conversational=row.conversational,
        keep_paragraphs=False,
    )
    if kind == "prompts":
        dataset = sample_prompts(dataset, args.num_prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    dataset.to_json(unfinished)
    unfinished.rename(path)
    return path


def train(row: Row, data: Path, output_dir: Path, training_argv: Sequence[str]) -> None:
    """Train the row's model, from its last checkpoint if there is one."""
    assert row.command is not None
    arguments: dict[str, Any] = {"dataset_name": data, "output_dir": output_dir, **row.overrides}
    if any(output_dir.glob("checkpoint-*")):
        arguments["resume_from_checkpoint"] = "true"
    argv = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    if torch.cuda.is_available() and "--use_peft" not in training_argv:
        # The paper's hardware: one A100 with 40 GB, ZeRO-2. Adam's state needs the memory of the host.
        argv += ["--num_processes", "1", "--use_deepspeed", "--deepspeed_config_file", str(ZERO2_OFFLOAD)]
    _run(row.command, "--config", str(CONFIGS / f"{row.config}.yaml"), *argv, *training_argv)


def evaluate(model: str, output_dir: Path, args: argparse.Namespace) -> None:
    """Score the model's replies to the test prompts of the four subsets."""
    argv = ["--reward_model", args.reward_model, "--output_dir", str(output_dir)]
    if args.hh_rlhf is not None:
        argv += ["--dataset_name", str(args.hh_rlhf)]
    if args.evaluation_samples is not None:
        argv += ["--max_samples", str(args.evaluation_samples)]
    _run("evaluate", model, *argv)


def _is_trained(model: Path) -> bool:
    return (model / "config.json").exists() or (model / "adapter_config.json").exists()


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "cyclealign_trl", *command])  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)  # the command has printed its error


if __name__ == "__main__":
    main(sys.argv[1:])
