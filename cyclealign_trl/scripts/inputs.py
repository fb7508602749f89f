"""What the commands' arguments stand for: models, data sets, rankers."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset, get_quantization_config

from ..aligner.aligner import Aligner
from ..aligner.aligner_config import AlignerConfig
from ..cycle.cyclealign_config import CycleAlignConfig
from ..data import hh_rlhf
from ..data.formats import file_format
from ..offline.ranking_config import RankingConfig
from ..rankers.base import Ranker
from ..rankers.llm import LLMRanker
from ..types import Corrector
from .arguments import CorrectorArguments, RankerArguments


def add_model_arguments(training_args: RankingConfig | AlignerConfig, model_args: ModelConfig) -> None:
    """Hands what `ModelConfig` says about loading to the trainer's `model_init_kwargs`, which is stronger."""
    if model_args.model_name_or_path is None:
        raise ValueError("Say what to train, with --model_name_or_path.")
    given = training_args.model_init_kwargs
    init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(given if isinstance(given, dict) else {}),
    }
    training_args.model_init_kwargs = {name: value for name, value in init_kwargs.items() if value is not None}


def load_splits(
    script_args: ScriptArguments, mixture_args: DatasetMixtureConfig, training_args: RankingConfig | AlignerConfig
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on where evaluation is on.

    `dataset_name` may be a name on the Hub, a folder, or one file (JSON, JSON lines, Parquet, CSV), which is the
    training split.

    Raises:
        ValueError: If no data set is named, or it lacks a split.
        FileNotFoundError: If a file is not there.
    """
    name = script_args.dataset_name
    if mixture_args.datasets:
        if name is not None:
            raise ValueError(f"dataset_name ({name}) and datasets both say what to train on: give one of them.")
        splits = get_dataset(mixture_args)
    elif name is None:
        raise ValueError("Say what to train on, with --dataset_name, or with `datasets` in the YAML file.")
    else:
        splits = _load_splits(
            name, script_args.dataset_config, script_args.dataset_train_split, streaming=script_args.dataset_streaming
        )

    def take(field: str) -> Dataset:
        return _split(splits, getattr(script_args, field), field)

    evaluates = training_args.eval_strategy != "no"
    return take("dataset_train_split"), take("dataset_test_split") if evaluates else None


def load_references(name: str | None, config: str | None, split: str) -> Dataset:
    """Rows with a reference order, of a name on the Hub, a folder, or one file, whose split is whatever is asked for.

    Of HH-RLHF on the Hub, whose subsets are folders and no configurations, the config names one.

    Raises:
        ValueError: If no data set is named, or it lacks the split.
        FileNotFoundError: If a file is not there.
    """
    if name is None:
        raise ValueError("Say what to rank, with --dataset_name.")
    if name == hh_rlhf.HUB_ID:
        return hh_rlhf.load_hh_rlhf(cast("Any", config), cast("Any", split), dataset_type="ranked")
    return _split(_load_splits(name, config, split), split, "dataset_split")


def _load_splits(name: str, config: str | None, only_split: str, **kwargs: Any) -> Any:
    """The splits of a name on the Hub or of a folder; or one file as the only split."""
    reader = file_format(name)
    if reader is None:
        return _load(name, name=config, **kwargs)
    if not Path(name).is_file():
        raise FileNotFoundError(f"There is no file {name} (--dataset_name).")
    return _load(reader, data_files={only_split: name})


def _split(splits: Any, name: str, argument: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r} (--{argument}), only {', '.join(splits)}.")
    return splits[name]


def _load(path: str, **kwargs: Any) -> Any:  # datasets.DatasetDict
    try:
        return load_dataset(path, **kwargs)
    except (StopIteration, DatasetGenerationError) as error:  # no rows; rows that cannot be read
        files = kwargs.get("data_files", path)
        raise ValueError(f"{files} holds no rows that can be read: {error.__cause__ or error}") from error


def make_ranker(args: RankerArguments, *, connect: bool = True) -> Ranker:
    """The ranker that the arguments describe.

    Args:
        args: The arguments.
        connect: Whether to see that an endpoint answers.

    Raises:
        ValueError: If they describe none, two, or one that cannot be built.
        RankerError: If nothing answers at the endpoint.
    """
    kwargs = ranker_options(args)
    if args.ranker_model is not None and args.ranker_factory is None:
        factory: Callable[..., Ranker] = partial(LLMRanker, args.ranker_model, args.ranker_base_url)
    elif args.ranker_factory is not None and args.ranker_model is args.ranker_base_url is None:
        factory = _imported(args.ranker_factory)
    else:
        raise ValueError("Say who ranks, with either --ranker_model (and --ranker_base_url) or --ranker_factory.")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"ranker_kwargs do not fit: {error}.") from error
    ranker = factory(**kwargs)
    if not isinstance(ranker, Ranker):
        raise ValueError(f"ranker_factory {args.ranker_factory!r} returned {ranker!r}, which has no method rank.")
    if connect and isinstance(ranker, LLMRanker):
        ranker.check_connection()
    return ranker


def ranker_options(args: RankerArguments) -> dict[str, Any]:
    """`ranker_kwargs` as keyword arguments.

    Raises:
        ValueError: If they are no JSON object, or hold an API key.
    """
    kwargs = _json_object("ranker_kwargs", args.ranker_kwargs)
    if "api_key" in kwargs:
        raise ValueError(
            "ranker_kwargs must hold no API key, which files and process lists would show: set OPENAI_API_KEY."
        )
    return kwargs


def make_corrector(args: CorrectorArguments, training_args: CycleAlignConfig) -> Corrector | None:
    """The aligner that the arguments name, where they name one, on the training's device.

    Raises:
        ValueError: If they do not fit, or no template lies beside the aligner.
    """
    kwargs = _json_object("corrector_kwargs", args.corrector_kwargs)
    if args.corrector is None:
        if kwargs:
            raise ValueError("corrector_kwargs say how to load an aligner: name it, with --corrector.")
        return None
    try:
        return Aligner.from_pretrained(args.corrector, **{"device": training_args.device, **kwargs})
    except TypeError as error:
        raise ValueError(f"corrector_kwargs do not fit: {error}.") from error


def _json_object(name: str, given: Any) -> dict[str, Any]:
    """An argument that is a mapping in YAML and JSON on the command line."""
    try:
        return dict(json.loads(given or "{}") if isinstance(given, str | None) else given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a JSON object: {error}.") from error


def _imported(path: str) -> Callable[..., Ranker]:
    """The class or function that a dotted path names."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        factory: Callable[..., Ranker] = getattr(importlib.import_module(module_name), name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"ranker_factory {path!r} names nothing that can be imported: {error}.") from error
    return factory
