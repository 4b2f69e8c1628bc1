"""How a function becomes an op of namespace ``ad_flashinfer``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def define(function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
    """Register a function as the op of its name, with the schema that its annotations say.

    Args:
        function: what the op runs, on any device.
        fake: gives tensors of the results' shapes, dtypes and strides; called with all arguments by name.
        mutates: the arguments that are written in place.
    """
    name, signature = f"ad_flashinfer::{function.__name__}", inspect.signature(function)
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    schema = schema.replace("SymInt", "int")  # integers are constants of a graph
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)

    @torch.library.register_fake(name)
    def _(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return fake(**given.arguments)
