"""JSON objects in files, as Hugging Face's format has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from popo_jax.types import UserError


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: UserError, one sentence."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise UserError(f"{path}: must be JSON, got something else") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(data).__name__}")
    return data


def write_json(path: epath.Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
