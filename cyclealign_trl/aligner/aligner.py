"""`Aligner`: a model that corrects answers, whoever gave them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._warnings import OnceLogger
from ..models.batched_generator import BatchedGenerator
from ..models.loading import hub_kwargs, load_causal_lm, place_model
from ..types import Prompt
from .aligner_template import AlignerTemplate, make_template

logger = logging.getLogger(__name__)

# The paper's, but for the penalty: its frequency penalty (1.2) takes from a token's logit each time that the token has
# been written. transformers has none; closest is its repetition penalty over what was written alone. Over the prompt
# too, as `generate` applies it, it would punish the very words of the answer that are to be kept.
SAMPLING: Mapping[str, Any] = {
    "do_sample": True, "temperature": 0.3, "top_p": 0.95, "top_k": 10, "repetition_penalty": 1.2
}  # fmt: skip


class Aligner:
    """Corrects answers (arXiv 2402.02416), in the template that it was trained with.

    Equal questions and answers in equal batches get equal corrections: each call samples from `seed` on, and leaves
    the global random state alone. Calls from several threads take turns.

    Args:
        model: The model, moved to where it is to run.
        tokenizer: Its tokenizer.
        template: The template that it was trained with, by name (`"labels"`, `"instruction"`, `"conversation"`), text
            or object.
        batch_size: Answers corrected at once.
        max_new_tokens: Longest correction. `None`: half of the model's positions, at most 2048. The rest is for
            question and answer.
        generation_kwargs: Changes of how corrections are sampled, as fields of `GenerationConfig`:
            `{"do_sample": False}`, say. By default temperature 0.3, top-p 0.95, top-k 10, and a repetition penalty of
            1.2 over the correction alone.
        seed: Seed of the sampling.

    Example:
        ```python
        aligner = Aligner.from_pretrained("outputs/aligner")
        aligner.correct(["How do I keep basil alive?"], ["Basil is easy. Stop asking."])
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str | AlignerTemplate,
        *,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.template = make_template(template)
        self.generator = BatchedGenerator(model, tokenizer, batch_size, max_new_tokens)
        changes = dict(generation_kwargs or {})
        self.sampling = {**(SAMPLING if changes.get("do_sample", True) else {}), **changes}
        self.seed = seed
        self._once = OnceLogger(logger)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        template: str | AlignerTemplate | None = None,
        device: str | torch.device | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Aligner:
        """Loads what `AlignerTrainer` or `save_pretrained` wrote, a PEFT adapter included, or any other aligner.

        Args:
            name_or_path: A folder, or a name on the Hub.
            template: The template, for a model that has none beside it. It is stronger than one that is there.
            device: Where to run. `None`: this process's accelerator, else the CPU; or as a `device_map` says.
            model_init_kwargs: Keyword arguments for loading the model (`dtype`, `revision`, ...).
            kwargs: Further arguments of `Aligner`.

        Raises:
            ValueError: If no template is beside the model, and none was given.
        """
        name = str(name_or_path)
        if template is None:
            source = hub_kwargs(model_init_kwargs or {})
            del source["trust_remote_code"]
            template = AlignerTemplate.load(name, **source)
        if template is None:
            raise ValueError(
                f"Beside {name} lies no template, so how it was trained to read question and answer is not known. Say "
                "so with `template`: a name, or a text with {question} and {answer}."
            )
        model, tokenizer = load_causal_lm(name, init_kwargs=model_init_kwargs)
        place_model(model, name, device)
        return cls(model, tokenizer, template, **kwargs)

    def correct(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        """Corrects the answers to prompts.

        An answer stays as it is where the correction was empty or not finished within `max_new_tokens`, or where the
        answer itself is too long to be read; the first time, a warning says so. A question that is too long loses its
        beginning, an answer nothing. White space around an answer is kept.

        Args:
            prompts: The prompts, as texts or messages.
            answers: An answer to each.

        Returns:
            The corrected answers.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"There are {len(prompts)} prompts but {len(answers)} answers.")
        generator = self.generator
        encoded = [
            self.template.encode(generator.tokenizer, prompt, answer.strip(), generator.max_prompt_length)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        written = generator.generate([ids for ids in encoded if ids is not None], self.sampling, self.seed)
        finished = [self._finished(ids) for ids in written]
        if too_long := len(encoded) - len(written):
            room = generator.max_prompt_length
            self._warn_uncorrected("too long", f"{too_long} answers do not fit into {room} tokens", "Lower")
        if unfinished := finished.count(None):
            room = generator.max_new_tokens
            self._warn_uncorrected(
                "unfinished", f"{unfinished} corrections were not finished in {room} tokens", "Raise"
            )
        rest = iter(finished)
        texts = [None if ids is None else next(rest) for ids in encoded]
        return [
            answer if text is None else _with_space_of(answer, text)
            for answer, text in zip(answers, texts, strict=True)
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model or adapter, tokenizer and template."""
        self.generator.model.save_pretrained(folder)
        self.generator.tokenizer.save_pretrained(folder)
        self.template.save(folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Publishes model or adapter, tokenizer and template in one commit; returns the repository's address.

        `AlignerTrainer.push_to_hub` writes a card, too.

        Args:
            repo_id: Where to; made where it is missing.
            private: Whether a new repository is private.
            token: A token that may write; by default the one of `hf auth login`.
            commit_message: The commit's message.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # PEFT writes a card of its own, which must not take the place of a better one.
            Path(folder, "README.md").unlink(missing_ok=True)
            api.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message or "Upload aligner"
            )
        return str(repository)

    def _finished(self, ids: list[int]) -> str | None:
        """The text of a correction that came to its end and says something."""
        if not ids or ids[-1] not in self.generator.eos_token_ids:
            return None
        return self.generator.tokenizer.decode(ids, skip_special_tokens=True).strip() or None

    def _warn_uncorrected(self, kind: str, what: str, verb: str) -> None:
        self._once.warning(
            kind, "%s: these answers stay as they are. %s max_new_tokens if there are many.", what, verb
        )


def _with_space_of(answer: str, correction: str) -> str:
    """The correction with the white space around the answer: a completion of plain text often starts with one."""
    stripped = answer.strip()
    before, _, after = answer.partition(stripped) if stripped else ("", "", "")
    return f"{before}{correction}{after}"
