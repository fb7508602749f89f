"""The model card: how a model was trained, how to load it, its data and its metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

LIBRARY = "cyclealign-trl"
_LIBRARIES = (LIBRARY, "transformers", "torch", "trl", "datasets", "tokenizers")
_NOT_QUALITY = re.compile(
    r"(^|/|_)(runtime|\w+_per_second|\w+_time|(time|ranker|pool|completions|prompts|improved)/.*)$"
)


@dataclass(frozen=True, slots=True)
class Paper:
    """A method and its paper."""

    name: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        """Name of the method, linked to the paper."""
        return f"[{self.name}](https://arxiv.org/abs/{self.arxiv})"

    @property
    def bibtex(self) -> str:
        """BibTeX entry of the paper."""
        return (
            f"@article{{{self.name.lower()}{self.year},\n"
            f"  title   = {{{{{self.title}}}}},\n"
            f"  author  = {{{self.authors}}},\n"
            f"  year    = {{{self.year}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}}\n"
            "}"
        )


_TRL = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and \
Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Content of a model card.

    Args:
        name: Heading of the card.
        repo_id: Name that the model is loaded by.
        base_model: Model that was trained: a name on the Hub, or a folder, of which the card shows only the last part.
        is_adapter: Whether the model is a PEFT adapter.
        conversational: Whether its prompts are messages.
        papers: Papers of the methods, the one that the run is named after first.
        method: Sentence on the method, continuing "trained by".
        quick_start: Markdown on how to use the model. `None` shows how to use a language model.
        settings: Rows of the table of settings.
        data: Rows of the table of data sets.
        sections: Further Markdown sections.
        evaluation: Last value of each metric.
    """

    name: str
    repo_id: str
    base_model: str | None = None
    is_adapter: bool = False
    conversational: bool = False
    papers: Sequence[Paper] = ()
    method: str = ""
    quick_start: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[str] = ()
    evaluation: Mapping[str, float] = field(default_factory=dict)


def model_card(
    model: TrainedModel, *, datasets: Sequence[str] = (), tags: Sequence[str] = (), **data: Any
) -> ModelCard:
    """Return the card of a model.

    Args:
        model: Content of the card.
        datasets: Names of the data sets. Those on the Hub go into the metadata.
        tags: Further tags.
        **data: Further metadata, such as `license` and `language`.
    """
    hub_datasets = [name for name in datasets if hub_id(name)]
    own_tags = [LIBRARY, *(paper.name.lower() for paper in model.papers), "trl", "generated_from_trainer"]
    metadata = ModelCardData(
        base_model=hub_id(model.base_model),
        datasets=hub_datasets or None,
        library_name="peft" if model.is_adapter else "transformers",
        tags=[*own_tags, *tags],
        model_name=model.name,
        # The metadata attribute metrics to one data set, so they need exactly one.
        eval_results=_eval_results(model.evaluation, hub_datasets[0]) if len(hub_datasets) == 1 else None,
        **{"pipeline_tag": "text-generation", **data},
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{_text(model)}")


def evaluation_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last value of each quality metric that an evaluation logged, without `eval_`."""
    metrics: dict[str, float] = {}
    for logs in log_history:
        metrics |= {
            name.removeprefix("eval_"): float(value)
            for name, value in logs.items()
            if name.startswith("eval_") and not _NOT_QUALITY.search(name)
        }
    return metrics


def hub_id(name: str | None) -> str | None:
    """Return the name if it can be one on the Hub rather than a file or folder, else `None`."""
    if not name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
        return None
    return name


def public_name(name: str) -> str:
    """Return the name, of a path only the last part: cards must not show the folders of a machine."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.exists()
    return path.name if is_path else name


def hub_link(name: str, kind: str = "") -> str:
    """Return a link to a repository on the Hub, or the public name of a local model."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if hub_id(name) else f"`{public_name(name)}`"


def table(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> str:
    """Return a Markdown table with two columns."""
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _text(model: TrainedModel) -> str:
    parts = [
        f"# {model.name}",
        f"{_kind(model)}, trained by {model.method}",
        "## Quick start",
        _quick_start(model) if model.quick_start is None else model.quick_start,
        "## Training",
        table(model.settings),
        "## Data",
        table(model.data),
        *model.sections,
    ]
    if model.evaluation:
        values = {f"`{name}`": f"{value:.4g}" for name, value in model.evaluation.items()}
        parts += ["## Evaluation", "The last evaluation of the run.", table(values, ("metric", "value"))]
    libraries = (*_LIBRARIES, "peft") if model.is_adapter else _LIBRARIES
    versions = {name: version(name) for name in libraries}
    parts += ["## Framework versions", "\n".join(f"- {name}: {number}" for name, number in versions.items())]
    citations = "\n\n".join([*(paper.bibtex for paper in model.papers), _TRL])
    parts += ["## Citations", f"```bibtex\n{citations}\n```"]
    return "\n\n".join(parts) + "\n"


def _kind(model: TrainedModel) -> str:
    if model.base_model is None:
        return "A PEFT adapter" if model.is_adapter else "A language model"
    base = hub_link(model.base_model)
    return f"A PEFT adapter for {base}" if model.is_adapter else f"A fine-tuned version of {base}"


def _quick_start(model: TrainedModel) -> str:
    if model.is_adapter:
        auto, imports = "AutoPeftModelForCausalLM", "from peft import AutoPeftModelForCausalLM\n"
        imports += "from transformers import AutoTokenizer\n"
    else:
        auto, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if model.conversational:
        inputs = (
            'messages = [{"role": "user", "content": "How do I keep basil alive?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")\n"
        )
    else:
        inputs = (
            'prompt = "How do I keep basil alive?"  # best in the format that it was trained on\n'
            'inputs = tokenizer(prompt, return_tensors="pt")\n'
        )
    return (
        f"```python\n{imports}\n"
        f'model = {auto}.from_pretrained("{model.repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model.repo_id}")\n'
        f"{inputs}"
        "output = model.generate(**inputs, max_new_tokens=128)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
        "```"
    )


def _eval_results(evaluation: Mapping[str, float], dataset: str) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in evaluation.items()
    ] or None
