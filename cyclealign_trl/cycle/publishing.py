"""Publishing a run of the cycle: its part of the model card, its demonstrations, and its log as a data set."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from .._files import atomic_write
from ..rankers.base import Ranker, ranker_name
from ..training.model_card import LIBRARY, Paper, TrainedModel, public_name, table
from .cyclealign_config import CycleAlignConfig
from .demonstrations import DemonstrationPool
from .interaction_log import COLUMN_DESCRIPTIONS, InteractionLog
from .interaction_totals import CurvePoint, InteractionTotals

PAPER = Paper(
    "CycleAlign",
    "CycleAlign: Iterative Distillation from Black-box LLM to White-box Models for Better Human Alignment",
    "Hong, Jixiang and Tu, Quan and Chen, Changyu and Gao, Xing and Zhang, Ji and Yan, Rui",
    2023,
    "2310.16271",
)
DEMONSTRATIONS = "demonstrations.json"
PLOT = "agreement.png"
DATA_FILE = "interactions/train-00000-of-00001.parquet"  # a path that `export_interactions` reads too

_PLOTTED_POINTS = 100
_LISTED_POINTS = 10
_SFT_TARGETS = {
    "improved": "the ranker's improved completion",
    "top_ranked": "the top-ranked completion",
    "corrector": "the ranker's improved completion, or the corrected best one",
}


# Model card


def describe_run(
    model: TrainedModel, args: CycleAlignConfig, pool: DemonstrationPool, ranker: Ranker, totals: InteractionTotals
) -> TrainedModel:
    """Add the cycle to the description of a model that was trained with a ranking loss."""
    (loss,) = model.papers
    return replace(
        model,
        papers=(PAPER, loss),
        method=f"{PAPER.link}: it sampled completions, a ranker ordered them, completions that both ordered alike "
        f"became demonstrations for the ranker, and it learned the ranker's order by {loss.link}.",
        settings={**model.settings, **run_settings(args, pool, ranker)},
        sections=interaction_sections(totals, Path(args.output_dir)) if totals.interactions else [],
    )


def run_settings(args: CycleAlignConfig, pool: DemonstrationPool, ranker: Ranker) -> dict[str, str]:
    """Return the settings of a run as rows of a table."""
    dynamic = f"at most {pool.capacity} dynamic per {pool.scope}" if pool.capacity else "no dynamic"
    target = _SFT_TARGETS[args.sft_target]
    return {
        "SFT loss": f"{args.sft_weight} (K - 1)², on {target}" if args.sft_weight else "none",
        "ranker": f"`{public_name(ranker_name(ranker))}`",
        "completions per prompt, K": str(args.num_generations),
        "interactions per prompt": f"{'at most ' if args.stop_on_agreement else ''}{args.num_interactions}",
        "demonstrations": f"{len(pool.static)} static, {dynamic}",
        "sampling": f"temperature {args.temperature}, top_p {args.top_p}, top_k {args.top_k}",
    }


def interaction_sections(totals: InteractionTotals, folder: Path) -> list[str]:
    """Return Markdown sections on a run, and plot the agreement into the folder if `matplotlib` is installed."""
    rows = {
        "interactions": f"{totals.interactions:,}",
        "rankings": f"{totals.rankings:,}",
        "rankings that failed": _by_reason(totals.failures),
        "prompts that were not ranked": _by_reason(totals.skipped),
        "agreements that made a demonstration": f"{totals.agreed:,}",
    }
    if totals.tied:
        rows["rankings that tie all completions"] = f"{totals.tied:,}"
    if totals.billed.answers:
        rows["tokens billed"] = totals.billed.tokens_text
        rows["cost"] = totals.billed.cost_text
    if totals.cached.answers:
        rows["answers from the cache"] = (
            f"{totals.cached.answers:,} (when first asked for: {totals.cached.tokens_text}; {totals.cached.cost_text})"
        )
    sections = ["## Interactions", "Training only, without the rankings of evaluations.", table(rows)]
    if totals.bins:
        sections += ["## Agreement", "Mean share of a prompt's completions that policy and ranker order alike:"]
        if importlib.util.find_spec("matplotlib") is not None:
            plot_agreement(totals.curve(_PLOTTED_POINTS), folder / PLOT)
            sections.append(f"![Agreement over the optimiser steps]({PLOT})")
        else:
            points = {str(step): f"{rate:.3f}" for step, rate in totals.curve(_LISTED_POINTS)}
            sections.append(table(points, ("up to step", "agreement")))
    return sections


def plot_agreement(curve: Sequence[CurvePoint], path: Path) -> None:
    """Plot the agreement over the steps of a run as a PNG file. Needs `matplotlib`."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and needs a display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3)
    axes.set(xlabel="optimiser step", ylabel="agreement", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


# Files next to the model


def save_demonstrations(pool: DemonstrationPool, folder: Path) -> None:
    """Write the demonstrations of a run for `DemonstrationPool.load_state_dict`, if they have scope "run"."""
    path = folder / DEMONSTRATIONS
    if pool.scope == "run":
        path.write_text(json.dumps(pool.state_dict(), ensure_ascii=False), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


# Log as a data set


def push_log(
    log: InteractionLog,
    repo_id: str,
    settings: Mapping[str, str],
    *,
    private: bool | None,
    token: str | None,
    is_main_process: bool,
) -> str:
    """Publish a log from the main process, and return the URL on all processes; see `push_interactions`.

    Raises:
        RuntimeError: On the other processes, if publishing failed on the main one, which raises its own error.
    """
    url: str | None = None
    error: Exception | None = None
    if is_main_process:
        try:
            url = push_interactions(log.read(), repo_id, settings, private=private, token=token)
        except Exception as raised:  # raised below, after the other processes know
            error = raised
    (url,) = broadcast_object_list([url])
    if error is not None:
        raise error
    if url is None:
        raise RuntimeError("The main process could not publish the log of interactions: see its error.")
    return url


def push_interactions(
    log: pa.Table, repo_id: str, settings: Mapping[str, str], *, private: bool | None, token: str | None
) -> str:
    """Publish a log as a data set with a card.

    Args:
        log: The log.
        repo_id: Repository to publish to, created if missing.
        settings: Settings of the run, for the card.
        private: Whether a new repository is private.
        token: Token with write access.

    Returns:
        URL of the repository.
    """
    api = HfApi(library_name=LIBRARY, library_version=version(LIBRARY))
    repository = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True, token=token)
    with TemporaryDirectory() as folder:
        data_file = Path(folder, DATA_FILE)
        data_file.parent.mkdir()
        pq.write_table(log, data_file)
        interactions_card(repository.repo_id, log.num_rows, settings).save(Path(folder, "README.md"))
        api.upload_folder(
            repo_id=repository.repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Log of interactions",
            token=token,
        )
    return str(repository)


def interactions_card(repo_id: str, num_rows: int, settings: Mapping[str, str]) -> DatasetCard:
    """Return the card of a published log. It declares no license, because prompts and completions have their own."""
    name = repo_id.split("/")[-1]
    metadata = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        tags=[LIBRARY, "cyclealign", "preference", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}],
    )
    parts = [
        f"# {name}",
        f"The {num_rows:,} interactions of a training run with {PAPER.link}. In each, a policy sampled completions of "
        "a prompt, and a ranker ordered them.",
        f'```python\nfrom datasets import load_dataset\n\nlog = load_dataset("{repo_id}", split="train")\n```',
        "As training data for DPO, PRO, RRHF or SFT:",
        "```python\nfrom cyclealign_trl import export_interactions\nfrom huggingface_hub import snapshot_download\n\n"
        f'run = snapshot_download("{repo_id}", repo_type="dataset")\n'
        'pairs = export_interactions(run, "preference")\n```',
        "## Columns",
        table({f"`{name}`": text for name, text in COLUMN_DESCRIPTIONS.items()}, ("column", "")),
        "## The run",
        table(settings),
        "## License",
        "None is declared. Prompts, completions and the ranker's replies are under the terms of their sources.",
        "## Citation",
        f"```bibtex\n{PAPER.bibtex}\n```",
    ]
    return DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _by_reason(counts: Mapping[str, int]) -> str:
    if not counts:
        return "0"
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} ({reasons})"
