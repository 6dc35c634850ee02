"""`key=value` words of a command line, checked against a record."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from mmssl.specs import Spec
from mmssl.types import UserError

S = TypeVar("S", bound=Spec)


def parse(record: type[S], words: Sequence[str]) -> S:
    """Options from words; what is not named keeps its default.

    Raises:
        UserError: an unknown or repeated key (with the nearest valid one), or a value of the wrong
        kind.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in record.model_fields:
            near = difflib.get_close_matches(key, record.model_fields, 1)
            hint = f"; did you mean `{near[0]}=...`?" if near else ""
            valid = ", ".join(record.model_fields)
            raise UserError(f"`{word}`: no such option{hint} (valid: {valid})")
        if key in values:
            raise UserError(f"`{word}`: `{key}` is given twice")
        values[key] = value
    try:
        return record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"`{key}={values.get(key)}`: {first['msg']}") from error
