"""Measure how much of the ranker's latency overlaps with generation and training.

`CycleAlignTrainer` runs against an endpoint in another process that takes `--latency` seconds per ranking, with one
chunk of prompts per micro-batch. The script prints the time of each phase of a step and compares the step with two
references: a serial step, which waits for the ranking of each chunk, and a step that never waits for a ranking.

    python benchmarks/overlap.py --latency 1 --chunks 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from contextlib import closing
from multiprocessing.connection import Connection
from statistics import fmean

from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

TIMES = ("generate", "forward", "rank_wait", "backward")
REPLY = '{"ranking": ["B", "A", "C"], "improved_response": "Better."}'


def serve(latency: float, pipe: Connection) -> None:
    """Serve until the other end of the pipe sends a message or closes."""
    with LoopbackEndpoint(lambda _: Reply(REPLY, delay=latency)) as endpoint:
        pipe.send(endpoint.base_url)
        pipe.poll(None)


def main() -> None:
    """Run the benchmark and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, help="Seconds per ranking.")
    parser.add_argument("--chunks", type=int, default=4, help="Micro-batches per optimiser step.")
    parser.add_argument("--prompts_per_chunk", type=int, default=4, help="Prompts per micro-batch.")
    parser.add_argument("--steps", type=int, default=6, help="Optimiser steps, including one warm-up step.")
    parser.add_argument("--hidden_size", type=int, default=256, help="Width of the policy (random weights).")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    context.Process(target=serve, args=(args.latency, child), daemon=True).start()
    base_url = parent.recv()

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker
    from cyclealign_trl.demo.corpus import questions, vocabulary
    from cyclealign_trl.demo.policy import build_tokenizer

    tokenizer = build_tokenizer(vocabulary())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=512,
        )
    )
    window = args.chunks * args.prompts_per_chunk
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in questions("train")]
    with tempfile.TemporaryDirectory() as folder, closing(LLMRanker("judge", base_url)) as ranker:
        trainer = CycleAlignTrainer(
            model,
            ranker,
            CycleAlignConfig(
                folder,
                per_device_train_batch_size=args.prompts_per_chunk,
                gradient_accumulation_steps=args.chunks,
                max_prompt_length=64,
                max_completion_length=64,
                max_steps=args.steps,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(prompts * (window // len(prompts) + 1)),
            processing_class=tokenizer,
        )
        trainer.train()
    parent.send(None)

    logs = trainer.state.log_history[1:-1]
    seconds = {name: fmean(log[f"time/{name}"] for log in logs) for name in TIMES}
    step = sum(seconds.values())
    work = step - seconds["rank_wait"]
    serial = work + args.chunks * args.latency
    print(f"\n{args.chunks} chunks of {args.prompts_per_chunk} prompts, {args.latency:g} s per ranking:")
    for name, value in seconds.items():
        print(f"  {name:<10} {value:6.2f} s")
    print(f"  {'step':<10} {step:6.2f} s")
    print(f"  {'serial':<10} {serial:6.2f} s   step / serial = {step / serial:.2f}")
    print(f"  {'no waiting':<10} {work:6.2f} s   step / no waiting = {step / work:.2f}")


if __name__ == "__main__":
    main()
