"""Saved programs (.pt2), read without running anything that the file holds.

``torch.export.load`` runs what a file says: it evaluates guards and sizes as Python, unpickles example inputs
and some weights, imports modules that the types of inputs name, and executes a source that holds the file's
names. Here each part is read for what it is. Weights are bytes; sizes and guards must be of a small grammar;
names must be names; a call must be of an operator that torch knows; example inputs are left out. What remains
is data, of which torch's own deserializer makes the graph. All else is refused.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._export.verifier import SpecViolationError
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.errors import LoadError

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer, which a file may call

# What zipfile, json, sympy and torch's deserializer raise for a file that is damaged.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    SpecViolationError,
)

_NAME = re.compile(r"\w*", re.ASCII)
_DOTTED = re.compile(r"[\w.+\-]*", re.ASCII)  # also versions and infinities
_SYMBOL = re.compile(r"[a-z]{1,4}\d+|true|false")
_OP = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", re.ASCII)
_PLAIN_CALL = re.compile(r"_operator\.[a-z]\w*|math\.(trunc|ceil|floor|sqrt)|torch\._?sym_[a-z]+")
_HIGHER_ORDER = re.compile(
    r"torch\.ops\.higher_order\."
    r"(wrap_with_set_grad_enabled|wrap_with_autocast|flex_attention|cond|while_loop|scan|associative_scan)"
)
_OPERATORS = frozenset(
    "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ not_ lshift rshift".split()
)

_ARITHMETIC = (
    *(ast.Expression, ast.Load, ast.Name, ast.Constant, ast.Call, ast.UnaryOp, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
)
_SYMPY_NODES = (*_ARITHMETIC, ast.keyword)
_SYMPY_CALLS = frozenset(
    # sympy's, as srepr writes them
    "Symbol Integer Rational Float Add Mul Pow Max Min Abs Eq Ne Lt Le Gt Ge Equality Unequality LessThan "
    "StrictLessThan GreaterThan StrictGreaterThan And Or Not Piecewise ExprCondPair floor ceiling "
    # torch's
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift "
    "PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt "
    "RoundToInt RoundDecimal ToFloat Identity".split()
)
_GUARD_NODES = (
    *_ARITHMETIC,
    *(ast.Attribute, ast.Subscript, ast.IfExp, ast.BoolOp, ast.And, ast.Or, ast.Not),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_GUARD_CALLS = frozenset(
    "max min abs int float round math.trunc math.ceil math.floor math.sqrt math.isnan math.isinf "
    "IsNonOverlappingAndDenseIndicator cast_symbool_to_symint_guardless".split()
)
_OF_A_TENSOR = ("size", "stride", "storage_offset", "dim", "item")
_POWERS = frozenset("Pow PowByNatural FloatPow LShift RShift".split())
_LARGEST_POWER = 64
_LONGEST = 10_000


def load(file: Path | str) -> ExportedProgram:
    """Read what ``torch.export.save`` wrote, without running anything of it.

    Args:
        file: a .pt2 file of torch 2.9 or later.

    Returns:
        The program, its weights on the device where they were. In place of its example inputs it has tensors
        without elements.

    Raises:
        LoadError: there is no such file, it is damaged, or it holds what only code of the file could read.
    """
    with _reading(Path(file)) as archive:
        return _program(archive, None)


def load_module(file: Path | str, device: str | torch.device = "cpu") -> fx.GraphModule:
    """The module of a saved program, on a device.

    Raises:
        LoadError: as ``load``.
    """
    with _reading(Path(file)) as archive:
        program = move_to_device_pass(_program(archive, device), str(device))
        _check_values(program)
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        return module


@contextmanager
def _reading(file: Path) -> Iterator[_Archive]:
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "no such file"
        raise LoadError(f"{file}: {what}; give one that torch.export.save wrote.")
    if not zipfile.is_zipfile(file):
        raise LoadError(
            f"{file} is not a zip file, as a saved ExportedProgram is; give one that torch.export.save wrote."
        )
    try:
        with zipfile.ZipFile(file) as archive:
            yield _Archive(archive, file.stat().st_size)
    except LoadError as err:
        raise LoadError(f"{file}: {err}") from None
    except RecursionError:
        raise LoadError(f"{file} is nested too deeply to be a saved ExportedProgram.") from None
    except DAMAGE as err:
        cause = " ".join(str(err).split())[:200]
        raise LoadError(
            f"{file} cannot be read as a saved ExportedProgram ({type(err).__name__}: {cause}). "
            "Save one with torch.export.save, with the version of torch that is used here."
        ) from err


class _Archive:
    """The parts of a file, by their names below its one folder."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise LoadError("its parts are compressed, which torch.export.save never does.")
        if sum(part.file_size for part in parts) > size:
            raise LoadError("its parts are larger than the file: it is cut off or damaged.")
        self._archive = archive
        self._root = parts[0].filename.partition("/")[0]
        self.names = {part.filename.partition("/")[2] for part in parts}

    def read(self, name: str) -> bytes:
        if name not in self.names:
            raise LoadError(f"it has no part {name}, as torch.export.save of torch 2.9 and later writes.")
        return self._archive.read(f"{self._root}/{name}")


def _program(archive: _Archive, device: str | torch.device | None) -> ExportedProgram:
    from torch._export.serde import schema, serialize  # imports Dynamo, which takes seconds

    data = json.loads(archive.read("models/model.json"))
    guards = data.pop("guards_code", None) or []
    module = data["graph_module"]
    for extra in ("metadata", "treespec_namedtuple_fields"):  # of the user's own, and not read here
        module.pop(extra, None)
    data = _checked(data, "")
    data["guards_code"] = [_guard(guard) for guard in guards]
    program = serialize.ExportedProgramDeserializer().deserialize(
        serialize._dict_to_dataclass(schema.ExportedProgram, data),
        _tensors(archive, "weights", "weight_", device),
        _tensors(archive, "constants", "tensor_", device),
    )
    program.example_inputs = _stand_ins(program)
    return program


def _tensors(
    archive: _Archive, kind: str, prefix: str, device: str | torch.device | None
) -> dict[str, Tensor]:
    """The weights, or the constants, by name; those that share memory share it here too."""
    from torch._export.serde import schema, serialize  # as in _program

    listed = json.loads(archive.read(f"data/{kind}/model_{kind}_config.json"))
    config = serialize._dict_to_dataclass(schema.PayloadConfig, _checked(listed, ""))
    flat: dict[tuple[str, torch.dtype], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, entry in config.config.items():
        meta = entry.tensor_meta
        if entry.use_pickle or meta is None or not entry.path_name.startswith(prefix):
            raise LoadError(
                f"its {name} is a pickled object, which is code, and is not read. If you trust the file, "
                "load it with torch.export.load and give the program to transform."
            )
        dtype = serialize.deserialize_scalar_type(meta.dtype)
        shape, stride = serialize.deserialize_size(meta.sizes), serialize.deserialize_stride(meta.strides)
        key = entry.path_name, dtype
        if key not in flat:
            content = bytearray(archive.read(f"data/{kind}/{entry.path_name}"))
            # Without bytes: of a program that was exported without weights.
            all_of_it = torch.frombuffer(content, dtype=dtype) if content else torch.zeros(shape, dtype=dtype)
            place = serialize.deserialize_device(meta.device) if device is None else torch.device(device)
            flat[key] = all_of_it.to(place)
        offset = serialize.deserialize_storage_offset(meta.storage_offset)
        tensor = flat[key].as_strided(shape, stride, offset)
        tensors[name] = nn.Parameter(tensor, meta.requires_grad) if entry.is_param else tensor
    return tensors


class _Shapes(fx.Interpreter):
    """Runs a graph on tensors without memory, and compares what comes with what the file says of it."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return _example(n.meta.get("val"))
        result = super().run_node(n)
        said = n.meta.get("val")
        if isinstance(said, Tensor) and isinstance(result, Tensor):
            sizes = _sizes(said)
            if sizes is not None and (list(result.shape), result.dtype) != (sizes, said.dtype):
                raise LoadError(f"its value {n.name} is {result.dtype} {list(result.shape)}, not as it says.")
        return result


def _check_values(program: ExportedProgram) -> None:
    """Refuse a graph that contradicts itself.

    Raises:
        LoadError: a value has another shape or dtype than the file says, or a call cannot be made.
    """
    held = {**program.state_dict, **program.constants}
    for spec, node in zip(
        program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True
    ):
        tensor, said = held.get(spec.target or ""), node.meta.get("val")
        if tensor is not None and (tensor.shape, tensor.dtype) != (said.shape, said.dtype):
            raise LoadError(
                f"its {spec.target} is {tensor.dtype} {list(tensor.shape)}, not as the graph says."
            )
    with (
        FakeTensorMode(),
        torch.no_grad(),
        # Beyond a value that only a run has, or an op without a fake, there is nothing to compare.
        suppress(DataDependentOutputException, DynamicOutputShapeException, NotImplementedError),
    ):
        shapes = _Shapes(program.graph_module)
        shapes.extra_traceback = False  # an error is one line here
        shapes.run()


def _example(value: object) -> Any:
    """A tensor of the sizes of the example from which a program was exported."""
    if not isinstance(value, Tensor):
        return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
    sizes = _sizes(value)
    if sizes is None:
        raise NotImplementedError
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _sizes(value: Tensor) -> list[int] | None:
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return None if None in sizes else sizes


def _stand_ins(program: ExportedProgram) -> tuple[Any, Any]:
    """Inputs in the structure of the program's, without which torch does not check what its guards say."""
    spec = program.call_spec.in_spec
    if spec is None:
        raise LoadError("it does not say what inputs it takes.")
    inputs = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    given = [each.arg for each in program.graph_signature.input_specs if each.kind is InputKind.USER_INPUT]

    def stand_in(arg: Any) -> Any:
        if isinstance(arg, ConstantArgument):
            return arg.value
        value = inputs[arg.name]
        return torch.empty(0, dtype=value.dtype) if isinstance(value, Tensor) else 0

    leaves = [stand_in(arg) for arg in given]
    return pytree.tree_unflatten(leaves, spec)


def _checked(value: Any, key: str, in_node: bool = False) -> Any:
    """The JSON of a program without what is not needed of it, once every text is what its place asks for.

    Args:
        value: from the file.
        key: under which it stands there.
        in_node: whether it belongs to a node, whose texts are arguments and go nowhere else.
    """
    if isinstance(value, dict):
        if in_node and key == "metadata":
            return _metadata(value)
        inner = key != "graph" and (in_node or key == "nodes")
        return {_text(name, _DOTTED, "name"): _checked(item, name, inner) for name, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, key, in_node or key == "nodes") for item in value]
    if not isinstance(value, str):
        return value
    if key == "expr_str":
        return checked_expression(value)
    if key in ("target", "as_operator"):
        return checked_operator(value)
    if key in ("in_spec", "out_spec"):
        return _structure(value)
    if key in ("as_string", "as_strings") and in_node:
        return value
    return _text(value, _NAME if key in ("name", "as_name") else _DOTTED, key)


def _text(value: object, pattern: re.Pattern[str], key: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise LoadError(f"{value!r:.80} is not a {key or 'value'} that torch.export.save writes.")
    return value


def _metadata(data: dict[str, object]) -> dict[str, str]:
    """Of a node: where it stands in the source and among modules, as one can print it."""
    kept = {key: str(data[key]) for key in ("stack_trace", "nn_module_stack") if key in data}
    return {
        key: "".join(c for c in text if c == "\n" or (c.isprintable() and c not in '"\\'))
        for key, text in kept.items()
    }


def checked_operator(target: str) -> str:
    """A call of torch's registry, or of a number's operators."""
    op = _OP.fullmatch(target)
    if op is not None:
        found: Any = torch.ops
        for name in op.groups():
            found = getattr(found, name, None)
        if not isinstance(found, torch._ops.OpOverload):
            raise LoadError(f"it calls {target}, which is not registered here: import the module of that op.")
        # TorchScript's own (aten::save, aten::open) are not the dispatcher's; of those one opens a file.
        if torch._C._dispatch_has_kernel(found.name()) and "from_file" not in target:
            return target
    elif _PLAIN_CALL.fullmatch(target):
        module, _, name = target.partition(".")
        if module != "_operator" or name in _OPERATORS:
            return target
    elif _HIGHER_ORDER.fullmatch(target):
        return target
    raise LoadError(f"it calls {target:.80}, which is not an operation on tensors or sizes.")


def _structure(text: str) -> str:
    """Of inputs or outputs; what stands beside a type may be names and numbers, never an object to import."""

    def check(spec: Any) -> None:
        context = spec["context"]
        if isinstance(context, str) and context[:1] in '[{"':
            context = json.loads(context)
        for item in context if isinstance(context, list) else [context]:
            if isinstance(item, str):
                _text(item, _DOTTED, "name of an input or output")
            elif isinstance(item, (dict, list)):
                raise LoadError(f"an input or output, a {spec['type']}, names Python objects to import.")
        for child in spec["children_spec"]:
            check(child)

    version, spec = json.loads(text)
    check(spec)
    return json.dumps([version, spec])


def checked_expression(text: str) -> str:
    """A size, as sympy writes it."""

    def check(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return _called(node) in _SYMPY_CALLS
        if isinstance(node, ast.Name):
            return node.id in _SYMPY_CALLS or bool(_SYMBOL.fullmatch(node.id))
        return True

    return ast.unparse(_parsed(text, "a size", _SYMPY_NODES, check))


def _guard(text: object) -> str:
    """What export assumed of its inputs: a comparison of their sizes."""

    def check(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in _OF_A_TENSOR:
                return not node.args and not node.keywords
            return ast.unparse(node.func) in _GUARD_CALLS
        if isinstance(node, ast.Name):
            return node.id in ("L", "math", "inf") or node.id in _GUARD_CALLS
        if isinstance(node, ast.Attribute):
            return node.attr in _OF_A_TENSOR or ast.unparse(node) in _GUARD_CALLS
        return True

    return ast.unparse(_parsed(str(text), "a guard", _GUARD_NODES, check))


def _parsed(
    text: str, what: str, nodes: tuple[type[ast.AST], ...], check: Callable[[ast.AST], bool]
) -> ast.Expression:
    """Parse an expression whose every node is of a kind in ``nodes`` and passes ``check``."""
    try:
        tree = ast.parse(text if len(text) <= _LONGEST else "", mode="eval")
    except (SyntaxError, ValueError):
        tree = None
    if tree is None or not all(
        isinstance(n, nodes) and _is_plain(n) and _is_computable(n) and check(n) for n in ast.walk(tree)
    ):
        raise LoadError(f"{text!r:.80} is not an expression that torch.export.save writes for {what}.")
    return tree


def _is_plain(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant):
        return True
    if isinstance(node.value, str):
        return bool(_DOTTED.fullmatch(node.value))
    return isinstance(node.value, (bool, float)) or (isinstance(node.value, int) and node.value < 2**63)


def _called(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _is_power(node: ast.AST) -> bool:
    return _called(node) in _POWERS or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow))


def _is_computable(node: ast.AST) -> bool:
    """Whether it is no power, or a low one with none inside."""
    if not _is_power(node):
        return True
    *_, exponent = ast.iter_child_nodes(node)  # the last of what a call or an operator takes
    numbers = [each.value for each in ast.walk(exponent) if isinstance(each, ast.Constant)]
    return not any(map(_is_power, list(ast.walk(node))[1:])) and all(
        number <= _LARGEST_POWER for number in numbers if isinstance(number, int)
    )
