"""Generate the training data of DLMA (arXiv 2402.11907): pairs that a model samples and scores by itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetInfo
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._files import atomic_write
from ..data.drop_reports import dropped_rows
from ..data.formats import completion_text, plain_prompt, preference_pair, ranked_row
from ..data.hh_rlhf import read_published
from ..models.generation_backend import group_by_prompt, seeded
from ..models.loading import digest_weights
from ..models.transformers_backend import generate
from ..rankers.contrastive_prompts import ContrastivePrompts
from ..rankers.self_reward import SelfReward
from ..training.row_checks import check_rows, pair_check, plain_rows, read_prompts
from ..types import Prompt, as_completion

_SETTINGS = "settings.json"
_TOO_LONG = {"dropped": "too_long"}


def generate_contrastive_pairs(
    model: str | PreTrainedModel,
    prompts: Dataset | Sequence[Prompt],
    contrastive: ContrastivePrompts | Mapping[str, str] | str = "harmless",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    max_prompt_length: int | None = 512,
    max_completion_length: int = 200,
    temperature: float = 1.0,
    generation_kwargs: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Sample a good and a bad completion of each prompt from a model, and score the pair with the same model.

    `chosen` is sampled under the positive contrastive prompt and `rejected` under the negative one. Both prompts also
    give the pair's self-reward (see `add_self_rewards`). A pair with a negative self-reward is not swapped, because
    the DLMA loss takes the sign into account.

    Some prompts are dropped, and counted by reason in `info.description`: those whose contrastive prompts exceed
    `max_prompt_length`, and those with an empty completion, equal completions, or a self-reward that is not finite.

    With several processes, each one handles a share of the prompts, and all of them return all pairs.

    Args:
        model: A causal language model, or its name.
        prompts: The prompts, as text or messages, or a dataset with a column `prompt`.
        contrastive: `"harmless"`, `"helpful"`, or your own `ContrastivePrompts`.
        tokenizer: The model's tokenizer. `None` loads it by the model's name.
        output_dir: Folder for finished batches, of all machines or of each. An interrupted call continues from there,
            with the same pairs as an uninterrupted one.
        batch_size: Prompts per batch.
        max_prompt_length: Longest contrastive prompt in tokens. `None` means no limit.
        max_completion_length: Longest completion in tokens.
        temperature: Sampling temperature.
        generation_kwargs: Further fields of `GenerationConfig`.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        seed: Random seed for sampling. The global random state does not change.
        device: Device of the model. `None` means this process's accelerator, or the CPU without one.
        model_init_kwargs: Keyword arguments to load the model by name.

    Returns:
        Pairs in TRL's preference format (`prompt`, `chosen`, `rejected`) with `self_reward`, `chosen_logps` and
        `rejected_logps`. The last two are log-probabilities under the positive and under the negative prompt.

    Raises:
        ValueError: If there are no prompts, every pair is dropped, or `output_dir` contains pairs from a different
            model, different prompts or different settings.
    """
    prompts = prompts if isinstance(prompts, Dataset) else list(prompts)
    if not len(prompts):
        raise ValueError("There are no prompts. Pass at least one.")
    rank, num_processes = _processes()
    self_reward = SelfReward(
        model,
        tokenizer,
        contrastive,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length + 1,  # scoring appends an end-of-sequence token
        chat_template_kwargs=chat_template_kwargs,
        device=device,
        model_init_kwargs=model_init_kwargs,
    )
    prompts = _read_prompts(prompts, self_reward)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, **(generation_kwargs or {})}
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    settings = {
        "model": digest_weights(self_reward.model),
        "prompts": hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest(),
        "contrastive": asdict(self_reward.contrastive),
        "batch_size": batch_size,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "sampling": sampling,
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "seed": seed,
    }
    folder = None if output_dir is None else _open_folder(Path(output_dir), settings)

    own = range(rank, len(batches), num_processes)
    pairs: dict[int, list[dict[str, Any]]] = {}
    for index in tqdm(own, desc="Generating contrastive pairs", disable=rank > 0 or len(own) < 2, leave=False):
        path = None if folder is None else folder / f"batch-{index:06d}.json"
        if path is not None and path.exists():
            pairs[index] = json.loads(path.read_text("utf-8"))
            continue
        config = GenerationConfig(
            **sampling,
            max_new_tokens=max_completion_length,
            eos_token_id=list(self_reward.renderer.eos_token_ids),
            pad_token_id=self_reward.renderer.tokenizer.pad_token_id,
        )
        with seeded(seed + index, self_reward.model.device):
            pairs[index] = _sample_pairs(self_reward, batches[index], config)
        if path is not None:
            _write_json(path, pairs[index])
    if num_processes > 1:  # not by reading the files, because each machine can have a folder of its own
        parts: list[dict[int, list[dict[str, Any]]]] = [{} for _ in range(num_processes)]
        torch.distributed.all_gather_object(parts, pairs)
        pairs = {index: batch for part in parts for index, batch in part.items()}
    return _as_dataset([row for index in range(len(batches)) for row in pairs[index]])


def add_self_rewards(
    dataset: Dataset,
    model: str | PreTrainedModel,
    contrastive: ContrastivePrompts | Mapping[str, str] | str = "harmless",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 16,
    max_prompt_length: int | None = 512,
    max_completion_length: int = 512,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Add self-rewards to preference pairs: scores by a model that sees each prompt in two contrastive versions.

    The self-reward of a pair is `[log p(chosen | positive) - log p(chosen | negative)] - [log p(rejected | positive) -
    log p(rejected | negative)]`, where each log-probability is a sum over tokens and the positive or negative prompt
    asks for a good or a bad completion.

    Args:
        dataset: Pairs in TRL's preference format. Without a column `prompt`, the prompt is the common beginning of
            `chosen` and `rejected`.
        model: A causal language model, or its name.
        contrastive: `"harmless"`, `"helpful"`, or your own `ContrastivePrompts`.
        tokenizer: The model's tokenizer. `None` loads it by the model's name.
        batch_size: Texts per forward pass.
        max_prompt_length: Longest contrastive prompt in tokens. `None` means no limit.
        max_completion_length: Longest completion in tokens. Longer ones are truncated before they are scored.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        device: Device of the model. `None` means this process's accelerator, or the CPU without one.
        model_init_kwargs: Keyword arguments to load the model by name.

    Returns:
        The pairs with `self_reward`, `chosen_logps` and `rejected_logps`, as from `generate_contrastive_pairs`, which
        drops pairs for the same reasons.

    Raises:
        ValueError: If every pair is dropped.
    """
    self_reward = SelfReward(
        model,
        tokenizer,
        contrastive,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        chat_template_kwargs=chat_template_kwargs,
        device=device,
        model_init_kwargs=model_init_kwargs,
    )
    pairs: list[dict[str, Any]] = []
    conversational = self_reward.renderer.tokenizer.chat_template is not None
    dataset = plain_rows(read_published(dataset, "preference", conversational))
    if len(dataset):
        check = pair_check(dataset[0], collate=lambda rows: list(map(ranked_row, rows)))
        check_rows("dataset", dataset, replace(check, read=lambda row: _drop_equal(row) or check.read(row)))
    rows = [preference_pair(row) for row in dataset]
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring pairs", leave=False):
        batch = rows[start : start + batch_size]
        batch = [{**row, "prompt": plain_prompt(row["prompt"])} for row in batch]
        fitting = [row for row in batch if self_reward.fits(row["prompt"], row.get("tools"))]
        completions = [(completion_text(row["chosen"]), completion_text(row["rejected"])) for row in fitting]
        tools = [row["tools"] for row in fitting] if "tools" in batch[0] else None
        pairs += _score_pairs(self_reward, [row["prompt"] for row in fitting], completions, tools)
        pairs += [_TOO_LONG] * (len(batch) - len(fitting))
    return _as_dataset(pairs)


def _read_prompts(prompts: Dataset | Sequence[Prompt], self_reward: SelfReward) -> list[Prompt]:
    """Return prompts whose contents are texts, after checking all of them."""
    if isinstance(prompts, Dataset):
        conversational = self_reward.renderer.tokenizer.chat_template is not None
        prompts = read_published(prompts, "prompt-only", conversational)
        if any(prompts.with_format(None)["tools"] if "tools" in prompts.features else ()):
            raise ValueError("Pairs cannot be sampled with tools. Remove the column 'tools', or these rows.")
    return read_prompts(prompts, self_reward.fits)


def _sample_pairs(
    self_reward: SelfReward, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[dict[str, Any]]:
    """Sample and score the pairs of one batch of prompts."""
    fitting = [prompt for prompt in prompts if self_reward.fits(prompt)]
    completions: list[list[str]] = []
    if fitting:
        model, renderer = self_reward.model, self_reward.renderer
        prompt_ids = [renderer.prompt(text)[0] for prompt in fitting for text in self_reward.contrastive.apply(prompt)]
        # Under ZeRO-3, `generate` would wait for the other processes, which handle other numbers of batches.
        sampled = generate(model, prompt_ids, config, model.device, synced_gpus=False)
        groups = group_by_prompt(sampled, 2, renderer.eos_token_ids)
        completions = [renderer.decode(prompt, ids) for prompt, ids in zip(fitting, groups, strict=True)]
    return _score_pairs(self_reward, fitting, completions) + [_TOO_LONG] * (len(prompts) - len(fitting))


def _score_pairs(
    self_reward: SelfReward,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    tools: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
    """Return a row per pair: the pair with its self-reward, or the reason to drop it."""
    reasons = [_drop_reason(*pair) for pair in completions]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    logps = self_reward.logps(
        [prompts[index] for index in kept for _ in completions[index]],
        [text for index in kept for text in completions[index]],
        *([] if tools is None else [[tools[index] for index in kept for _ in completions[index]]]),
    )
    rows: list[dict[str, Any]] = [{"dropped": reason} for reason in reasons if reason]
    for index, (chosen_logps, rejected_logps) in zip(kept, logps.view(-1, 2, 2).tolist(), strict=True):
        prompt, (chosen, rejected) = prompts[index], completions[index]
        score = (chosen_logps[0] - chosen_logps[1]) - (rejected_logps[0] - rejected_logps[1])
        row = {
            "prompt": prompt,
            "chosen": as_completion(prompt, chosen),
            "rejected": as_completion(prompt, rejected),
            "self_reward": score,
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
        }
        rows.append(row if math.isfinite(score) else {"dropped": "not_finite"})
    return rows


def _drop_equal(row: Mapping[str, Any]) -> bool:
    return bool(row["chosen"] == row["rejected"])


def _drop_reason(chosen: str, rejected: str) -> str | None:
    if not (chosen.strip() and rejected.strip()):
        return "empty_reply"
    return "equal_replies" if chosen == rejected else None


def _as_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    kept = [row for row in rows if "dropped" not in row]
    reasons = [str(row["dropped"]) for row in rows if "dropped" in row]
    report = f"{len(rows)} prompts, {len(kept)} kept; {dropped_rows(reasons)}"
    if not kept:
        raise ValueError(f"Every pair was dropped: {report}.")
    return Dataset.from_list(kept, info=DatasetInfo(description=report))


def _processes() -> tuple[int, int]:
    """Return the index of this process and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _open_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Create the folder with its settings, or check that an existing one has the same settings."""
    path = folder / _SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = ", ".join(name for name in settings if stored.get(name) != settings[name])
        if changed:
            raise ValueError(
                f"{folder} contains pairs that were generated with another {changed}. Choose another output_dir, or "
                "remove the folder."
            )
    _write_json(path, settings)
    return folder


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
