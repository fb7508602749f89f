"""What several passes are worth with a judge who likes what stands first, and is never quite sure.

    python benchmarks/judge_passes.py --num 400 --bias 0.15 --noise 0.15

Each ranking is of four replies to a question of the demo, of different merit. The judge, behind an endpoint on
loopback, adds noise to a reply's score (0 to 1), and takes a bit off it for every place further down. Side by side in
one run: the pairwise accuracy against the scores themselves (a tie is half right) and its standard error, the
consistency, and the accuracy of the less and of the more consistent half.
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
    """The judge: what it replies depends on the request alone."""

    def respond(body: dict[str, Any]) -> Reply:
        question, completions, _ = read_query(body["messages"][-1]["content"])
        rng = random.Random(json.dumps([body["seed"], body["messages"]]))
        scores = {
            label: score(question, text) - bias * place + rng.gauss(0, noise)
            for place, (label, text) in enumerate(completions.items())
        }
        return Reply(json.dumps({"ranking": sorted(scores, key=lambda label: -scores[label])}))

    return respond


def make_requests(seed: int) -> Iterator[RankingRequest]:
    """Questions with replies of different merit, without end."""
    found: dict[str, dict[float, str]] = {}
    while True:
        for dialogue in dialogues(1000, seed):
            replies = found.setdefault(dialogue.question, {})
            replies[score(dialogue.question, dialogue.reply)] = dialogue.reply
            if len(replies) == NUM_COMPLETIONS:
                yield RankingRequest(dialogue.question, tuple(found.pop(dialogue.question).values()))
        seed += 1


def accuracy(request: RankingRequest, result: RankingResult) -> float:
    """Share of the pairs that are ranked by merit."""
    merits = [score(str(request.prompt), text) for text in request.completions]
    ranks = result.resolved_ranks
    pairs = [(i, j) if merits[i] > merits[j] else (j, i) for i, j in combinations(range(len(merits)), 2)]
    return fmean((ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) / 2 for i, j in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare rankings of one and of several passes.")
    parser.add_argument("--num", type=int, default=400, help="rankings (default: %(default)s)")
    parser.add_argument("--bias", type=float, default=0.15, help="score per place (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.15, help="standard deviation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the replies (default: %(default)s)")
    arguments = parser.parse_args()
    requests = list(islice(make_requests(arguments.seed), arguments.num))
    print("passes  accuracy  error  consistency  less consistent half  more consistent half")
    with LoopbackEndpoint(make_judge(arguments.bias, arguments.noise)) as endpoint:
        for num_passes in PASSES:
            with closing(LLMRanker("biased", endpoint.base_url, num_passes=num_passes, improve=False)) as ranker:
                results = [outcome for outcome in ranker.rank(requests) if isinstance(outcome, RankingResult)]
            right = [accuracy(request, result) for request, result in zip(requests, results, strict=True)]
            line = f"{num_passes:6d}  {fmean(right):8.3f}  {stdev(right) / len(right) ** 0.5:5.3f}"
            if num_passes > 1:
                consistencies = [result.consistency or 0.0 for result in results]
                by_consistency = [right[i] for i in sorted(range(len(right)), key=consistencies.__getitem__)]
                half = len(right) // 2
                line += f"  {fmean(consistencies):11.3f}  {fmean(by_consistency[:half]):20.3f}"
                line += f"  {fmean(by_consistency[half:]):20.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
