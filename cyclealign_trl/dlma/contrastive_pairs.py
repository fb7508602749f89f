"""DLMA's data (arXiv 2402.11907): a model's own replies under contrastive prompts, with its own opinion of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetInfo
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from .._files import atomic_write
from ..data.drop_reports import dropped_rows
from ..data.formats import completion_text
from ..models.generation_backend import group_by_prompt, seeded
from ..models.loading import digest_weights
from ..models.transformers_backend import generate
from ..rankers.contrastive_prompts import ContrastivePrompts
from ..rankers.self_reward import SelfReward
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
    """Has a model reply to each prompt as well and as badly as it can, and say how much better the one is.

    Each prompt gets one reply under the positive prompt, `chosen`, and one under the negative, `rejected`, and their
    self-reward under the same two prompts (see `add_self_rewards`). Nothing is swapped where it is negative: the loss
    sees to that. Left out, and counted in `info.description`: prompts that are too long with what they ask for, and
    pairs with an empty reply, with equal replies, or without a finite self-reward.

    Where several processes run, each replies to a share of the prompts, and all return the whole.

    Args:
        model: A causal language model, or its name.
        prompts: The prompts, or a data set with a column `prompt`: text or messages.
        contrastive: What a good and a bad reply are: `"harmless"`, `"helpful"`, or `ContrastivePrompts` of your own.
        tokenizer: The model's tokenizer. `None` loads the one of the model's name.
        output_dir: Folder for finished batches. A call that was interrupted goes on there, and ends with the same
            pairs. Needed where several processes run.
        batch_size: Prompts at once.
        max_prompt_length: Longest contrastive prompt in tokens; `None` for no limit.
        max_completion_length: Longest reply in tokens.
        temperature: Sampling temperature.
        generation_kwargs: Further fields of `GenerationConfig`.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        seed: Seed of the sampling; the global random state is left as it was.
        device: Where the model runs. `None` means this process's accelerator, or the CPU where there is none.
        model_init_kwargs: Keyword arguments for loading the model by name.

    Returns:
        TRL's preference format: `prompt`, `chosen`, `rejected`; with `self_reward`, and the log-likelihoods that it
        is made of, `chosen_logps` and `rejected_logps`, each under the positive and under the negative prompt.

    Raises:
        ValueError: If there are no prompts, no pair is left, or `output_dir` holds pairs of other prompts, of another
            model or with other settings.
    """
    prompts = list(prompts["prompt"]) if isinstance(prompts, Dataset) else list(prompts)
    if not prompts:
        raise ValueError("There are no prompts to reply to.")
    rank, num_processes = _processes()
    if num_processes > 1 and output_dir is None:
        raise ValueError(f"{num_processes} processes take an output_dir, in which they find each other's pairs.")
    self_reward = SelfReward.load(
        model,
        tokenizer,
        contrastive,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length + 1,  # the end-of-sequence token of one that ran out of room
        chat_template_kwargs=chat_template_kwargs,
        device=device,
        model_init_kwargs=model_init_kwargs,
    )
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
    done: dict[int, list[dict[str, Any]]] = {}
    for index in tqdm(own, desc="Generating contrastive pairs", disable=rank > 0 or len(own) < 2, leave=False):
        path = None if folder is None else folder / f"batch-{index:06d}.json"
        if path is not None and path.exists():
            continue
        config = GenerationConfig(
            **sampling,
            max_new_tokens=max_completion_length,
            eos_token_id=list(self_reward.renderer.eos_token_ids),
            pad_token_id=self_reward.renderer.tokenizer.pad_token_id,
        )
        with seeded(seed + index, self_reward.model.device):
            done[index] = _pairs(self_reward, batches[index], config)
        if path is not None:
            _write(path, done[index])
    if num_processes > 1:
        torch.distributed.barrier()
    if folder is not None:
        done = {i: json.loads((folder / f"batch-{i:06d}.json").read_text("utf-8")) for i in range(len(batches))}
    return _as_dataset([pair for index in range(len(batches)) for pair in done[index]])


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
    """Adds to preference pairs what a model itself thinks of them.

    The self-reward of a pair is `[log p(chosen | good) - log p(chosen | bad)] - [log p(rejected | good) -
    log p(rejected | bad)]`, sums over tokens, with the prompt asking for a good and for a bad reply.

    Args:
        dataset: TRL's preference data, with `prompt` or with the prompt as what both begin with.
        model: A causal language model, or its name.
        contrastive: What a good and a bad reply are: `"harmless"`, `"helpful"`, or `ContrastivePrompts` of your own.
        tokenizer: The model's tokenizer. `None` loads the one of the model's name.
        batch_size: Texts in one forward pass.
        max_prompt_length: Longest contrastive prompt in tokens; `None` for no limit.
        max_completion_length: Longest completion in tokens. A longer one is scored up to there.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        device: Where the model runs. `None` means this process's accelerator, or the CPU where there is none.
        model_init_kwargs: Keyword arguments for loading the model by name.

    Returns:
        The pairs with `self_reward`, `chosen_logps` and `rejected_logps`, as `generate_contrastive_pairs` makes them.

    Raises:
        ValueError: If no pair is left; the same pairs are left out.
    """
    self_reward = SelfReward.load(
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
    rows = [maybe_extract_prompt(dict(row)) for row in dataset]
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring pairs", leave=False):
        batch = rows[start : start + batch_size]
        fitting = [row for row in batch if self_reward.fits(row["prompt"])]
        replies = [[completion_text(row["chosen"]), completion_text(row["rejected"])] for row in fitting]
        pairs += _score(self_reward, [row["prompt"] for row in fitting], replies)
        pairs += [_TOO_LONG] * (len(batch) - len(fitting))
    return _as_dataset(pairs)


def _pairs(self_reward: SelfReward, prompts: Sequence[Prompt], config: GenerationConfig) -> list[dict[str, Any]]:
    """Samples a batch's replies, and scores them."""
    fitting = [prompt for prompt in prompts if self_reward.fits(prompt)]
    replies: list[list[str]] = []
    if fitting:
        model, renderer = self_reward.model, self_reward.renderer
        asking = [renderer.prompt(text)[0] for prompt in fitting for text in self_reward.contrastive.apply(prompt)]
        # Each process at its own pace: under ZeRO-3, too, where generating would else wait for all of them.
        generated = generate(model, asking, config, model.device, synced_gpus=False)
        completion_ids = group_by_prompt(generated, 2, renderer.eos_token_ids)
        replies = [renderer.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in completion_ids]
    return _score(self_reward, fitting, replies) + [_TOO_LONG] * (len(prompts) - len(fitting))


def _score(
    self_reward: SelfReward, prompts: Sequence[Prompt], replies: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The pairs that can be trained on with their self-rewards, and of the others, why not."""
    reasons = [_unusable(*pair) for pair in replies]
    kept = [(prompt, pair) for prompt, pair, reason in zip(prompts, replies, reasons, strict=True) if not reason]
    logps = self_reward.logps(
        [prompt for prompt, pair in kept for _ in pair], [reply for _, pair in kept for reply in pair]
    )
    pairs: list[dict[str, Any]] = [{"dropped": reason} for reason in reasons if reason]
    for (prompt, (chosen, rejected)), (for_chosen, for_rejected) in zip(
        kept, logps.view(-1, 2, 2).tolist(), strict=True
    ):
        score = (for_chosen[0] - for_chosen[1]) - (for_rejected[0] - for_rejected[1])
        pair = {
            "prompt": prompt,
            "chosen": as_completion(prompt, chosen),
            "rejected": as_completion(prompt, rejected),
            "self_reward": score,
            "chosen_logps": for_chosen,
            "rejected_logps": for_rejected,
        }
        pairs.append(pair if math.isfinite(score) else {"dropped": "not_finite"})
    return pairs


def _unusable(chosen: str, rejected: str) -> str | None:
    if not (chosen.strip() and rejected.strip()):
        return "empty_reply"
    return "equal_replies" if chosen == rejected else None


def _as_dataset(pairs: Sequence[Mapping[str, Any]]) -> Dataset:
    kept = [pair for pair in pairs if "dropped" not in pair]
    dropped = Counter(str(pair["dropped"]) for pair in pairs if "dropped" in pair)
    report = f"{len(pairs)} prompts, {len(kept)} kept; {dropped_rows(dropped)}"
    if not kept:
        raise ValueError(f"No pair is left of {report}.")
    return Dataset.from_list(kept, info=DatasetInfo(description=report))


def _processes() -> tuple[int, int]:
    """This process's index, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _open_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    given = json.loads(json.dumps(settings))
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        changed = ", ".join(name for name in given if there.get(name) != given[name])
        if changed:
            raise ValueError(
                f"{folder} holds pairs that were made with another {changed}. Choose another output_dir, or remove it."
            )
    _write(path, given)
    return folder


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
