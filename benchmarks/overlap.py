"""Measure how much of the ranker's latency overlaps with generation and training, on-policy and with look-ahead.

`CycleAlignTrainer` runs against an endpoint in another process that takes `--latency` seconds per ranking. The step is
compared with its limit: on-policy, a step that never waits for a ranking; with `ranking_lookahead=1`, the slower of
policy and ranker. The column "serial" is a step that waits for the ranking of each chunk.

    python benchmarks/overlap.py --latency 1 --chunks 4
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from contextlib import closing
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

TIMES = ("generate", "forward", "rank_wait", "backward")
REPLY = '{"ranking": ["B", "A", "C"], "improved_response": "Better."}'


def serve(latency: float, pipe: Connection) -> None:
    """Serve until the other end of the pipe sends a message or closes."""
    with LoopbackEndpoint(lambda _: Reply(REPLY, delay=latency)) as endpoint:
        pipe.send(endpoint.base_url)
        pipe.poll(None)


def measure(args: argparse.Namespace, base_url: str, lookahead: int) -> dict[str, float]:
    """Return the median seconds of each phase and of a whole step, without the first and the last step."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker
    from cyclealign_trl.demo.corpus import questions, vocabulary
    from cyclealign_trl.demo.policy import build_tokenizer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(0)
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
    clock = Clock()
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in questions("train")]
    needed = args.chunks * args.prompts_per_chunk * args.steps  # one epoch, whose first step cannot be ahead
    with tempfile.TemporaryDirectory() as folder, closing(LLMRanker("judge", base_url)) as ranker:
        trainer = CycleAlignTrainer(
            model,
            ranker,
            CycleAlignConfig(
                folder,
                num_interactions=1,
                per_device_train_batch_size=args.prompts_per_chunk,
                gradient_accumulation_steps=args.chunks,
                max_prompt_length=64,
                max_completion_length=64,
                max_steps=args.steps,
                ranking_lookahead=lookahead,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list((prompts * (needed // len(prompts) + 1))[:needed]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    logs = trainer.state.log_history[1:-2]
    seconds = {name: median(log[f"time/{name}"] for log in logs) for name in TIMES}
    ends = clock.ends[:-1]
    return {**seconds, "step": median(end - start for start, end in itertools.pairwise(ends))}


def main() -> None:
    """Run the benchmark and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, help="Seconds per ranking.")
    parser.add_argument("--chunks", type=int, default=4, help="Micro-batches per optimiser step.")
    parser.add_argument("--prompts_per_chunk", type=int, default=4, help="Prompts per micro-batch.")
    parser.add_argument("--steps", type=int, default=7, help="Optimiser steps. The first and the last do not count.")
    parser.add_argument("--hidden_size", type=int, default=256, help="Width of the policy (random weights).")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    context.Process(target=serve, args=(args.latency, child), daemon=True).start()
    base_url = parent.recv()
    runs = {name: measure(args, base_url, lookahead) for name, lookahead in (("on-policy", 0), ("look-ahead", 1))}
    parent.send(None)

    print(f"\n{args.chunks} x {args.prompts_per_chunk} prompts, {args.latency:g} s per ranking. Seconds per step:")
    print(f"| {'':<10} | {' | '.join(f'{name:>9}' for name in (*TIMES, 'step', 'serial', 'limit'))} | step / limit |")
    print(f"| --- {'| ---: ' * (len(TIMES) + 4)}|")
    for name, seconds in runs.items():
        work = seconds["step"] - seconds["rank_wait"]
        limit = max(work, args.latency) if name == "look-ahead" else work
        values = [*seconds.values(), work + args.chunks * args.latency, limit]
        print(f"| {name:<10} | {' | '.join(f'{value:9.2f}' for value in values)} | {seconds['step'] / limit:12.2f} |")


if __name__ == "__main__":
    main()
