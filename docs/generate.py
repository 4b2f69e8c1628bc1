"""Writes the lists of docs/config.md from the classes of the config: python docs/generate.py."""

import ast
import inspect
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from ad_flashinfer_pass import autodeploy_keys, config, transforms

PAGE = Path(__file__).parent / "config.md"


def updated() -> str:
    """The page with its lists made anew."""
    page = PAGE.read_text(encoding="utf-8")
    neutral = sorted(autodeploy_keys._NEUTRAL.items())
    unused = {*autodeploy_keys._NOTHING, *(f"kv_cache_config.{k}" for k in autodeploy_keys._NOTHING_OF_CACHE)}
    lists = {
        "top level": _keys(config.AutoDeployConfig),
        "kv_cache_config": _keys(config.KvCacheConfig),
        "transforms": _transforms(),
        "change the answer": [f"- `{k}` ({_values((None, *ok))}): {why}." for k, (ok, why) in neutral],
        "mean nothing": [f"- `{key}`" for key in sorted(unused)],
    }
    for name, lines in lists.items():
        before, begin, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        page = "\n".join([before + begin, *map(_wrapped, lines), end + after])
    return page


def _keys(model: type[BaseModel]) -> list[str]:
    docstrings = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(ast.parse(inspect.getsource(model)).body[0].body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    signs = {"ge": "at least", "gt": "more than", "le": "at most"}
    lines = []
    for name in inspect.get_annotations(model):
        field = model.model_fields[name]
        limits = [f", {signs[k]} {getattr(m, k):,}" for m in field.metadata for k in signs if hasattr(m, k)]
        default = (
            f"; default {_values([field.default])}"
            if name in docstrings and not field.default_factory
            else ""
        )
        lines.append(f"- **`{name}`** ({_type(field.annotation)}{''.join(limits)}{default}): ")
        lines[-1] += docstrings.get(name, f"See [below](#{name}).")
    return lines


def _transforms() -> list[str]:
    lines = []
    for name, entry in config.default_transforms().items():
        text = getattr(transforms, name).__doc__.split("\n\n")[0]
        lines.append(
            f"- **`{name}`** ({entry.stage}{', cannot be left out' * (name in config.needed())}): {text}"
        )
        lines += [f"  {line}" for line in _keys(config.SETTINGS[name])] if name in config.SETTINGS else []
    return lines


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _values(get_args(kind))
    names = {list: "list of numbers", dict: "mapping", config.KvCacheConfig: "mapping", type(None): "null"}
    return names.get(get_origin(kind) or kind) or " or ".join(map(_type, get_args(kind))) or kind.__name__


def _values(values: Any) -> str:
    return " or ".join(f"`{json.dumps(value)}`" for value in values).replace('"', "")


def _wrapped(text: str) -> str:
    indent, words = " " * text.index("-"), text.replace("``", "`").split()
    return textwrap.TextWrapper(118, indent, f"{indent}  ", break_on_hyphens=False).fill(" ".join(words))


if __name__ == "__main__":
    PAGE.write_text(updated(), encoding="utf-8")
