"""`run.json`: what a run was started with, for people and for reports, without secrets."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._files import atomic_write

RUN_FILE = "run.json"
VERSION = 1
_LIBRARIES = (
    "cyclealign-trl",
    "transformers",
    "torch",
    "trl",
    "datasets",
    "tokenizers",
    "accelerate",
    "peft",
    "deepspeed",
    "vllm",
)
_SECRET = re.compile(r"(^|[_-])(token|key|password|secret|authorization|headers)$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]*@")
_FILLED_IN = {"accelerator_config", "data_seed", "disable_tqdm"}  # by the trainers, from other settings
_OF_THE_MACHINE = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token"}


def start_run_file(output_dir: Path, record: Mapping[str, Any], args: Any) -> None:
    """Write the file for a run that starts from step 0.

    Args:
        output_dir: Output directory of the run.
        record: What the trainer says about the run, as JSON data.
        args: Its `TrainingArguments`.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    _write(output_dir, {"version": VERSION, "started": started, **record, **_environment(args)})


def continue_run_file(output_dir: Path, args: Any) -> None:
    """Update the settings and versions in the file of a run that is resumed. Earlier versions left no file."""
    if (run := read_run_file(output_dir)) is not None:
        _write(output_dir, {**run, **_environment(args)})


def read_run_file(output_dir: Path) -> dict[str, Any] | None:
    """Return the content of the file, or `None` if there is none that this version can read."""
    try:
        run = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return run if isinstance(run, dict) and run.get("version") == VERSION else None


def settings_of(args: Any) -> dict[str, Any]:
    """Return the fields of a config as JSON data, without secrets and without folders of the machine."""
    return {name: without_secrets(value) for name, value in args.to_dict().items() if name not in _OF_THE_MACHINE}


def changed_settings(args: Any, settings: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that differ from the default of their field."""
    changed = []
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in settings or field.name in _FILLED_IN or default is MISSING:
            continue
        value, default = settings[field.name], without_secrets(getattr(default, "value", default))
        if value != default and (value or default):  # None becomes False or an empty list at construction
            changed.append(field.name)
    return changed


def _environment(args: Any) -> dict[str, Any]:
    settings = settings_of(args)
    return {
        "settings": settings,
        "changed": changed_settings(args, settings),
        "processes": args.world_size,
        "device": args.device.type,
        "versions": {**_versions(), "python": platform.python_version()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def without_secrets(value: Any) -> Any:
    """Return a value as JSON data, without what is named like a secret and without passwords in URLs."""
    if isinstance(value, Mapping):
        return {
            str(name): "[hidden]" if _SECRET.search(str(name)) and inner else without_secrets(inner)
            for name, inner in value.items()
        }
    if isinstance(value, str):
        return _USER_IN_URL.sub("", value)
    if isinstance(value, Sequence):
        return [without_secrets(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float) else type(value).__name__


def _write(output_dir: Path, run: Mapping[str, Any]) -> None:
    with atomic_write(output_dir / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
