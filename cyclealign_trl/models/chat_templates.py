"""Chat templates of files and of other models."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .loading import loading
from .renderer import Turn, read_turn

_SUFFIXES = (".jinja", ".jinja2", ".j2")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Set the chat template of a tokenizer, and return it.

    No token is added to the tokenizer. A model that should learn the special tokens of another model's template needs
    embeddings for them: `trl.clone_chat_template` adds both.

    Args:
        tokenizer: The tokenizer.
        source: As in `read_chat_template`.

    Raises:
        OSError: If there is no such file, folder or model.
        ValueError: If the model has no chat template, or the template is invalid or does not show the messages of a
            conversation.
    """
    template = read_chat_template(source)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template {_short(source)} is not a Jinja template: line {error.lineno}: {error.message}"
        ) from error
    except (TemplateError, TypeError, ValueError):
        pass  # templates can require other messages, which `read_turn` tries
    tokenizer.chat_template = template
    if read_turn(tokenizer) == Turn():
        raise ValueError(
            f"chat_template {_short(source)} does not show the messages of a conversation. It gets `messages`, a list "
            "of `role` and `content`, and `add_generation_prompt`."
        )
    return template


def read_chat_template(source: str) -> str:
    """Return a chat template.

    Args:
        source: A Jinja file, the name or folder of a model with a chat template, or the text of a template.

    Raises:
        OSError: If there is no such file, folder or model.
        ValueError: If the model has no chat template.
    """
    if "{{" in source or "{%" in source:
        return source
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in _SUFFIXES:
        raise FileNotFoundError(f"There is no file {source} (chat_template).")
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {source} has no chat template (chat_template). Name another model.")
    return str(tokenizer.get_chat_template())


def _short(source: str) -> str:
    return repr(source if len(source) <= 60 else f"{source[:60]}...")
