"""A `Trainer` that publishes its model with our card, and without what belongs to no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import Trainer
from trl import is_conversational

from .._compat import get_config_model_id, uploading_without
from .model_card import TrainedModel, evaluation_metrics, hub_link, model_card
from .publishing import NOT_WITH_THE_MODEL


class PublishedTrainer(Trainer):
    """Writes the card, and pushes model, tokenizer and card. A subclass says how the model was trained."""

    def _describe(self, model: TrainedModel) -> TrainedModel:
        """Adds to a description of the model how it was trained."""
        raise NotImplementedError

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # huggingface_hub.CommitInfo
        """Publishes model or adapter, tokenizer and card, and what a subclass writes beside its card.

        See `Trainer.push_to_hub`. A log of interactions stays here, and so do stored rankings and exports.
        """
        with uploading_without(NOT_WITH_THE_MODEL):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with uploading_without(NOT_WITH_THE_MODEL):
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model card into the output directory, as `README.md`. `push_to_hub` does so by itself.

        Args:
            language: The model's language, for the metadata.
            license: Its license, for the metadata. None is declared by default.
            tags: Further tags.
            model_name: The heading; by default the name of the repository.
            finetuned_from: What it was trained from; by default the name that the model was loaded by.
            tasks: Its task on the Hub; by default text generation.
            dataset_tags: Names of the data sets on the Hub.
            dataset: The same.
            dataset_args: Their configurations.
        """
        if not self.is_world_process_zero():
            return
        repo_id = self._repo_id
        datasets = list(dict.fromkeys([*_as_list(dataset_tags), *_as_list(dataset)]))
        source = ", ".join(hub_link(name, "datasets/") for name in datasets)
        if dataset_args:
            source += f" ({', '.join(_as_list(dataset_args))})"
        model = self._describe(
            TrainedModel(
                name=model_name or repo_id.split("/")[-1],
                repo_id=repo_id,
                base_model=finetuned_from or get_config_model_id(self.model.config) or None,
                is_adapter=is_peft_model(self.model),
                conversational=self.train_dataset is not None and is_conversational(next(iter(self.train_dataset))),
                data={
                    **({"source": source} if source else {}),
                    "training": dataset_size(self.train_dataset),
                    "evaluation": dataset_size(self.eval_dataset),
                },
                evaluation=evaluation_metrics(self.state.log_history),
            )
        )
        metadata = {"language": language, "license": license, **({"pipeline_tag": tasks} if tasks else {})}
        card = model_card(model, datasets=datasets, tags=_as_list(tags), **metadata)
        card.save(Path(self.args.output_dir, "README.md"))

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def dataset_size(dataset: Any) -> str:
    """How many rows of which columns, for the card."""
    if dataset is None:
        return "none"
    if isinstance(dataset, Mapping):
        return "; ".join(f"{name}: {dataset_size(part)}" for name, part in dataset.items())
    columns = ", ".join(f"`{name}`" for name in sorted(column_names(dataset)))
    return f"{len(dataset):,} rows of {columns}" if hasattr(dataset, "__len__") else f"a stream of {columns}"


def column_names(dataset: Any) -> set[str]:
    """The columns of any kind of data set."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # any other map-style dataset, or a stream that does not know its columns yet
        columns = next(iter(dataset))
    return set(columns)
