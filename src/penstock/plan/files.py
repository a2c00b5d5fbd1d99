"""JSON files of plans and clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.errors import UserError


def write_json(path: str | Path, values: Any) -> None:
    """Writes values that JSON has.

    Raises:
        UserError: the file cannot be made.
    """
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}", hint="name a file that can be made"
        ) from error


def read_json(path: str | Path, *, missing: str, wrong: str) -> Any:
    """Reads such a file.

    Arguments:
        missing, wrong: hints, where it is not there, and where it is not JSON.

    Raises:
        UserError: names the file.
    """
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        hint = missing if isinstance(error, FileNotFoundError) else "name a file that can be read"
        raise UserError(f"{path}: {error.strerror or error}", hint=hint) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", hint=wrong) from error
