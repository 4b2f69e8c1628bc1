"""Which modules of a checkpoint are quantized, and how, by what its files say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

from annotated_types import Len
from pydantic import BaseModel, ConfigDict

from ad_flashinfer_pass.models.quantized.scheme import Scheme

Excludes = Callable[[str, str], bool]
"""Whether a pattern of a list of what is not quantized names a module."""


class Group(NamedTuple):
    """Modules that are quantized alike."""

    targets: tuple[str, ...]
    """Names of modules, ``re:`` and a pattern of them, or Linear for all others."""
    scheme: Scheme


class Layout(NamedTuple):
    """What the files of a checkpoint say of its quantized weights."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    """Names, or patterns of names, of linears that are not quantized."""
    excludes: Excludes
    head_is_plain: bool = False
    """The linear that makes the logits is not quantized, though nothing names it."""
    names_all: bool = True
    """The files name all that is quantized; else others may be plain, as their tensors say."""

    def group_of(self, name: str) -> Group | None:
        """How a module of this name is quantized; None: it is not."""
        if any(self.excludes(pattern, name) for pattern in self.ignored):
            return None
        # The most specific counts.
        for matches in (is_name, is_pattern, lambda target, _: target == "Linear"):
            for group in self.groups:
                if any(matches(target, name) for target in group.targets):
                    return group
        return None

    @property
    def schemes(self) -> list[Scheme]:
        """Each once."""
        return list(dict.fromkeys(group.scheme for group in self.groups))


class Exact(BaseModel):
    """Settings of which every key is known: another may change what the numbers mean."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


Nothing = Annotated[dict[str, Any], Len(0, 0)] | None
Names = list[str] | None


def is_name(pattern: str, name: str) -> bool:
    """Whether they are the same."""
    return pattern == name


def is_pattern(pattern: str, name: str) -> bool:
    """``re:`` and a pattern of the start of the name."""
    return pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), name) is not None


def by_compressed_tensors(pattern: str, name: str) -> bool:
    """A name, a pattern, or the class."""
    return pattern in (name, "Linear") or is_pattern(pattern, name)


def by_modelopt(pattern: str, name: str) -> bool:
    """Shell patterns of a module, or of one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def by_transformers(pattern: str, name: str) -> bool:
    """A pattern from the start to the end of a module's name, or the end of the name."""
    return name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None


def by_part(pattern: str, name: str) -> bool:
    """Any part of a name."""
    return pattern in name


def check_patterns(patterns: Iterable[str]) -> None:
    """That each is one of ``re``.

    Raises:
        ValueError: names the first that is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            raise ValueError(f"{pattern!r} is no pattern") from None
