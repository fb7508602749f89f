"""Repeat one row of the tables in the CycleAlign paper: prepare the data, train, and evaluate.

    python examples/paper/run.py cyclealign_pro_alpaca
    python examples/paper/run.py cyclealign_pro_alpaca --use_peft true --learning_rate 2e-4   # LoRA

Arguments that are not listed below are those of `cyclealign train` or `cyclealign train-ranked`, and replace values of
the row's configuration. A command that was interrupted continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rows import CONFIGS, RECORD, REWARD_MODEL, ROWS, Row

from cyclealign_trl import load_hh_rlhf, sample_prompts
from cyclealign_trl._files import atomic_write
from cyclealign_trl.training import checkpoints
from cyclealign_trl.training.run_file import without_secrets

# The paper's hardware: one A100 with 40 GB, ZeRO-2. Adam's state needs the memory of the host.
ZERO2_OFFLOAD = Path(__file__).parents[1] / "deepspeed" / "zero2_offload.json"


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of this script's own arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("row", choices=[name for name, row in ROWS.items() if row.config is not None], metavar="ROW")
    parser.add_argument("--results", type=Path, default=Path("outputs/paper"), help="Folder of all rows.")
    parser.add_argument("--model_name_or_path", help="Model to use instead of the row's.")
    parser.add_argument("--hh_rlhf", help="Folder with the files of HH-RLHF. Defaults to the Hub.")
    parser.add_argument("--train_split", default="train", help="Split of HH-RLHF to train on.")
    parser.add_argument(
        "--num_prompts", type=int, default=1000, help="Prompts of CycleAlign; the paper uses about 1000."
    )
    parser.add_argument("--reward_model", default=REWARD_MODEL, help="Reward model of the evaluation.")
    parser.add_argument("--max_samples", type=int, help="Test prompts per subset. All by default.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prepare, train and evaluate."""
    parser = make_parser()
    args, training_argv = parser.parse_known_args(argv)
    row, folder = ROWS[args.row], args.results / args.row
    model = args.model_name_or_path or row.model
    if row.command is None and training_argv:
        parser.error(f"{args.row} is not trained, so it takes no argument {training_argv[0]}.")
    started: dict[str, Any] = {"model": model, "arguments": without_secrets(named(training_argv))}
    if row.command is not None:
        started |= {"train_split": args.train_split}
    if row.command == "train":
        started |= {"num_prompts": args.num_prompts}
    record = read_record(folder) or started | {"trained": False}
    if changed := [name for name, value in started.items() if record.get(name) != value]:
        was, now = ({name: values.get(name) for name in changed} for values in (record, started))
        parser.error(f"{folder} was started with {was}, and not with {now}. Choose another folder with --results.")
    if row.command is not None:
        if not record["trained"]:
            write_record(folder, record)
            train(row, prepare_data(row, args), folder / "model", model, training_argv)
        model = str(folder / "model")
    write_record(folder, record | {"trained": True})
    evaluate(row, f"{args.row}={model}", folder / "evaluation", args)


def prepare_data(row: Row, args: argparse.Namespace) -> Path:
    """Write the prompts of CycleAlign, or the ranked pairs of an offline method, unless they are there."""
    prompts_only = row.command == "train"
    kind = f"prompts-{args.num_prompts}" if prompts_only else "ranked"
    dialogues = "messages" if row.conversational else "text"
    path: Path = args.results / "data" / f"{kind}-{args.train_split}-{dialogues}.jsonl"
    if path.exists():
        return path
    # `keep_paragraphs=False` reads dialogues as the loader of Open-Assistant does, which the paper names.
    dataset: Dataset = load_hh_rlhf(
        None,
        args.train_split,
        args.hh_rlhf,
        dataset_type="prompt-only" if prompts_only else "ranked",
        conversational=row.conversational,
        keep_paragraphs=False,
    )
    if prompts_only:
        dataset = sample_prompts(dataset, args.num_prompts)
    with atomic_write(path) as temporary:
        dataset.to_json(temporary)
    return path


def train(row: Row, data: Path, output_dir: Path, model: str, training_argv: Sequence[str]) -> None:
    """Train the row's model, from its last checkpoint if there is one."""
    assert row.command is not None
    arguments: dict[str, Any] = {"model_name_or_path": model, "dataset_name": data, "output_dir": output_dir}
    if any(checkpoints.is_complete(folder) for folder in output_dir.glob("checkpoint-*")):
        arguments["resume_from_checkpoint"] = "true"
    if torch.cuda.is_available():
        arguments["dtype"] = "bfloat16"  # ZeRO keeps a copy in float32, and LoRA its adapters
        if "use_peft" not in named(training_argv):
            arguments |= {"num_processes": 1, "use_deepspeed": "", "deepspeed": ZERO2_OFFLOAD}
    argv = [text for name, value in (row.overrides | arguments).items() for text in (f"--{name}", str(value)) if text]
    run_command(row.command, "--config", str(CONFIGS / f"{row.config}.yaml"), *argv, *training_argv)


def evaluate(row: Row, model: str, output_dir: Path, args: argparse.Namespace) -> None:
    """Score the model's replies to the test prompts of the four subsets, as the paper does."""
    # The models of the tables read plain dialogues. So does a model with a chat template that takes their place.
    argv = ["--prompt_format", "chat" if row.conversational else "text", "--output_dir", str(output_dir)]
    argv += ["--reward_model", args.reward_model, "--reward_model_kwargs", '{"max_length": 1024}']
    if torch.cuda.is_available():
        argv += ["--dtype", "bfloat16"]
    if args.hh_rlhf is not None:
        argv += ["--dataset_name", str(args.hh_rlhf)]
    if args.max_samples is not None:
        argv += ["--max_samples", str(args.max_samples)]
    run_command("evaluate", model, *argv)


def named(argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of arguments by name. JSON objects are read."""
    values: dict[str, Any] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
        else:
            value = f"{values.get(name, '')} {token}".strip()
        values[name] = value
    return {name: json.loads(value) if value.startswith("{") else value for name, value in values.items()}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what a row was started with, or `None` if it was not."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what a row was started with, and whether its training is finished."""
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_command(*command: str) -> None:
    """Run a command of `cyclealign` in a process of its own, so that it leaves no memory occupied on the GPU."""
    process = subprocess.Popen([sys.executable, "-m", "cyclealign_trl", *command])  # noqa: S603
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the command receives, too
        status = process.wait()
    if status:
        sys.exit(status)  # the command has printed its error


if __name__ == "__main__":
    main(sys.argv[1:])
