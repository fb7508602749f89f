"""What a run publishes beside its model: its log as a data set, its demonstrations, and what the card says of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..training.model_card import CYCLEALIGN, LIBRARY, table
from .demonstrations import DemonstrationPool
from .interaction_log import ExportType, InteractionSummary, plot_agreement

NOT_WITH_THE_MODEL = (
    "rankings-*.sqlite*",
    "interactions/*",
    "interactions-*/*",
    "spent/*",
    "spent-*/*",
    *(f"{name}/*" for name in get_args(ExportType)),
    "runs/*",
    "*.tmp",
)
"""Files of the output directory that belong to no model: prompts and replies, reports, and what is half written."""

DEMONSTRATIONS = "demonstrations.json"
PLOT = "agreement.png"
DATA_FILE = "interactions/train-00000-of-00001.parquet"  # where `export_interactions` looks for a log, too

_PLOTTED = 100  # points of the curve
_LISTED = 10

_COLUMNS = {
    "`step`": "optimiser steps finished before the interaction",
    "`interaction`": "its position in the cycle of its prompt, from 0",
    "`prompt`": "text or messages",
    "`completions`": "what the policy sampled",
    "`black_box_order`": "the ranker's order: indices into `completions`, best first; equal texts are named once",
    "`white_box_order`": "the policy's order, by its own probabilities before the step",
    "`agreement`": "what both order alike, best first",
    "`ranks`": "the ranker's rank of each completion, 0 = best, where ties show",
    "`improved_completion`": "a better completion that the ranker wrote, or a corrector",
    "`failure`": "why there is no ranking",
    "`usage`": "tokens, cost in US dollars where known, attempts, and whether the answer came from a cache",
    "`consistency`": "how far several passes of the ranker agree, Kendall's tau-b from -1 to 1",
}


def save_demonstrations(pool: DemonstrationPool, folder: Path) -> None:
    """Writes the demonstrations of a whole run for `DemonstrationPool.load_state_dict`; a prompt's own come and go."""
    path = folder / DEMONSTRATIONS
    if pool.scope == "run":
        path.write_text(json.dumps(pool.state_dict(), ensure_ascii=False), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def interaction_sections(summary: InteractionSummary, folder: Path) -> list[str]:
    """What the log says, for the model's card. With `matplotlib`, draws the curve of agreement into the folder."""
    rows = {
        "interactions": f"{summary.interactions:,}",
        "rankings": f"{summary.rankings:,}",
        "rankings that failed": _by_kind(summary.failures),
        "prompts that were not ranked": _by_kind(summary.skipped),
        "agreements that made a demonstration": f"{summary.agreed:,}",
    }
    if summary.billed.answers:
        rows["tokens billed"] = summary.billed.tokens_text
        rows["cost"] = summary.billed.cost_text
    if summary.cached.answers:
        rows["answers from the cache"] = (
            f"{summary.cached.answers:,} (when first asked for: {summary.cached.tokens_text}; "
            f"{summary.cached.cost_text})"
        )
    sections = ["## Interactions", "Training alone; what evaluations asked for is not in it.", table(rows)]
    if summary.agreement:
        sections += ["## Agreement", "The share of a prompt's completions that policy and ranker order alike, mean:"]
        if importlib.util.find_spec("matplotlib") is not None:
            plot_agreement(summary.curve(_PLOTTED), folder / PLOT)
            sections.append(f"![Agreement over the optimiser steps]({PLOT})")
        else:
            points = {str(step): f"{rate:.3f}" for step, rate in summary.curve(_LISTED)}
            sections.append(table(points, ("up to step", "agreement")))
    return sections


def push_interactions(
    log: pa.Table, repo_id: str, settings: Mapping[str, str], *, private: bool | None, token: str | None
) -> str:
    """Publishes a log as a data set with a card.

    Args:
        log: The log.
        repo_id: Where to; made where it is missing.
        settings: What the card says about the run.
        private: Whether a new repository is private.
        token: A token that may write.

    Returns:
        The repository's address.
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
    """The card of a published log. It names no license: prompts and replies come from elsewhere."""
    name = repo_id.split("/")[-1]
    metadata = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        tags=[LIBRARY, "cyclealign", "preference", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}],
    )
    parts = [
        f"# {name}",
        f"The {num_rows:,} interactions of a training run with {CYCLEALIGN.link}: in each, a policy sampled "
        "completions of a prompt, and a ranker put them in order.",
        f'```python\nfrom datasets import load_dataset\n\nlog = load_dataset("{repo_id}", split="train")\n```',
        "As training data for DPO, PRO, RRHF or SFT:",
        "```python\nfrom cyclealign_trl import export_interactions\nfrom huggingface_hub import snapshot_download\n\n"
        f'run = snapshot_download("{repo_id}", repo_type="dataset")\n'
        'pairs = export_interactions(run, "preference")\n```',
        "## Columns",
        table(_COLUMNS, ("column", "")),
        "## The run",
        table(settings),
        "## License",
        "None is declared. Prompts, completions and the ranker's replies are under the terms of where they come from.",
        "## Citation",
        f"```bibtex\n{CYCLEALIGN.bibtex}\n```",
    ]
    return DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _by_kind(counts: Mapping[str, int]) -> str:
    if not counts:
        return "0"
    kinds = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} ({kinds})"
