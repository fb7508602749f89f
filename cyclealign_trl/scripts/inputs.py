"""Load the datasets, rankers and correctors that the arguments of the commands name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, cast

from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset, get_quantization_config

from ..aligner.aligner import Aligner
from ..aligner.aligner_config import AlignerConfig
from ..cycle.cyclealign_config import CycleAlignConfig
from ..data import hh_rlhf
from ..data.named_datasets import load_named_splits, select_split
from ..evaluation.pairwise_judge import PairwiseJudge
from ..offline.ranking_config import RankingConfig
from ..rankers.base import Ranker
from ..rankers.jury import JuryRanker
from ..rankers.llm import LLMRanker
from ..types import Corrector
from .arguments import CorrectorArguments, RankerArguments


def add_model_init_kwargs(training_args: RankingConfig | AlignerConfig, model_args: ModelConfig) -> None:
    """Add the loading options of `ModelConfig` to `model_init_kwargs`, without overriding its values.

    Raises:
        ValueError: If no model is named.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("No model to train. Set --model_name_or_path.")
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
    """Load the training split, and the evaluation split if evaluation is on.

    `dataset_name` is a name on the Hub, a folder, or one file (JSON, JSON lines, Parquet, CSV), which is the training
    split. For HH-RLHF on the Hub, `dataset_config` is the subset.

    Raises:
        ValueError: If no dataset is named, a split is missing, or the dataset would be a stream.
        FileNotFoundError: If a file is missing.
    """
    if script_args.dataset_streaming or mixture_args.streaming:
        argument = "dataset_streaming" if script_args.dataset_streaming else "streaming"
        raise ValueError(
            f"--{argument} is set, but the trainers need datasets with a length. Leave it out, or write a part to a "
            "file and name the file: Dataset.from_list(list(stream.take(1000))).to_json(...)."
        )
    name = script_args.dataset_name
    if mixture_args.datasets:
        if name is not None:
            raise ValueError(f"Both dataset_name ({name}) and datasets are set. Set one of them.")
        splits = get_dataset(mixture_args)
    elif name is None:
        raise ValueError("No dataset to train on. Set --dataset_name, or `datasets` in the YAML file.")
    else:
        splits = load_named_splits(name, script_args.dataset_config, script_args.dataset_train_split)
    train_dataset = select_split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, select_split(splits, script_args.dataset_test_split, "dataset_test_split")


def load_references(name: str | None, config: str | None, split: str) -> Dataset:
    """Load rows with a reference order.

    Args:
        name: Name on the Hub, folder, or file, which is read as `split`.
        config: Configuration of the dataset. For HH-RLHF on the Hub, the subset.
        split: Split of the dataset.

    Raises:
        ValueError: If no dataset is named, or the split is missing.
        FileNotFoundError: If a file is missing.
    """
    if name is None:
        raise ValueError("No dataset to rank. Set --dataset_name.")
    if name == hh_rlhf.HUB_ID:
        return hh_rlhf.load_hh_rlhf(cast("Any", config), cast("Any", split), dataset_type="ranked")
    return select_split(load_named_splits(name, config, split), split, "dataset_split")


def make_ranker(
    args: RankerArguments,
    *,
    connect: bool = True,
    shuffle: bool = True,
    llm: type[LLMRanker] | type[PairwiseJudge] = LLMRanker,
) -> Ranker:
    """Create the ranker, and the members of a jury.

    Args:
        args: Arguments that name an LLM or a factory.
        connect: Whether to check that the endpoint of an LLM answers.
        shuffle: Whether an LLM shuffles completions before it shows them, unless its arguments set `shuffle` or
            `num_passes`.
        llm: Class of the ranker that asks an LLM.

    Raises:
        ValueError: If the arguments name no ranker or two, or the ranker cannot be created.
        RankerError: If the endpoint does not answer.
    """
    kwargs = parse_json_object("ranker_kwargs", args.ranker_kwargs)
    if args.ranker_model is not None and args.ranker_factory is None:
        factory: Callable[..., Ranker] = partial(llm, args.ranker_model, args.ranker_base_url)
        if not shuffle and not {"shuffle", "num_passes"} & kwargs.keys():
            kwargs["shuffle"] = False
    elif args.ranker_factory is not None and args.ranker_model is args.ranker_base_url is None:
        factory = _import_factory(args.ranker_factory)
    else:
        given = [name for name in ("ranker_model", "ranker_base_url", "ranker_factory") if getattr(args, name)]
        raise ValueError(
            "The ranker must be set by either --ranker_model (and --ranker_base_url) or --ranker_factory, got "
            f"{' and '.join(given) or 'neither'}."
        )
    complaint = "The ranker does not accept these ranker_kwargs"
    _check_kwargs(complaint, kwargs, factory)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{complaint}: {error}.") from error
    if factory is JuryRanker:
        kwargs["members"] = _make_members(
            kwargs["members"], partial(make_ranker, connect=connect, shuffle=shuffle, llm=llm)
        )
    ranker = factory(**kwargs)
    if not isinstance(ranker, Ranker):
        raise ValueError(f"ranker_factory {args.ranker_factory!r} returned {ranker!r}, which has no method rank.")
    if connect and isinstance(ranker, LLMRanker | PairwiseJudge):
        ranker.check_connection()
    return ranker


def _make_members(members: Any, make: Callable[[RankerArguments], Ranker]) -> list[Ranker]:
    """Create the members of a jury from a list of mappings with the fields of `RankerArguments`.

    Raises:
        ValueError: If the members are anything else, or one of them cannot be created.
    """
    known = [field.name for field in fields(RankerArguments)]
    keys = ", ".join(known)
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise ValueError(f"The members of a jury must be a list of mappings with the keys {keys}.")
    made = []
    for number, member in enumerate(members):
        if unknown := [name for name in member if name not in known]:
            raise ValueError(f"Member {number} of the jury has the unknown key {unknown[0]!r}. Known keys: {keys}.")
        try:
            made.append(make(RankerArguments(**member)))
        except ValueError as error:
            raise ValueError(f"Member {number} of the jury: {error}") from error
    return made


def make_corrector(args: CorrectorArguments, training_args: CycleAlignConfig) -> Corrector | None:
    """Load the aligner, if one is named, on the device of the training.

    Raises:
        ValueError: If `corrector_kwargs` do not fit, or the aligner has no template.
    """
    kwargs = parse_json_object("corrector_kwargs", args.corrector_kwargs)
    if args.corrector is None:
        if kwargs:
            raise ValueError("corrector_kwargs are set, but no aligner to load. Set --corrector.")
        return None
    complaint = "Aligner.from_pretrained does not accept these corrector_kwargs"
    _check_kwargs(complaint, kwargs, Aligner.from_pretrained, Aligner)
    try:
        return Aligner.from_pretrained(args.corrector, **{"device": training_args.device, **kwargs})
    except TypeError as error:
        raise ValueError(f"{complaint}: {error}.") from error


def _check_kwargs(complaint: str, kwargs: dict[str, Any], *functions: Callable[..., Any]) -> None:
    """Raise `ValueError` if an argument has an unknown name, with the closest known one.

    Args:
        complaint: Beginning of the message.
        kwargs: The arguments. Messages show their names only, because a value can be secret.
        functions: A function, and those that it passes its further keyword arguments to.
    """
    signatures = [inspect.signature(function).parameters.values() for function in functions]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signatures[-1]):
        return  # anything is accepted
    known = [
        parameter.name
        for parameters in signatures
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and parameter.name != "api_key"
    ]
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known arguments: {', '.join(known)}."
            raise ValueError(f"{complaint}: unknown argument {name!r}. {hint}")


def parse_json_object(name: str, value: Any) -> dict[str, Any]:
    """Parse an argument that is a mapping in YAML and JSON text on the command line.

    Args:
        name: Name of the argument.
        value: Its value. `None` is an empty mapping.

    Raises:
        ValueError: If it is not a JSON object, or contains an API key.
    """
    try:
        parsed = dict(json.loads(value or "{}") if isinstance(value, str | None) else value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a JSON object: {error}.") from error
    if "api_key" in parsed:
        raise ValueError(
            f"{name} must not contain an API key, because files and process lists would show it: set OPENAI_API_KEY "
            "instead."
        )
    return parsed


def _import_factory(path: str) -> Callable[..., Ranker]:
    """Import a class or function by its dotted path, from the current directory, too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        factory: Callable[..., Ranker] = getattr(importlib.import_module(module_name), name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"ranker_factory {path!r} cannot be imported: {error}.") from error
    if not callable(factory):
        raise ValueError(
            f"ranker_factory {path!r} is an instance of {type(factory).__name__}. Name a class, or a function that "
            "returns a ranker."
        )
    return factory
