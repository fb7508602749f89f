"""Templates that turn a question and an answer into the prompt of an aligner, in training and in inference."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ..models.special_text import TextEncoder
from ..types import Prompt

# The ideas of the three published variants, in our own words. A trained aligner keeps its template in a file of its
# own, so a change here only affects aligners that are trained later.
TEMPLATES: Mapping[str, str] = {
    "labels": "## Question\n{question}\n\n## Answer\n{answer}\n\n## Correction\n",
    "instruction": (
        "Edit this answer to a question so that it helps more and harms nobody, and change nothing that is good. "
        "{question} | {answer} | Edited answer:"
    ),
    "conversation": (
        "A conversation between a user and an editor. USER: Edit this answer to a question so that it helps more and "
        "harms nobody, and change nothing that is good. Question: {question} Answer: {answer} ASSISTANT:"
    ),
}
DEFAULT_TEMPLATE = "labels"
TEMPLATE_FILE = "aligner_template.json"
_PLACEHOLDERS = ("{question}", "{answer}")


@dataclass(frozen=True, slots=True)
class AlignerTemplate:
    """Text with `{question}` and `{answer}`, each exactly once. The correction follows it directly.

    Questions and answers are inserted literally: braces in them have no meaning.

    Args:
        text: The text.

    Raises:
        ValueError: If a placeholder is missing or repeated.

    Example:
        >>> AlignerTemplate("Q: {question} A: {answer} Better:").render("Why?", "{question}")
        'Q: Why? A: {question} Better:'
    """

    text: str

    def __post_init__(self) -> None:
        for placeholder in _PLACEHOLDERS:
            if (found := self.text.count(placeholder)) != 1:
                raise ValueError(
                    f"An aligner template must contain {placeholder} exactly once, but {self.text!r} contains it "
                    f"{found} times. Pass one of {', '.join(map(repr, TEMPLATES))}, or a text of your own."
                )

    def render(self, question: str, answer: str) -> str:
        """Return the template with the question and the answer inserted."""
        values = dict(zip(_PLACEHOLDERS, (question, answer), strict=True))
        # One pass over the template, so that a placeholder inside the question or the answer stays as it is.
        return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], self.text)

    def encode(
        self, tokenizer: Any, prompt: Prompt, answer: str, max_length: int | None = None
    ) -> list[int] | None:  # the tokenizer is a transformers.PreTrainedTokenizerBase
        """Return the token ids of the rendered template.

        If they are more than `max_length`, the question loses its beginning. The answer is never truncated.

        Args:
            tokenizer: Tokenizer of the aligner, or a `TextEncoder` of it.
            prompt: Prompt that was answered.
            answer: The answer.
            max_length: Maximum number of tokens, or `None` for no limit.

        Returns:
            The ids, or `None` if the text is too long even without a question.
        """
        encoder = tokenizer if isinstance(tokenizer, TextEncoder) else TextEncoder(tokenizer)
        question = render_question(prompt)
        question_ids = encoder.encode(encoder.mark(question))
        ids, start = self._encode(encoder, question, answer), 0
        # Truncating can change how the rest is tokenised, so check again until the text fits.
        while max_length is not None and len(ids) > max_length:
            if start >= len(question_ids):
                return None
            start += len(ids) - max_length
            ids = self._encode(encoder, encoder.tokenizer.decode(question_ids[start:]), answer)
        return ids

    def encode_correction(self, encoder: TextEncoder, correction: str) -> list[int]:
        """Return the token ids of a correction after the rendered template, without an end-of-sequence token."""
        tail = re.split("|".join(map(re.escape, _PLACEHOLDERS)), self.text)[-1]
        return encoder.encode_after(tail, encoder.mark(correction))

    def _encode(self, encoder: TextEncoder, question: str, answer: str) -> list[int]:
        return [*encoder.opening, *encoder.encode(self.render(encoder.mark(question), encoder.mark(answer)))]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the template to `aligner_template.json` in the folder of a model."""
        text = json.dumps({"text": self.text}, ensure_ascii=False, indent=2)
        Path(folder, TEMPLATE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], **source: Any) -> AlignerTemplate | None:
        """Load the template that was saved with a model, from a folder or the Hub.

        Args:
            name_or_path: Name or path of the model.
            source: Keyword arguments for `hf_hub_download`, such as `revision`.

        Returns:
            The template, or `None` if the model has none.

        Raises:
            OSError: If the Hub cannot be reached.
        """
        path = Path(name_or_path, TEMPLATE_FILE)
        if not Path(name_or_path).is_dir():
            try:
                path = Path(hf_hub_download(str(name_or_path), TEMPLATE_FILE, **source))
            except RemoteEntryNotFoundError:
                return None
            except LocalEntryNotFoundError as error:  # its message does not name the model
                raise OSError(f"The aligner template of {name_or_path} cannot be loaded: {error}") from error
        return cls(json.loads(path.read_text(encoding="utf-8"))["text"]) if path.is_file() else None


def make_template(template: str | AlignerTemplate) -> AlignerTemplate:
    """Return the template with this name (a key of `TEMPLATES`) or this text."""
    return template if isinstance(template, AlignerTemplate) else AlignerTemplate(TEMPLATES.get(template, template))


def render_question(prompt: Prompt) -> str:
    """Return a prompt as one text.

    A plain prompt is its own text, and a single user message is its content. Longer conversations are written out
    with their roles.

    Example:
        >>> render_question([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'User: Hi\\n\\nAssistant: Hello'
    """
    if isinstance(prompt, str):
        return prompt.strip()
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"].strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in prompt)
