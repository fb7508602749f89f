"""`Aligner`: a trained aligner that corrects answers."""

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
from ..models.loading import hub_kwargs, load_causal_lm, loading, place_model
from ..models.special_text import TextEncoder
from ..types import Prompt
from .aligner_template import AlignerTemplate, make_template

logger = logging.getLogger(__name__)

# The paper's values, except for the penalty. The paper uses a frequency penalty of 1.2, which transformers lacks. The
# closest is a repetition penalty on the correction alone. Applied to the prompt too, as `generate` does, it would
# penalise the very words of the answer that the correction should keep.
ALIGNER_SAMPLING: Mapping[str, Any] = {
    "do_sample": True, "temperature": 0.3, "top_p": 0.95, "top_k": 10, "repetition_penalty": 1.2
}  # fmt: skip


class Aligner:
    """Correct answers with a trained aligner (arXiv 2402.02416).

    Each call samples from `seed` and leaves the global random state unchanged, so equal batches get equal corrections.
    Calls from several threads take turns.

    Args:
        model: The model, on the device it should run on.
        tokenizer: Its tokenizer.
        template: Template that the model was trained with: a name (`"labels"`, `"instruction"`, `"conversation"`), a
            text or an `AlignerTemplate`.
        batch_size: Number of answers to correct at once.
        max_new_tokens: Maximum length of a correction. Defaults to half of the model's positions, but no more than
            2048. Question and answer share the other positions.
        generation_kwargs: Fields of `GenerationConfig` that override the default sampling, such as
            `{"do_sample": False}`. The defaults are temperature 0.3, top-p 0.95, top-k 10 and a repetition penalty of
            1.2 on the correction alone.
        seed: Seed for sampling.

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
        overrides = dict(generation_kwargs or {})
        # Greedy decoding takes none of the sampling defaults, and no penalty either.
        self.sampling = {**(ALIGNER_SAMPLING if overrides.get("do_sample", True) else {}), **overrides}
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
        """Load an aligner, either a full model or a PEFT adapter.

        Args:
            name_or_path: Folder, or name on the Hub.
            template: Template to use in place of the one that was saved with the model. Required if there is none.
            device: Device to run on. Defaults to the accelerator of this process if there is one, else the CPU. Leave
                it unset if `model_init_kwargs` have a `device_map`.
            model_init_kwargs: Keyword arguments for loading the model (`dtype`, `revision`, ...).
            kwargs: Further arguments of `Aligner`.

        Raises:
            ValueError: If the model has no saved template and `template` is not given.
        """
        name = str(name_or_path)
        if template is None:
            source = hub_kwargs(model_init_kwargs or {})
            del source["trust_remote_code"]
            with loading(name):
                template = AlignerTemplate.load(name, **source)
        if template is None:
            raise ValueError(
                f"{name} has no saved aligner template. Pass the one that it was trained with as `template`: a name, "
                "or a text with {question} and {answer}."
            )
        model, tokenizer = load_causal_lm(name, init_kwargs=model_init_kwargs)
        place_model(model, name, device)
        return cls(model, tokenizer, template, **kwargs)

    def correct(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        """Correct one answer to each prompt.

        An answer is returned unchanged if its correction is empty or unfinished after `max_new_tokens`, or if the
        answer is too long for the model; a warning is logged the first time. A question that is too long loses its
        beginning. White space around an answer is kept.

        Args:
            prompts: Prompts, as texts or messages.
            answers: One answer per prompt.

        Returns:
            The corrected answers.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"Each prompt needs one answer, got {len(prompts)} prompts and {len(answers)} answers.")
        generator = self.generator
        encoder = TextEncoder(generator.tokenizer)
        encoded = [
            self.template.encode(encoder, prompt, answer.strip(), generator.max_prompt_length)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        generated = generator.generate([ids for ids in encoded if ids is not None], self.sampling, self.seed)
        decoded = [self._decode(ids) for ids in generated]
        if too_long := len(encoded) - len(generated):
            limit = generator.max_prompt_length
            self._warn_uncorrected("too long", f"{too_long} answers do not fit into {limit} tokens", "Lower")
        if unfinished := decoded.count(None):
            limit = generator.max_new_tokens
            self._warn_uncorrected(
                "unfinished", f"{unfinished} corrections were not finished in {limit} tokens", "Raise"
            )
        remaining = iter(decoded)
        corrections = [None if ids is None else next(remaining) for ids in encoded]
        return [
            answer if correction is None else _with_whitespace_of(answer, correction)
            for answer, correction in zip(answers, corrections, strict=True)
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the model or adapter, the tokenizer and the template."""
        self.generator.model.save_pretrained(folder)
        self.generator.tokenizer.save_pretrained(folder)
        self.template.save(folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Publish the model or adapter, the tokenizer and the template in one commit.

        This leaves the model card alone. `AlignerTrainer.push_to_hub` writes one.

        Args:
            repo_id: Repository to publish to, created if missing.
            private: Whether a new repository is private.
            token: Token with write access. Defaults to the one of `hf auth login`.
            commit_message: Message of the commit.

        Returns:
            The address of the repository.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            # PEFT writes a card of its own, which would replace a better one in the repository.
            Path(folder, "README.md").unlink(missing_ok=True)
            api.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message or "Upload aligner"
            )
        return str(repository)

    def _decode(self, ids: list[int]) -> str | None:
        """Return the text of a correction, or `None` if it is unfinished or empty."""
        if not ids or ids[-1] not in self.generator.eos_token_ids:
            return None
        return self.generator.tokenizer.decode(ids[:-1], skip_special_tokens=True).strip() or None

    def _warn_uncorrected(self, kind: str, reason: str, verb: str) -> None:
        self._once.warning(
            kind, "%s, so these answers stay unchanged. %s max_new_tokens if there are many.", reason, verb
        )


def _with_whitespace_of(answer: str, correction: str) -> str:
    """Return the correction with the white space around the answer, such as a leading space."""
    stripped = answer.strip()
    before, _, after = answer.partition(stripped) if stripped else ("", "", "")
    return f"{before}{correction}{after}"
