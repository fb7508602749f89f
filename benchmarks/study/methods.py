"""Train a row. Every method returns what `evaluate_models` evaluates: a model, an adapter, or a file of replies."""

from __future__ import annotations

import json
from collections.abc import Callable

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cyclealign_trl import (
    Aligner,
    AlignerConfig,
    AlignerTrainer,
    CycleAlignConfig,
    CycleAlignTrainer,
    DLMAConfig,
    DLMATrainer,
    LLMRanker,
    RankingConfig,
    RankingTrainer,
    generate_contrastive_pairs,
)
from cyclealign_trl.cycle.interaction_log import InteractionLog, export_interactions
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from cyclealign_trl.types import Prompt

from .endpoint import Score, StudyJudge, best_of, random_score
from .job import Job
from .rows import Method


def zero_shot(job: Job) -> str:
    """Return the initial policy."""
    return job.study.model


def best_of_4(job: Job) -> str:
    """Write the choice of the row's judge of four samples of the initial policy for each evaluation prompt."""
    prompts = [entry.prompt for entry in job.study.prompts.prompts]
    samples = job.study.samples(f"evaluation-{job.seed}", 4).sample(prompts)
    score = _judge_score(job)
    return write_replies(job, [best_of(score, prompt, group) for prompt, group in zip(prompts, samples, strict=True)])


def sft(job: Job) -> str:
    """Train on the chosen completions with TRL's `SFTTrainer`."""
    dataset = job.study.pairs.rename_column("chosen", "completion").remove_columns("rejected")
    args = SFTConfig(**job.arguments, max_length=None, activation_checkpointing=False)
    return job.train(SFTTrainer(job.study.model, args, train_dataset=dataset, peft_config=job.peft_config))


def dpo(job: Job) -> str:
    """Train on HH-RLHF's pairs with TRL's `DPOTrainer`."""
    return _dpo(job, job.study.pairs)


def dpo_on_export(job: Job) -> str:
    """Train on the pairs of a CycleAlign run with TRL's `DPOTrainer`."""
    return _dpo(job, export_interactions(job.study.output_dir / f"{job.row.needs}-{job.seed}", "preference"))


def _dpo(job: Job, pairs: Dataset) -> str:
    args = DPOConfig(**job.arguments, max_length=None, activation_checkpointing=False)
    return job.train(DPOTrainer(job.study.model, args=args, train_dataset=pairs, peft_config=job.peft_config))


def ranking(job: Job) -> str:
    """Train on HH-RLHF's pairs with PRO or RRHF."""
    args = RankingConfig(
        **job.arguments, **job.row.settings, max_completion_length=job.study.scale.max_completion_length
    )
    return job.train(RankingTrainer(job.study.model, args, job.study.pairs, peft_config=job.peft_config))


def cyclealign(job: Job) -> str:
    """Run the cycle, with the judge behind an endpoint."""
    study, scale = job.study, job.study.scale
    windows = -(-scale.steps // job.row.settings["num_interactions"])
    prompts = study.pairs["prompt"][: windows * scale.batch_size]
    samples = study.samples("training", scale.num_improvements).sample(prompts)
    questions = [prompt[-1]["content"] for prompt in prompts]
    judge = StudyJudge(
        _judge_score(job),
        dict(zip(questions, prompts, strict=True)),
        dict(zip(questions, samples, strict=True)),
    )
    args = CycleAlignConfig(
        **job.arguments,
        **job.row.settings,
        num_generations=scale.num_generations,
        max_prompt_length=scale.max_prompt_length,
        max_completion_length=scale.max_completion_length,
        temperature=scale.temperature,
        top_p=scale.top_p,
    )
    with LoopbackEndpoint(judge.respond) as endpoint:
        trainer = CycleAlignTrainer(
            study.model,
            # On a busy CPU core, the reward model needs seconds per request.
            LLMRanker("study-judge", endpoint.base_url, "none", max_concurrency=2, timeout=600),
            args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            peft_config=job.peft_config,
        )
        return job.train(trainer)


def dlma(job: Job) -> str:
    """Let the policy write and score contrastive pairs, and train on them."""
    study, scale = job.study, job.study.scale
    pairs = generate_contrastive_pairs(
        study.model,
        study.pairs.select_columns("prompt"),
        output_dir=job.folder / "pairs",
        seed=job.seed,
        max_prompt_length=None,  # the contrastive prompts are longer than the prompts
        max_completion_length=scale.max_completion_length - 1,
    )
    args = DLMAConfig(
        **job.arguments,
        max_prompt_length=scale.max_prompt_length,
        max_completion_length=scale.max_completion_length,
    )
    return job.train(DLMATrainer(study.model, args=args, train_dataset=pairs, peft_config=job.peft_config))


def aligner(job: Job) -> str:
    """Train an aligner on rejected and chosen completions, and correct the replies of the initial policy."""
    study = job.study
    rows = [
        {
            "prompt": pair["prompt"],
            "answer": pair["rejected"][0]["content"],
            "correction": pair["chosen"][0]["content"],
        }
        for pair in study.pairs
    ]
    args = AlignerConfig(**job.arguments, activation_checkpointing=False)
    trainer = AlignerTrainer(study.model, args, train_dataset=Dataset.from_list(rows), peft_config=job.peft_config)
    trained = Aligner.from_pretrained(
        job.train(trainer),
        max_new_tokens=study.scale.max_completion_length,
        generation_kwargs={"do_sample": False},
    )
    lines = (study.output_dir / "evaluation" / "replies" / f"{job.row.needs}-0.jsonl").read_text("utf-8").splitlines()
    replies = {row["prompt_id"]: row["completion"] for row in map(json.loads, lines)}
    prompts = [entry.prompt for entry in study.prompts.prompts]
    return write_replies(job, trained.correct(prompts, [replies[entry.id] for entry in study.prompts.prompts]))


METHODS: dict[Method, Callable[[Job], str]] = {
    "none": zero_shot,
    "best_of_4": best_of_4,
    "sft": sft,
    "ranking": ranking,
    "dpo": dpo,
    "dpo_on_export": dpo_on_export,
    "cyclealign": cyclealign,
    "dlma": dlma,
    "aligner": aligner,
}


def make(job: Job) -> str:
    """Train a row, with every random generator seeded, that of the adapter included."""
    job.folder.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    return METHODS[job.row.method](job)


def _judge_score(job: Job) -> Score:
    """Return how the judge of a row scores."""
    return random_score(job.seed) if job.row.judge == "random" else job.study.judge_score


def judge_calls(job: Job) -> int:
    """Return the number of rankings that a run got from its judge."""
    if job.row.method != "cyclealign":
        return 0
    column = "black_box_order"
    return sum(order is not None for order in InteractionLog(job.folder).read([column]).to_pydict()[column])


def write_replies(job: Job, completions: list[str]) -> str:
    """Write replies to the evaluation prompts as a data set for `evaluate_models`, and return its path."""
    prompts: list[Prompt] = [entry.prompt for entry in job.study.prompts.prompts]
    path = job.folder / "replies.jsonl"
    rows = ({"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
