"""How a question and an answer become the text that an aligner corrects: one template for training and inference."""

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

from ..types import Prompt

TEMPLATE_FILE = "aligner_template.json"
_PLACEHOLDERS = ("{question}", "{answer}")


@dataclass(frozen=True, slots=True)
class AlignerTemplate:
    """A text with `{question}` and `{answer}`, each once; the correction follows it directly.

    Whatever stands in a question or an answer stays as it is: braces in them mean nothing.

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
                    f"An aligner's template has {placeholder} exactly once; {self.text!r} has it {found} times. Its "
                    f"name is one of {', '.join(map(repr, TEMPLATES))}, or it is a text of your own."
                )

    def render(self, question: str, answer: str) -> str:
        """The text for one question and one answer."""
        values = dict(zip(_PLACEHOLDERS, (question, answer), strict=True))
        # Once over the template, never over what was put in.
        return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], self.text)

    def encode(
        self, tokenizer: Any, prompt: Prompt, answer: str, max_length: int | None = None
    ) -> list[int] | None:  # the tokenizer is a transformers.PreTrainedTokenizerBase
        """Token ids of the text. What is too long loses the beginning of its question, and nothing of its answer.

        Args:
            tokenizer: The aligner's tokenizer.
            prompt: The prompt that was answered.
            answer: The answer.
            max_length: In tokens; `None` for no limit.

        Returns:
            The ids, or `None` where the text is too long even without a question.
        """
        question = render_question(prompt)
        question_ids = _tokenize(tokenizer, question)
        ids, start = _tokenize(tokenizer, self.render(question, answer), special=True), 0
        while max_length is not None and len(ids) > max_length:
            if start >= len(question_ids):
                return None
            start += len(ids) - max_length
            ids = _tokenize(tokenizer, self.render(tokenizer.decode(question_ids[start:]), answer), special=True)
        return ids

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the template beside a model."""
        text = json.dumps({"text": self.text}, ensure_ascii=False, indent=2)
        Path(folder, TEMPLATE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], **source: Any) -> AlignerTemplate | None:
        """Reads the template that lies beside a model, in a folder or on the Hub; `None` where none does.

        Args:
            name_or_path: The model.
            source: Arguments of `hf_hub_download`, such as `revision`.

        Raises:
            OSError: If the Hub cannot be asked.
        """
        path = Path(name_or_path, TEMPLATE_FILE)
        if not Path(name_or_path).is_dir():
            try:
                path = Path(hf_hub_download(str(name_or_path), TEMPLATE_FILE, **source))
            except RemoteEntryNotFoundError:
                return None
            except LocalEntryNotFoundError as error:  # which does not say of what
                raise OSError(f"The template of {name_or_path} cannot be loaded: {error}") from error
        return cls(json.loads(path.read_text(encoding="utf-8"))["text"]) if path.is_file() else None


# The three published variants in idea; the wording is ours.
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


def make_template(template: str | AlignerTemplate) -> AlignerTemplate:
    """The template of a name (`"labels"`, `"instruction"`, `"conversation"`) or of a text with both placeholders."""
    return template if isinstance(template, AlignerTemplate) else AlignerTemplate(TEMPLATES.get(template, template))


def render_question(prompt: Prompt) -> str:
    """A prompt as one text: a plain one as it is, a lone user's message as its content, else all turns with roles.

    Example:
        >>> render_question([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'User: Hi\\n\\nAssistant: Hello'
    """
    if isinstance(prompt, str):
        return prompt.strip()
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"].strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in prompt)


def _tokenize(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    # Not verbose: a text beyond the model's length is no reason to warn where it is about to be cut.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
