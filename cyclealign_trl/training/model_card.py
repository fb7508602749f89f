"""The model card: what a model is, how to load it, what it was trained on and by whom it was ranked."""

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
    """A method and where it comes from."""

    name: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        """The name, linked to the paper."""
        return f"[{self.name}](https://arxiv.org/abs/{self.arxiv})"

    @property
    def bibtex(self) -> str:
        """How to cite it."""
        return (
            f"@article{{{self.name.lower()}{self.year},\n"
            f"  title   = {{{{{self.title}}}}},\n"
            f"  author  = {{{self.authors}}},\n"
            f"  year    = {{{self.year}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}}\n"
            "}"
        )


CYCLEALIGN = Paper(
    "CycleAlign",
    "CycleAlign: Iterative Distillation from Black-box LLM to White-box Models for Better Human Alignment",
    "Hong, Jixiang and Tu, Quan and Chen, Changyu and Gao, Xing and Zhang, Ji and Yan, Rui",
    2023,
    "2310.16271",
)
DLMA = Paper(
    "DLMA",
    "Direct Large Language Model Alignment Through Self-Rewarding Contrastive Prompt Distillation",
    "Liu, Aiwei and Bai, Haoping and Lu, Zhiyun and Kong, Xiang and Wang, Simon and Shan, Jiulong and Cao, Meng and "
    "Wen, Lijie",
    2024,
    "2402.11907",
)
LOSSES = {
    "pro": Paper(
        "PRO",
        "Preference Ranking Optimization for Human Alignment",
        "Song, Feifan and Yu, Bowen and Li, Minghao and Yu, Haiyang and Huang, Fei and Li, Yongbin and Wang, Houfeng",
        2023,
        "2306.17492",
    ),
    "rrhf": Paper(
        "RRHF",
        "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "Yuan, Zheng and Yuan, Hongyi and Tan, Chuanqi and Wang, Wei and Huang, Songfang and Huang, Fei",
        2023,
        "2304.05302",
    ),
    "dlma": DLMA,
}
ALIGNER = Paper(
    "Aligner",
    "Aligner: Efficient Alignment by Learning to Correct",
    "Ji, Jiaming and Chen, Boyuan and Lou, Hantao and Hong, Donghai and Zhang, Borong and Pan, Xuehai and Dai, Juntao "
    "and Qiu, Tianyi and Yang, Yaodong",
    2024,
    "2402.02416",
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
    """What a card says about a model.

    Args:
        name: The heading.
        repo_id: What it is loaded by.
        base_model: What it was trained from: a name on the Hub or a folder, of which no more than its name is told.
        is_adapter: Whether it is a PEFT adapter.
        conversational: Whether its prompts are messages.
        papers: Whose methods trained it, the one that gave the run its name first.
        method: How they did: a sentence that begins with what follows "trained by".
        quick_start: How to use it, as Markdown. `None`: as any language model.
        settings: How it was trained, as rows of a table.
        data: What it was trained on, as rows of a table.
        sections: Further Markdown sections.
        evaluation: The last value of each metric.
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
    """The card of a model.

    Args:
        model: What it says.
        datasets: Names of the data sets; those on the Hub go into the metadata.
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
        # Whose numbers they are can only be said where there is one name to say.
        eval_results=_eval_results(model.evaluation, hub_datasets[0]) if len(hub_datasets) == 1 else None,
        **{"pipeline_tag": "text-generation", **data},
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{_text(model)}")


def evaluation_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric of quality that an evaluation logged, without `eval_`."""
    metrics: dict[str, float] = {}
    for logs in log_history:
        metrics |= {
            name.removeprefix("eval_"): float(value)
            for name, value in logs.items()
            if name.startswith("eval_") and not _NOT_QUALITY.search(name)
        }
    return metrics


def hub_id(name: str | None) -> str | None:
    """The name, if it can be one on the Hub rather than a file or folder."""
    if not name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
        return None
    return name


def public_name(name: str) -> str:
    """The name; of a path, the last part only: where somebody keeps a model is nobody's business."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.exists()
    return path.name if is_path else name


def hub_link(name: str, kind: str = "") -> str:
    """A link to a repository of the Hub, or the public name of what is none."""
    return f"[{name}](https://huggingface.co/{kind}{name})" if hub_id(name) else f"`{public_name(name)}`"


def table(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> str:
    """A Markdown table of two columns."""
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
