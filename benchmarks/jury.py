"""Compare the members of a jury with the panel on completions that people or GPT-4 have ranked.

    python benchmarks/jury.py path/to/ranked --reward_model A B --self_reward C --max_prompts 40

The folder holds `oasst_en100_human_ranked.jsonl`, `pandalm_human_pairwise.jsonl` and `vicuna80_gpt4_roundrobin.jsonl`
(or `.jsonl.gz`), with the columns `prompt`, `responses` and `scores`, and for single votes `pairs` (three annotators),
`pairs_gpt4` (in both shown orders), `pairs_human` (three votes) and `human_scores`.

The members are functions of the text, models, and recorded votes of people and of GPT-4. A recorded voter ranks the
completions of a prompt by the number of their pairs that they win, a tie counting half. A panel is a `JuryRanker` with
equal weights. The tables show the pairwise accuracy (a tie counts half) with its 95 % bootstrap interval over prompts,
and the difference of the panel to its best member and to the mean of its members, on the same resamples.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cyclealign_trl import (
    FunctionRanker,
    JudgeReport,
    JuryRanker,
    Ranker,
    RewardModelRanker,
    SelfRewardRanker,
    evaluate_ranker,
)
from cyclealign_trl.evaluation.intervals import bootstrap_ratios

Row = dict[str, Any]
Votes = Mapping[str, Sequence[float]]
WORD = re.compile(r"[A-Za-z']+")


def length(completions: Sequence[str], **_: Any) -> list[float]:
    """Count the words of each completion."""
    return [float(len(WORD.findall(text))) for text in completions]


def overlap(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the share of the prompt's words of at least four letters that each completion uses."""
    scores = []
    for prompt, text in zip(prompts, completions, strict=True):
        asked = {word for word in WORD.findall(prompt.lower()) if len(word) > 3}
        scores.append(len(asked & set(WORD.findall(text.lower()))) / max(1, len(asked)))
    return scores


def voter(name: str) -> FunctionRanker:
    """Return the ranker that repeats the votes of a row's column `votes`."""

    def repeat(completions: Sequence[str], votes: Sequence[Mapping[str, Any]], **_: Any) -> list[float]:
        return [by_voter[name][text] for text, by_voter in zip(completions, votes, strict=True)]

    return FunctionRanker(repeat)


# Rows with votes


def points(num_completions: int, verdicts: Iterable[Sequence[Any]], tie: int) -> list[float]:
    """Return the pairs that each completion wins, a tie counting half, from verdicts (i, j, 1 or 2 or tie)."""
    wins = [0.0] * num_completions
    for first, second, verdict in verdicts:
        wins[first] += 0.5 if verdict == tie else float(verdict == 1)
        wins[second] += 0.5 if verdict == tie else float(verdict == 2)
    return wins


def make_rows(rows: Iterable[Row], split: Callable[[Row], tuple[Sequence[float], Votes]]) -> Iterator[Row]:
    """Yield rows with reference scores, and with the scores of each voter by text."""
    for row in rows:
        texts = [str(response["text"]) for response in row["responses"]]
        reference, votes = split(row)
        by_text = {name: dict(zip(texts, scores, strict=True)) for name, scores in votes.items()}
        yield {"prompt": row["prompt"], "completions": texts, "rewards": list(reference), "votes": by_text}


def without_votes(row: Row) -> tuple[Sequence[float], Votes]:
    """Return the scores of a row as the reference."""
    return row["scores"], {}


def annotators(reference: int) -> Callable[[Row], tuple[Sequence[float], Votes]]:
    """Return one annotator of PandaLM as the reference, and the other two as voters."""

    def split(row: Row) -> tuple[Sequence[float], Votes]:
        scores = [
            points(len(row["responses"]), [(i, j, votes[n]) for i, j, votes in row["pairs"]], tie=0) for n in range(3)
        ]
        return scores[reference], {f"annotator {n + 1}": scores[n] for n in range(3) if n != reference}

    return split


def gpt4_orders(row: Row) -> tuple[Sequence[float], Votes]:
    """Return human scores as the reference, and GPT-4 in both shown orders as voters."""
    number, pairs = len(row["responses"]), row["pairs_gpt4"]
    return row["human_scores"], {
        "GPT-4, first order": points(number, [pair for pair in pairs if pair[0] < pair[1]], tie=3),
        "GPT-4, reversed": points(number, [pair for pair in pairs if pair[0] > pair[1]], tie=3),
    }


def human_votes(row: Row) -> tuple[Sequence[float], Votes]:
    """Return GPT-4's scores as the reference, and the three human votes on each pair as voters."""
    votes: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for pair in row["pairs_human"]:
        votes[pair[0], pair[1]].append(pair)
    number = len(row["responses"])
    voters = {f"human vote {n + 1}": points(number, [own[n] for own in votes.values()], tie=3) for n in range(3)}
    return row["scores"], voters


def add_votes(rows: Sequence[Row], name: str, ranker: Ranker) -> None:
    """Add the votes of a model, which is shown the prompts as conversations."""
    conversations = []
    for row in rows:
        parts = re.split(r"\n\n(Human|Assistant):", row["prompt"])[1:-2]
        roles = [{"Human": "user", "Assistant": "assistant"}[role] for role in parts[::2]]
        messages = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
        conversations.append({**row, "prompt": messages})
    report = evaluate_ranker(ranker, conversations, reverse=False, max_concurrency=1)
    for ranking in report.rankings:
        reference = report.references[ranking.reference]
        assert ranking.ranks is not None, ranking.outcome
        scores = zip(reference.completions, [-float(rank) for rank in ranking.ranks], strict=True)
        reference.metadata["votes"][name] = dict(scores)


# Measuring


def correct_pairs(report: JudgeReport) -> np.ndarray:
    """Return the number of correctly ordered pairs and of ordered pairs of each prompt `(B, 2)`."""
    counts = []
    for ranking in sorted(report.rankings, key=lambda ranking: ranking.reference):
        ranks, reference = ranking.ranks, report.references[ranking.reference].ranks
        assert ranks is not None, ranking.outcome
        pairs = [(i, j) for i, j in combinations(range(len(ranks)), 2) if reference[i] != reference[j]]
        correct = [
            0.5 if ranks[i] == ranks[j] else float((ranks[i] < ranks[j]) == (reference[i] < reference[j]))
            for i, j in pairs
        ]
        counts.append((sum(correct), float(len(pairs))))
    return np.array(counts)


def compare(title: str, rows: Sequence[Row], members: Mapping[str, Ranker]) -> None:
    """Print the accuracy of each member and of the panel."""
    rankers = [*members.values(), JuryRanker(list(members.values()))]
    counts = [correct_pairs(evaluate_ranker(ranker, rows, reverse=False)) for ranker in rankers]
    correct, total = np.stack([count[:, 0] for count in counts], axis=1), counts[0][:, 1:]
    best = int(correct[:, :-1].sum(0).argmax())
    panel = correct[:, -1:]
    differences = np.hstack([panel - correct[:, best : best + 1], panel - correct[:, :-1].mean(1, keepdims=True)])
    columns = np.hstack([correct, differences])
    figures = bootstrap_ratios(columns, np.broadcast_to(total, columns.shape), 2000, 0.95, seed=0)
    names = [*members, "panel", "panel - best member", "panel - mean member"]
    print(f"\n{title}: {len(total)} prompts, {int(total.sum())} pairs")
    for name, (value, interval) in zip(names, figures, strict=True):
        assert value is not None
        assert interval is not None
        sign = "+" if " - " in name else ""
        print(f"  {name:22} {value:{sign}.3f}  [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]", flush=True)


def read(folder: Path, name: str) -> list[Row]:
    """Read a data set of the folder."""
    plain = folder / f"{name}.jsonl"
    if plain.exists():
        return [json.loads(line) for line in plain.read_text(encoding="utf-8").splitlines()]
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """Run the benchmark and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with the ranked data.")
    parser.add_argument("--reward_model", nargs="*", default=[], help="Reward models, as members.")
    parser.add_argument("--self_reward", nargs="*", default=[], help="Causal language models, as members.")
    parser.add_argument("--max_prompts", type=int, help="Number of prompts per data set for the models.")
    args = parser.parse_args()
    functions: dict[str, Ranker] = {"length": FunctionRanker(length), "overlap": FunctionRanker(overlap)}
    pandalm, vicuna = (read(args.folder, name) for name in ("pandalm_human_pairwise", "vicuna80_gpt4_roundrobin"))
    for number in range(3):
        rows = list(make_rows(pandalm, annotators(number)))
        compare(f"Annotators against annotator {number + 1}", rows, {name: voter(name) for name in rows[0]["votes"]})
    for title, split in (
        ("GPT-4 against human scores", gpt4_orders),
        ("Human votes against GPT-4's scores", human_votes),
    ):
        rows = list(make_rows(vicuna, split))
        voters: dict[str, Ranker] = {name: voter(name) for name in rows[0]["votes"]}
        compare(title, rows, voters)
        compare(f"{title}, with functions", rows, {**voters, **functions})
    models: dict[str, Ranker] = {
        **{f"reward {n + 1}": RewardModelRanker(name, max_length=1024) for n, name in enumerate(args.reward_model)},
        **{
            f"self-reward {n + 1}": SelfRewardRanker(name, contrastive="helpful", max_prompt_length=1024)
            for n, name in enumerate(args.self_reward)
        },
    }
    for title, raw in (("PandaLM", pandalm), ("OASST", read(args.folder, "oasst_en100_human_ranked"))):
        rows = list(make_rows(raw, without_votes))[: args.max_prompts]
        for name, model in models.items():
            add_votes(rows, name, model)
        compare(f"Models and functions against people, {title}", rows, {**functions, **{n: voter(n) for n in models}})


if __name__ == "__main__":
    main()
