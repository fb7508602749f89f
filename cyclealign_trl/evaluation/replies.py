"""Collect the replies of models to prompts, each at most once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..aligner.upstreams import Upstream, finish_reason_of
from ..data.hh_rlhf import cut_at_role_tag
from ..errors import PromptError
from ..models.batches import longest_first
from ..models.model_pool import ModelPool
from ..types import Prompt, valid_text
from .markdown_table import printable
from .prompts import EvaluationPrompt
from .row_file import KEY, RowFile
from .sources import ReplySettings, ReplySource, match_key

# Reasons of an endpoint for which the same prompt would fail again
_LASTING = ("content_filter", "context_length_exceeded")


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a model to a prompt.

    Args:
        prompt_id: `EvaluationPrompt.id` of the prompt.
        completion: The reply, empty if it failed.
        finish_reason: `"stop"`; `"length"` if the reply reached its token limit; or why an endpoint refused to write
            it or to finish it.
    """

    prompt_id: str
    completion: str
    finish_reason: str = "stop"

    @property
    def failed(self) -> bool:
        """Whether there is no reply."""
        return not self.completion and self.finish_reason in _LASTING


def collect_replies(
    sources: Sequence[ReplySource],
    prompts: Sequence[EvaluationPrompt],
    output_dir: str | PathLike[str],
    settings: ReplySettings | None = None,
) -> dict[str, list[Reply]]:
    """Collect the reply of each source to each prompt.

    Replies are appended to `output_dir/replies/NAME.jsonl` as soon as their batch is finished, and read from there if
    the evaluation runs again. Models are loaded one at a time, and only if one of their replies is missing. Adapters
    over the same base share it.

    Args:
        sources: Sources with distinct names.
        prompts: Prompts.
        output_dir: Folder of the files.
        settings: How to generate.

    Returns:
        One reply per prompt, by the name of the source.

    Raises:
        ValueError: If two sources have the same name, stored replies have other settings, or a source cannot answer a
            prompt for another reason than its content.
        UpstreamError: If an endpoint does not answer. Replies received before are stored.
    """
    settings = settings or ReplySettings()
    ordered = _with_upstreams(sources, settings)
    names = [source.name for source in ordered]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several models have the name {repeated[0]!r}. Name them apart with LABEL=MODEL.")
    # Check all stored settings before the first model is loaded.
    files = {source.name: _open_file(source, Path(output_dir), settings) for source in ordered}
    pool = ModelPool(settings.device, settings.model_init_kwargs)
    collected: dict[str, dict[str, Reply]] = {}
    for source in ordered:
        collected[source.name] = _collect(source, prompts, files[source.name], settings, pool, collected)
    pool.free()
    return {source.name: [collected[source.name][prompt.id] for prompt in prompts] for source in sources}


def file_name(name: str) -> str:
    """Return a name for files of a model, distinct for distinct names."""
    safe = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:80]
    return safe if safe and safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _with_upstreams(sources: Sequence[ReplySource], settings: ReplySettings) -> list[ReplySource]:
    """Return the sources and those that they correct, in an order in which they can be collected.

    A source that is corrected, and also one of the given ones, is collected once. Sources of the same base come one
    after another.
    """
    found = {_identify(source, settings): source for source in reversed(sources)}
    chain = [*sources]
    for source in chain:
        if source.upstream is not None:
            source.upstream = found.setdefault(_identify(source.upstream, settings), source.upstream)
            chain.append(source.upstream)
    distinct = list(dict.fromkeys([*sources, *found.values()]))
    bases = list(dict.fromkeys(source.base for source in distinct))
    return sorted(distinct, key=lambda source: (_depth(source), bases.index(source.base)))


def _identify(source: ReplySource, settings: ReplySettings) -> str:
    return json.dumps([type(source).__name__, source.identity(settings)], sort_keys=True)


def _depth(source: ReplySource) -> int:
    return 0 if source.upstream is None else 1 + _depth(source.upstream)


def _open_file(source: ReplySource, output_dir: Path, settings: ReplySettings) -> RowFile:
    return RowFile(output_dir / "replies" / f"{file_name(source.name)}.jsonl", source.identity(settings))


def _collect(
    source: ReplySource,
    prompts: Sequence[EvaluationPrompt],
    file: RowFile,
    settings: ReplySettings,
    pool: ModelPool,
    collected: Mapping[str, Mapping[str, Reply]],
) -> dict[str, Reply]:
    """Return the replies of a source by the ids of their prompts, and generate those that the file does not have."""
    upstream_replies: dict[str, str] = {}
    failed: dict[str, Reply] = {}
    if source.upstream is not None:
        for prompt in prompts:
            reply = collected[source.upstream.name][prompt.id]
            upstream_replies[match_key(prompt.prompt)] = reply.completion
            if reply.failed:
                failed[prompt.id] = reply
    asked = [prompt for prompt in prompts if prompt.id not in failed]
    missing = [prompt for prompt in asked if prompt.id not in file.rows]
    if missing:
        progress = tqdm(
            total=len(asked), initial=len(asked) - len(missing), desc=f"Replies of {printable(source.name)}",
            disable=None,
        )  # fmt: skip
        with progress, source.open(settings, pool, upstream_replies) as upstream:
            batches = _missing_batches(asked, upstream.batch_size, file.rows)
            with closing(_answer(upstream, batches)) as answered:
                for batch, answers in answered:
                    file.append(
                        _row(prompt, answer, source.is_generated)
                        for prompt, answer in zip(batch, answers, strict=True)
                    )
                    progress.update(len(batch))
    rows = {prompt.id: file.rows[prompt.id] for prompt in asked}
    return failed | {key: Reply(key, row["completion"], row["finish_reason"]) for key, row in rows.items()}


def _missing_batches(
    prompts: Sequence[EvaluationPrompt], batch_size: int, stored: Mapping[str, Any]
) -> list[list[EvaluationPrompt]]:
    """Return the prompts without a stored reply in batches, the longest first.

    The batches do not depend on what is stored, so that a resumed run computes the same numbers as an uninterrupted
    one.
    """
    lengths = [len(match_key(prompt.prompt)) for prompt in prompts]
    batches = ([prompts[index] for index in batch] for batch in longest_first(lengths, batch_size))
    missing = ([prompt for prompt in batch if prompt.id not in stored] for batch in batches)
    return [batch for batch in missing if batch]


def _answer(
    upstream: Upstream, batches: Sequence[list[EvaluationPrompt]]
) -> Generator[tuple[list[EvaluationPrompt], list[str | PromptError]]]:
    """Yield batches and their answers as they arrive.

    If an answer fails, those of the calls in flight are yielded before the error is raised, because they are paid for.
    """
    if upstream.max_concurrency == 1:
        for batch in batches:
            yield batch, _answer_batch(upstream, [prompt.prompt for prompt in batch])
        return
    error: BaseException | None = None
    waiting, pending = iter(batches), dict[Future[list[str | PromptError]], list[EvaluationPrompt]]()
    with ThreadPoolExecutor(upstream.max_concurrency, thread_name_prefix="cyclealign-replies") as executor:
        while True:
            while error is None and len(pending) < upstream.max_concurrency and (batch := next(waiting, [])):
                pending[executor.submit(_answer_batch, upstream, [prompt.prompt for prompt in batch])] = batch
            if not pending:
                break
            try:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as interrupt:
                if error is not None:
                    raise
                error = interrupt
                continue
            for future in done:
                batch = pending.pop(future)
                if (failure := future.exception()) is not None:
                    error = error or failure
                else:
                    yield batch, future.result()
    if error is not None:
        raise error


def _answer_batch(upstream: Upstream, prompts: Sequence[Prompt]) -> list[str | PromptError]:
    """Answer prompts. What an endpoint never answers, because of its content, becomes the error."""
    try:
        return list(upstream(prompts))
    except PromptError as error:
        if error.code not in _LASTING:
            raise
        if len(prompts) == 1:
            return [error]
    return [answer for prompt in prompts for answer in _answer_batch(upstream, [prompt])]


def _row(prompt: EvaluationPrompt, answer: str | PromptError, is_generated: bool) -> dict[str, Any]:
    columns = {KEY: prompt.id, "group": prompt.group, "prompt": prompt.prompt}
    if isinstance(answer, PromptError):
        return {**columns, "completion": "", "finish_reason": answer.code}
    text = valid_text(str(answer))
    if is_generated:
        # A plain-text prompt and its completion are joined as they are, so the completion keeps its first space.
        before = text[: len(text) - len(text.lstrip())] if isinstance(prompt.prompt, str) else ""
        reply = cut_at_role_tag(text)
        text = before + reply if reply else ""
    return {**columns, "completion": text, "finish_reason": finish_reason_of(answer)}
