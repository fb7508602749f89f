"""Judges of known quality, data for them, and brute-force agreement figures."""

import gzip
import itertools
import json
import math
import random
import statistics
import threading

import numpy as np

from cyclealign_trl import RankingResult


class LengthJudge:
    """Prefer long texts. In a share of the answers, drawn by the request, put the first shown completion on top."""

    name = "length-judge"

    def __init__(self, bias=0.0, noise=0.0, usage=None):
        self.bias, self.noise, self.usage = bias, noise, usage
        self.fingerprint = f"length-judge-{bias}-{noise}"
        self.requests = []
        self.lock = threading.Lock()

    def rank(self, requests):
        with self.lock:
            self.requests.extend(requests)
        return [self.rank_one(request) for request in requests]

    def rank_one(self, request):
        rng = random.Random(repr((request.prompt, request.completions, len(request.demonstrations))))
        scores = [len(text) + rng.gauss(0, self.noise) for text in request.completions]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        if rng.random() < self.bias:
            order.remove(0)
            order.insert(0, 0)
        return RankingResult(tuple(order), usage=self.usage)


def ranks_by_length(texts):
    """Return the ranks of an unbiased `LengthJudge`."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    return [order.index(index) for index in range(len(texts))]


def make_rows(number=40, size=4, seed=0, subsets=("even", "odd")):
    """Return rows with texts of random length, whose reference ranks follow the length with noise."""
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        lengths = rng.sample(range(1, 40), size)
        order = sorted(range(size), key=lambda i: -lengths[i] + rng.gauss(0, 8))
        rows.append(
            {
                "prompt": f"Question {index}?",
                "completions": ["x" * length for length in lengths],
                "ranks": [order.index(i) for i in range(size)],
                "subset": subsets[index % 2],
            }
        )
    return rows


def brute_force_agreement(predictions, references):
    """Return the four agreement figures, computed from their definitions with explicit loops."""
    correct, pairs, exact, top, taus = 0.0, 0, [], [], []
    for ranks, reference in zip(predictions, references, strict=True):
        strict = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if reference[i] < reference[j]]
        if not strict:
            continue
        pairs += len(strict)
        correct += sum((ranks[i] < ranks[j]) + 0.5 * (ranks[i] == ranks[j]) for i, j in strict)
        exact.append(all(ranks[i] < ranks[j] for i, j in strict))
        winners = [i for i in range(len(ranks)) if all(ranks[i] <= other for other in ranks)]
        best = {i for i in range(len(ranks)) if all(reference[i] <= other for other in reference)}
        top.append(len(best.intersection(winners)) / len(winners))
        signs = [
            (np.sign(ranks[i] - ranks[j]), np.sign(reference[i] - reference[j]))
            for i, j in itertools.combinations(range(len(ranks)), 2)
        ]
        if any(sign for sign, _ in signs):
            norm = math.sqrt(sum(sign**2 for sign, _ in signs) * sum(sign**2 for _, sign in signs))
            taus.append(sum(sign * reference_sign for sign, reference_sign in signs) / norm)
    return {
        "pairwise_accuracy": correct / pairs,
        "exact_match": statistics.fmean(exact),
        "top_1": statistics.fmean(top),
        "kendall_tau": statistics.fmean(taus),
    }


# Files of published rankings in the folder `data/ranked` of the optional data
RANKED_FILES = (
    "oasst_en100_human_ranked.jsonl",
    "pandalm_human_pairwise.jsonl",
    "vicuna80_gpt4_roundrobin.jsonl.gz",
    "vicuna80_gpt4_scores_manymodels.jsonl.gz",
)


def read_rankings(path):
    """Return the rows of a file, and the scores by distinct text of each row with an ordered pair."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    scores = []
    for row in rows:
        best = {}
        for response, score in zip(row["responses"], row["scores"], strict=True):
            text = str(response["text"])  # one text is stored as a bare `true`
            best[text] = max(score, best.get(text, score))
        if len(set(best.values())) > 1:
            scores.append(best)
    return rows, scores


class TextJudge:
    """Rank by a score that depends only on the text, with ties."""

    def rank(self, requests):
        ranks = [self.ranks(request.completions) for request in requests]
        return [RankingResult(tuple(sorted(range(len(r)), key=r.__getitem__)), tuple(r)) for r in ranks]

    @staticmethod
    def ranks(texts):
        scores = [sum(map(ord, text)) % 1009 for text in texts]
        return [sum(other > score for other in scores) for score in scores]


def text_judge_agreement(scores):
    """Return the agreement of `TextJudge` with the scores from `read_rankings`, by brute force."""
    references = [[-score for score in by_text.values()] for by_text in scores]
    return brute_force_agreement([TextJudge.ranks(by_text) for by_text in scores], references)
