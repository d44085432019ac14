"""JSON files that come from users."""

import json
from pathlib import Path
from typing import Any

from src.errors import UserError


def read_object(file: Path, remedy: str = "; copy it again") -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        UserError: it is missing or no regular file, cannot be read, is not valid JSON, or holds something else.
    """
    try:
        if not file.is_file():
            raise UserError(f"{file} is {'not a regular file' if file.exists() else 'missing'}{remedy}")
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}{remedy}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object but {str(fields)[:40]!r}{remedy}")
    return fields
