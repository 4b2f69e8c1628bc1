"""Transforms by name.

A transform is a function of one file in ``transforms/``, registered under the name of that file::

    @register("match_attention")
    def match_attention(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:

It edits the graph in place and reports what it matched, and what it skipped and why. If it changed
the graph it calls ``graph.edit.finish``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ad_flashinfer_pass.records import TransformContext, TransformReport

Transform = Callable[[nn.Module, TransformContext], tuple[nn.Module, TransformReport]]
_TRANSFORMS: dict[str, Transform] = {}


def register(name: str) -> Callable[[Transform], Transform]:
    """Decorator: enter a transform under ``name``, which must be new."""

    def enter(transform: Transform) -> Transform:
        if name in _TRANSFORMS:
            raise ValueError(f"transform {name!r} is already registered")
        _TRANSFORMS[name] = transform
        return transform

    return enter


def get(name: str) -> Transform:
    """The transform of that name; KeyError lists the known ones."""
    if name not in _TRANSFORMS:
        raise KeyError(f"no transform {name!r}; known: {', '.join(_TRANSFORMS)}")
    return _TRANSFORMS[name]
