"""Compare one and several passes of a judge with position bias and noise.

    python benchmarks/judge_passes.py --num 400 --bias 0.15 --noise 0.15

Each request has four completions of a question of the demo, with different scores (0 to 1). The judge, behind an
endpoint on the loopback interface, adds noise to the score of a completion and subtracts the bias once for each
position further down. For each number of passes, the script prints the pairwise accuracy against the true scores (a
tie counts one half) and its standard error, the consistency, and the accuracy of the less consistent and of the more
consistent half of the rankings.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import combinations, islice
from statistics import fmean, stdev
from typing import Any

from cyclealign_trl import LLMRanker, RankingRequest, RankingResult
from cyclealign_trl.demo.corpus import dialogues, score
from cyclealign_trl.demo.demo_judge import read_query
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

PASSES = (1, 2, 3, 5)
NUM_COMPLETIONS = 4


def make_judge(bias: float, noise: float) -> Callable[[dict[str, Any]], Reply]:
    """Return a judge whose reply depends only on the request."""

    def respond(body: dict[str, Any]) -> Reply:
        question, completions, _ = read_query(body["messages"][-1]["content"])
        rng = random.Random(json.dumps([body["seed"], body["messages"]]))
        scores = {
            label: score(question, text) - bias * position + rng.gauss(0, noise)
            for position, (label, text) in enumerate(completions.items())
        }
        return Reply(json.dumps({"ranking": sorted(scores, key=lambda label: -scores[label])}))

    return respond


def make_requests(seed: int) -> Iterator[RankingRequest]:
    """Yield an endless stream of requests whose completions have different scores."""
    by_score: dict[str, dict[float, str]] = {}
    while True:
        for dialogue in dialogues(1000, seed):
            completions = by_score.setdefault(dialogue.question, {})
            completions[score(dialogue.question, dialogue.completion)] = dialogue.completion
            if len(completions) == NUM_COMPLETIONS:
                yield RankingRequest(dialogue.question, tuple(by_score.pop(dialogue.question).values()))
        seed += 1


def accuracy(request: RankingRequest, result: RankingResult) -> float:
    """Return the share of pairs that are ranked by score; a tie counts one half."""
    scores = [score(str(request.prompt), text) for text in request.completions]
    ranks = result.resolved_ranks
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    return fmean((ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) / 2 for i, j in pairs)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=400, help="Number of rankings.")
    parser.add_argument("--bias", type=float, default=0.15, help="Score subtracted per position.")
    parser.add_argument("--noise", type=float, default=0.15, help="Standard deviation of the noise.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the completions.")
    args = parser.parse_args()
    requests = list(islice(make_requests(args.seed), args.num))
    print("passes  accuracy  error  consistency  less consistent half  more consistent half")
    with LoopbackEndpoint(make_judge(args.bias, args.noise)) as endpoint:
        for num_passes in PASSES:
            with closing(LLMRanker("biased", endpoint.base_url, num_passes=num_passes, improve=False)) as ranker:
                results = [outcome for outcome in ranker.rank(requests) if isinstance(outcome, RankingResult)]
            accuracies = [accuracy(request, result) for request, result in zip(requests, results, strict=True)]
            line = f"{num_passes:6d}  {fmean(accuracies):8.3f}  {stdev(accuracies) / len(accuracies) ** 0.5:5.3f}"
            if num_passes > 1:
                consistencies = [result.consistency or 0.0 for result in results]
                indices = sorted(range(len(results)), key=consistencies.__getitem__)
                by_consistency = [accuracies[index] for index in indices]
                half = len(results) // 2
                line += f"  {fmean(consistencies):11.3f}  {fmean(by_consistency[:half]):20.3f}"
                line += f"  {fmean(by_consistency[half:]):20.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
