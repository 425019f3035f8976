"""``key=value`` options of a data set, checked against a model of what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cmkd_scale.errors import UsageError, did_you_mean

_Options = TypeVar("_Options", bound=BaseModel)


def parse_options(model: type[_Options], dataset: str, options: Mapping[str, str]) -> _Options:
    """Turn texts into a model's values.

    Raises:
        UsageError: naming every option that is unknown or has a wrong value.
    """
    valid = list(model.model_fields)
    faults = [
        f"there is no option '{name}', {did_you_mean(name, valid)}"
        for name in options
        if name not in valid
    ]
    try:
        parsed = model.model_validate({name: options[name] for name in options if name in valid})
    except ValidationError as error:
        faults += [
            f"{fault['loc'][0]}={fault['input']}: {fault['msg'].lower()}"
            for fault in error.errors(include_url=False)
        ]
    if faults:
        raise UsageError(f"Options of the data set '{dataset}': {'; '.join(faults)}.")
    return parsed
