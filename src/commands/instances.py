"""Errors that classes raise in their constructors, passed through jsonargparse unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from src.errors import UserError


class _Raised(BaseException):
    """Carries an error past jsonargparse, which takes any Exception for a reason to try another type."""


def _make(cls: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        raise _Raised from error


@contextmanager
def errors_as_raised(parser: ArgumentParser) -> Iterator[None]:
    """Around `parser` making classes: raises their own errors, and Lightning's about settings as the user's."""
    parser.add_instantiator(_make, object)
    try:
        yield
    except (_Raised, MisconfigurationException) as error:
        raised = error.__cause__ if isinstance(error, _Raised) else error
        assert raised is not None
        if isinstance(raised, MisconfigurationException):
            raise UserError(" ".join(str(raised).split())) from raised
        raise raised from None
