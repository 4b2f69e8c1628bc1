"""``migrate``: rewrite a YAML of AutoDeploy for ``attn_backend: flashinfer_trtllm``.

The text is edited in place, key by key, so that comments, order and style stay as they were. Which keys were
renamed: TensorRT-LLM pull request 10635 (between 1.2 and 1.3).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

import yaml

from ad_flashinfer_pass.errors import ConfigError

BACKEND = "flashinfer_trtllm"
PAGE_SIZES = (16, 32, 64, 128)
Path = tuple[str, ...]

_RENAMED: dict[Path, Path] = {
    ("attn_page_size",): ("kv_cache_config", "tokens_per_block"),
    ("free_mem_ratio",): ("kv_cache_config", "free_gpu_memory_fraction"),
    ("transforms", "resize_kv_cache", "free_mem_ratio"): ("kv_cache_config", "free_gpu_memory_fraction"),
    ("mamba_dtype",): ("kv_cache_config", "mamba_ssm_cache_dtype"),
    ("transforms", "insert_cached_attention", "cache_config", "dtype"): ("kv_cache_config", "dtype"),
    ("cuda_graph_batch_sizes",): ("cuda_graph_config", "batch_sizes"),
}
_REMOVED: dict[Path, str] = {
    ("use_pt_cache_backend",): "paged caches come with the backend",
    ("transforms", "fuse_rope_into_trtllm_attention"): "it leaves the rotation to the backend trtllm",
    ("transforms", "fuse_rope_into_flashinfer_trtllm"): "the backend fuses the rotation by itself",
    ("transforms", "insert_cached_attention", "backend"): "attn_backend says it",
}
_VALUES = {"float8_e4m3fn": "fp8", "torch.float8_e4m3fn": "fp8"}


@dataclass
class Migration:
    """A rewritten file."""

    before: str
    after: str
    notes: list[str] = field(default_factory=list)
    """What was done and why, one line each."""

    def diff(self, name: str) -> str:
        """Unified diff; empty if nothing changed."""
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, name, f"{name} (migrated)"))


def migrate(text: str) -> Migration:
    """Rewrite a config of ``trtllm-bench``, ``trtllm-serve`` or AutoDeploy's ``LlmArgs``.

    Args:
        text: YAML, a mapping.

    Raises:
        ConfigError: the text is no YAML mapping, or says the same thing under an old and a new key.
    """
    result = Migration(text, text if not text or text.endswith("\n") else text + "\n")
    root = _base(text)
    for path, why in _REMOVED.items():
        if _find(result.after, root + path) is not None:
            result.after = _remove(result.after, root + path)
            result.notes.append(f"removed {_dotted(root + path)}: {why}")
    for old, new in _RENAMED.items():
        _rename(result, root + old, root + new)
    page = (*root, "kv_cache_config", "tokens_per_block")
    size = _value(result.after, page)
    if size is not None and (not size.isdigit() or int(size) not in PAGE_SIZES):
        result.after = _set(result.after, page, "32")
        result.notes.append(f"{_dotted(page)}: {size} -> 32; kernels read pages of 16, 32, 64 and 128 tokens")
    backend = (*root, "attn_backend")
    previous = _value(result.after, backend)
    if previous != BACKEND:
        result.after = _set(result.after, backend, BACKEND)
        result.notes.append(f"{_dotted(backend)}: {previous or 'the default'} -> {BACKEND}")
    try:
        is_right = _backend_of(yaml.safe_load(result.after)) == BACKEND
    except (yaml.YAMLError, ValueError):
        is_right = False
    if not is_right:
        raise ConfigError(
            "a key cannot be rewritten in its place, because it stands twice or has no mapping below it: "
            "write it plainly, or set attn_backend by hand."
        )
    return result


def _backend_of(config: object) -> object:
    """What a reader of the file takes, wherever it stands."""
    if isinstance(config, dict) and isinstance(config.get("args"), dict):
        config = config["args"]
    return config.get("attn_backend") if isinstance(config, dict) else None


def _base(text: str) -> Path:
    """Where the arguments of ``LlmArgs`` are: examples/auto_deploy keeps them below ``args``."""
    found = _find(text, ("args",))
    return ("args",) if found is not None and isinstance(found[1], yaml.MappingNode) else ()


def _dotted(path: Path) -> str:
    return ".".join(path)


def _rename(result: Migration, old: Path, new: Path) -> None:
    found = _find(result.after, old)
    if found is None:
        return
    if _find(result.after, new) is not None:
        raise ConfigError(f"{_dotted(old)} is now {_dotted(new)}, and the file has both: remove one of them.")
    _, value = found
    text = result.after[value.start_mark.index : value.end_mark.index].strip()
    if isinstance(value, yaml.CollectionNode) and not value.flow_style:
        text = yaml.safe_dump(
            yaml.safe_load(yaml.serialize(value)), default_flow_style=True, width=10**6
        ).strip()
    comment = _comment_after(result.after, value)
    result.after = _set(_remove(result.after, old), new, _VALUES.get(text, text), comment)
    result.notes.append(f"{_dotted(old)} -> {_dotted(new)}")


def _comment_after(text: str, value: yaml.Node) -> str:
    """The comment that ends the line of a value, with the blanks before it."""
    if isinstance(value, yaml.CollectionNode) and not value.flow_style:  # it ends where the next token begins
        return ""
    rest = text[value.end_mark.index :].partition("\n")[0]
    return rest.rstrip() if rest.lstrip().startswith("#") else ""


def _root(text: str) -> yaml.MappingNode:
    try:
        node = yaml.compose(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"not YAML: {err}") from err
    except RecursionError:
        raise ConfigError("it is nested too deeply for a config.") from None
    if node is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [], flow_style=False)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("a config must be a mapping of keys to values.")
    return node


def _find(text: str, path: Path) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value of a path."""
    node: yaml.Node = _root(text)
    found = None
    for name in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        found = next(((key, value) for key, value in node.value if key.value == name), None)
        if found is None:
            return None
        node = found[1]
    return found


def _value(text: str, path: Path) -> str | None:
    found = _find(text, path)
    return str(found[1].value) if found is not None else None


def _remove(text: str, path: Path) -> str:
    """Take out a key, and each mapping that it leaves empty."""
    parent = _find(text, path[:-1]) if len(path) > 1 else None
    mapping = parent[1] if parent else _root(text)
    if len(path) > 1 and len(mapping.value) == 1:
        return _remove(text, path[:-1])
    found = _find(text, path)
    assert found is not None
    key, value = found
    if mapping.flow_style:
        return _remove_in_braces(text, mapping.value, key)
    lines = text.splitlines(keepends=True)
    return "".join(lines[: key.start_mark.line] + lines[_last_line(lines, key, value) + 1 :])


def _remove_in_braces(text: str, entries: list[tuple[yaml.Node, yaml.Node]], key: yaml.Node) -> str:
    """Take out an entry with one of its commas."""
    index = next(i for i, (other, _) in enumerate(entries) if other.value == key.value)
    start, end = key.start_mark.index, entries[index][1].end_mark.index
    if index + 1 < len(entries):
        end = entries[index + 1][0].start_mark.index
    elif index:
        start = entries[index - 1][1].end_mark.index
    return text[:start] + text[end:]


def _last_line(lines: list[str], key: yaml.Node, value: yaml.Node) -> int:
    """Where an entry of a block mapping ends, without the comments that stand before the next one."""
    end = value.end_mark
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    last = (
        end.line - 1 if is_block or not end.column else end.line
    )  # a block ends where the next token begins
    last = min(max(key.start_mark.line, last), len(lines) - 1)
    while last > key.start_mark.line and (not lines[last].strip() or lines[last].lstrip().startswith("#")):
        last -= 1
    return last


def _set(text: str, path: Path, value: str, comment: str = "") -> str:
    """Replace a value, or add the key and the mappings above it that are missing.

    The comment goes to the end of the line, where there is none yet.
    """
    found = _find(text, path)
    if found is not None:
        start, end = found[1].start_mark.index, found[1].end_mark.index
        return text[:start] + value + text[end:]
    depth = len(path) - 1
    while depth and _find(text, path[:depth]) is None:
        depth -= 1
    above = _find(text, path[:depth]) if depth else None
    mapping = above[1] if above else _root(text)
    if isinstance(mapping, yaml.MappingNode) and mapping.flow_style and mapping.value:
        inner = value
        for name in reversed(path[depth:]):
            inner = f"{name}: {inner}" if inner is value else f"{name}: {{{inner}}}"
        end = mapping.end_mark.index - 1
        brace, newline, rest = text[end:].partition("\n")
        comment = "" if brace.strip() != "}" else comment
        return f"{text[:end]}, {inner}{brace.rstrip() if comment else brace}{comment}{newline}{rest}"
    if above is None and not mapping.value and mapping.start_mark:  # {} is all there is
        text = text[: mapping.start_mark.index] + text[mapping.end_mark.index :]
    return _add_block(text, above, mapping, path[depth:], value + comment)


def _add_block(
    text: str, above: tuple[yaml.Node, yaml.Node] | None, mapping: yaml.Node, names: Path, value: str
) -> str:
    """New lines at the end of a block mapping, or below a key whose value is empty."""
    lines = text.splitlines(keepends=True)
    entries = mapping.value if isinstance(mapping, yaml.MappingNode) else []
    if entries:
        indent, row = entries[0][0].start_mark.column, _last_line(lines, *entries[-1])
    elif above is not None:
        indent, row = above[0].start_mark.column + 2, above[0].start_mark.line
        lines[row] = lines[row][: above[0].end_mark.column] + ":\n"
    else:
        indent, row = 0, len(lines) - 1
    new = [f"{' ' * (indent + 2 * i)}{name}:\n" for i, name in enumerate(names)]
    new[-1] = f"{new[-1].rstrip()} {value}\n"
    return "".join(lines[: row + 1] + new + lines[row + 1 :])
