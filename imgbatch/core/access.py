"""What a manifest may make this process read: schemes, and directories for local files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgbatch.config import Config, FetchConfig, parse_config
from imgbatch.core import storage


class Refused(Exception):
    """Not to be read, whatever is there; trying again changes nothing."""


def check_scheme(uri: str, config: FetchConfig) -> str:
    """The scheme of a URI, ``file`` for plain paths; raises :class:`Refused` where ``fetch.schemes`` lacks it."""
    scheme = "file" if storage.is_local(uri) else uri.partition("://")[0].lower()
    if scheme not in config.schemes:
        raise Refused(f"{scheme}:// is not among {', '.join(config.schemes)} (fetch.schemes)")
    return scheme


def allowed_path(uri: str, config: FetchConfig) -> Path:
    """The path of a local URI; where ``fetch.roots`` are set, with symbolic links followed.

    Raises:
        Refused: local files are not allowed, or this one lies outside every root.
    """
    check_scheme(uri, config)
    path = storage.local_path(uri)
    if not config.roots:
        return path
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in config.roots):
        raise Refused("outside the directories that images may lie in (fetch.roots)")
    return real


def fetch_settings(plan: Mapping[str, Any], given: FetchConfig) -> FetchConfig:
    """How the images of a run are fetched again: as its command said, but for what ``given`` says itself.

    Args:
        plan: the run's plan.json.
    """
    planned = parse_config(plan["config"]).fetch if "config" in plan else FetchConfig()
    return planned.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def moved_inputs(planned: Config, given: Config) -> dict[str, Any]:
    """The sections of a run's inputs, with manifest and model from where ``given`` says they are now, if it says so.

    What they are is checked by whoever opens them.
    """
    sections: dict[str, Any] = {}
    if given.input.manifest is not None:
        sections["input"] = planned.input.model_copy(update={"manifest": given.input.manifest})
    if given.model.path is not None:
        sections["model"] = planned.model.model_copy(update={"path": given.model.path})
    return sections
