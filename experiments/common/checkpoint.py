"""Checkpoints: the whole state of a training in one file that is the old one or the new one, and says whose it is."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from experiments.common.atomic import write_atomically

_FORMAT = "bsfast checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write a checkpoint in one step.

    Args:
        path: The file; its folder is made if missing.
        state: What a training needs to continue: tensors, numbers, text, and lists and dicts of these.
        identity: What the state belongs to, compared key by key when it is loaded; JSON-like.

    Raises:
        RuntimeError: If it could not be written, for example on a full disk; an earlier checkpoint is untouched.
    """
    content = io.BytesIO()
    torch.save({"format": _FORMAT, "identity": identity, "state": state}, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getbuffer())
    except OSError as error:
        kept = "the one before it is untouched" if path.exists() else "there is none before it"
        raise RuntimeError(f"save_checkpoint: {path} could not be written ({error}); {kept}") from error


def load_checkpoint(
    path: Path, identity: dict[str, Any], *, device: str = "cpu", ignore: Collection[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint of this identity; nothing in it is executed.

    Args:
        path: The file.
        identity: As it was saved.
        device: Where the tensors go.
        ignore: Keys of the identity that are not compared.

    Returns:
        The state.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, is something else, or belongs to another training; says which part differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: path must be a checkpoint, got {str(path)!r}, which is not there")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever a damaged file leads it to
        raise ValueError(f"load_checkpoint: {path} must be a whole checkpoint, but it is damaged: {error}") from None
    if damaged is not None:
        raise ValueError(f"load_checkpoint: {path} must be a whole checkpoint, but {damaged} in it is damaged")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # so does unpickling, which comes to an end at the first object that is not plain
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"load_checkpoint: {path} must hold tensors and plain values only, and is refused: {reason}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"load_checkpoint: {path} must be a {_FORMAT!r}, got {found!r}")
    theirs = content["identity"]
    for name in sorted((identity.keys() | theirs.keys()) - set(ignore)):
        if theirs.get(name) != identity.get(name):
            raise ValueError(
                f"load_checkpoint: {path} belongs to another training: its {name} is {theirs.get(name)!r}, "
                f"here it is {identity.get(name)!r}"
            )
    return content["state"]
