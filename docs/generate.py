"""Writes docs/api.md, and the lists of docs/config.md, from the sources: python docs/generate.py."""

import ast
import inspect
import itertools
import json
import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

import ad_flashinfer_pass
from ad_flashinfer_pass import autodeploy_keys, config, transforms

PAGE, API = (Path(__file__).parent / name for name in ("config.md", "api.md"))

# The names that are explained, with the file of each where the package does not say it.
PARTS = {
    "Generate": (
        "build_model",
        "LLM",
        "SamplingParams",
        "GuidedDecodingParams",
        "GenerationResult",
        "Progress",
    ),
    "Transform": ("transform_module", "transform", "to_program", "restore", "CachedModel"),
    "torch.compile": ("CacheSession",),
    "Look at what it did": tuple(
        f"inspection.{name}" for name in ("explain", "dump", "diff", "plan", "lint", "check", "report")
    ),
}
# Called by parts of the package, not by users.
_INNER = "config group note_split refuse_if_open release nest forward sample_and_advance".split()


def api() -> str:
    """The page of the public names: signatures and docstrings."""
    package = Path(ad_flashinfer_pass.__file__).parent
    lines = [
        "# The Python API",
        "",
        "`python docs/generate.py` writes this page from the docstrings. Every name is imported from "
        "`ad_flashinfer_pass`.",
        "`AutoDeployConfig`, `KvCacheConfig`, `SpeculativeConfig` and `TransformConfig` have the keys of "
        "[this page](config.md).",
    ]
    for title, names in PARTS.items():
        lines += ["", f"## {title}"]
        for path in names:
            home = ad_flashinfer_pass._HOME.get(
                path, path.replace("inspection.check", "inspection.check.check")
            )
            file = package / f"{home.replace('.', '/')}.py"
            body = ast.parse(file.read_text(encoding="utf-8")).body
            name = path.rpartition(".")[2]
            node = next(each for each in body if getattr(each, "name", None) == name)
            lines += [
                "",
                f"### {path}",
                *(_class(node) if isinstance(node, ast.ClassDef) else _function(node)),
            ]
    errors = ast.parse((package / "errors.py").read_text(encoding="utf-8"))
    return "\n".join([*lines, "", "## Errors", *_docstring(errors)]) + "\n"


def _class(node: ast.ClassDef) -> list[str]:
    methods = {
        each.name: each for each in node.body if isinstance(each, ast.FunctionDef)
    }  # the last overload
    made = methods.get("__init__")
    lines = [*(_function(made, node.name)[:-1] if made is not None else []), *_docstring(node)]
    lines += [""] * any(isinstance(each, ast.AnnAssign) for each in node.body)
    for field, text in itertools.pairwise([*node.body, None]):
        if isinstance(field, ast.AnnAssign):
            said = f": {text.value.value}" if isinstance(text, ast.Expr) else ""
            lines.append(_wrapped(f"- `{ast.unparse(field)}`{said}"))
    for name, method in methods.items():
        if not name.startswith("_") and name not in _INNER:
            lines += ["", f"#### {node.name}.{name}", *_function(method)]
    return lines


def _function(node: ast.FunctionDef, name: str = "") -> list[str]:
    given = ast.unparse(node.args).removeprefix("self").removeprefix(", ").replace("=", " = ")
    returned = ast.unparse(node.returns)
    call = f"{name or node.name}({given})" + f" -> {returned}" * (not name)
    if any(ast.unparse(each) in ("property", "cached_property") for each in node.decorator_list):
        call = f"{node.name}: {returned}"
    call = textwrap.fill(call, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return ["", "```python", call, "```", *_docstring(node)]


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list[str]:
    """As Markdown, after a blank line: Args and Raises are lists, Returns and Yields are paragraphs."""
    lines, section = [""], ""
    for line in (ast.get_docstring(node) or "").replace("``", "`").replace("::\n\n", "").splitlines():
        is_heading = re.fullmatch("(Args|Returns|Yields|Raises):", line)
        item = re.fullmatch(r"    (\w+): (.*)", line) if section in ("Args:", "Raises:") else None
        section = line if is_heading else section if line.startswith("    ") else ""
        if is_heading:
            lines += [f"**{line[:-1]}**", ""]
        elif item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section:
            lines.append(line.strip() if section in ("Returns:", "Yields:") else f"  {line.strip()}")
        else:
            lines.append(line)
    return lines


def updated() -> str:
    """The page with its lists made anew."""
    page = PAGE.read_text(encoding="utf-8")
    neutral = sorted(autodeploy_keys._NEUTRAL.items())
    unused = {*autodeploy_keys._NOTHING, *(f"kv_cache_config.{k}" for k in autodeploy_keys._NOTHING_OF_CACHE)}
    lists = {
        "top level": _keys(config.AutoDeployConfig),
        "kv_cache_config": _keys(config.KvCacheConfig),
        "speculative_config": _keys(config.SpeculativeConfig),
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
            if name in docstrings and not field.default_factory and not field.is_required()
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
    names = {list: "list of numbers", dict: "mapping", type(None): "null"}
    names |= {config.KvCacheConfig: "mapping", config.SpeculativeConfig: "mapping"}
    return names.get(get_origin(kind) or kind) or " or ".join(map(_type, get_args(kind))) or kind.__name__


def _values(values: Any) -> str:
    return " or ".join(f"`{json.dumps(value)}`" for value in values).replace('"', "")


def _wrapped(text: str) -> str:
    indent, words = " " * text.index("-"), text.replace("``", "`").split()
    return textwrap.TextWrapper(118, indent, f"{indent}  ", break_on_hyphens=False).fill(" ".join(words))


if __name__ == "__main__":
    PAGE.write_text(updated(), encoding="utf-8")
    API.write_text(api(), encoding="utf-8")
