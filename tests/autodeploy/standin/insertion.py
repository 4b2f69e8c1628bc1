"""The insertion of cached attention; AD/transform/library/kvcache.py."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from tests.autodeploy.standin import Generation
    from tests.autodeploy.standin.interface import CachedSequenceInterface

SWAPPABLE = ("cache_loc", "cu_num_pages", "last_page_len", "seq_len_with_cache")
"""kvcache.py: vswa_swappable_bases."""


def kvcache(generation: Generation) -> dict[str, Any]:
    """The names of AD/transform/library/kvcache.py that are looked for."""
    return {"_InsertCachedOperator": InsertWithPools if generation.window_pools else InsertByHandlers}


class InsertByHandlers:
    """kvcache.py of E5: handlers, placeholders r{n}_{key}.

    q, k, v, *standard metadata, *extra metadata, *caches, *constants; q, k and v are taken before
    ``prepare_node_for_cache_insertion``, and a mask comes last.
    """

    def __init__(self, cm: CachedSequenceInterface, descriptor: Any) -> None:
        self.cm, self.descriptor = cm, descriptor

    def apply(self, gm: fx.GraphModule) -> int:
        """Replace every source attention; returns their number."""
        nodes = source_nodes(gm, self.descriptor)
        standard = [self.add_input(gm, name) for name in self.descriptor.get_standard_metadata_args()]
        extra = self.extra_metadata(gm, nodes[0], lambda name: name)
        for node in nodes:
            qkv = node.args[: self.descriptor.get_num_qkv_args()]
            caches = self.add_caches(gm, node)
            self.descriptor.prepare_node_for_cache_insertion(gm, node)
            mask = node.kwargs.get("attn_mask")
            constants = self.descriptor.get_constants(node)
            args = (*qkv, *standard, *extra, *caches, *constants)
            self.replace(gm, node, args if mask is None else (*args, mask))
        gm.recompile()
        return len(nodes)

    def add_caches(self, gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
        """``cm.add_resource`` for each handler."""
        handlers = self.descriptor.get_cache_initializers(node, self.cm.kv_cache_config)
        return [add_placeholder(gm, self.cm.add_resource(key, handler)) for key, handler in handlers.items()]

    def add_input(self, gm: fx.GraphModule, name: str) -> fx.Node:
        """``_add_or_retrieve_input``: a placeholder of that name, activated if it is new."""
        found = [node for node in gm.graph.find_nodes(op="placeholder") if node.target == name]
        if found:
            return found[0]
        self.cm.info.activate_arg(name)
        return add_placeholder(gm, name)

    def extra_metadata(
        self, gm: fx.GraphModule, node: fx.Node, rename: Callable[[str], str]
    ) -> list[fx.Node]:
        """``_process_metadata_extra``: inputs matched by the names in the schema, constants after them."""
        op, count, constants = self.descriptor.get_prepare_extra_metadata_info(node)
        available = self.cm.info.available_args
        names = [arg.name for arg in op._schema.arguments if arg.name in available]
        inputs = [self.add_input(gm, rename(name)) for name in names]
        last = list(gm.graph.find_nodes(op="placeholder"))[-1]
        with gm.graph.inserting_before(last.next):
            prepared = gm.graph.call_function(op, (*inputs, *constants))
            return [gm.graph.call_function(operator.getitem, (prepared, i)) for i in range(count)]

    def replace(self, gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...]) -> None:
        """``_insert_cached_attn_node``."""
        with gm.graph.inserting_before(node):
            cached = gm.graph.call_function(self.descriptor.get_cached_attention_op(), args)
        node.replace_all_uses_with(cached)
        gm.graph.erase_node(node)


class InsertWithPools(InsertByHandlers):
    """kvcache.py of summer 2026: groups of equal handlers are pools, each with metadata of its own."""

    def apply(self, gm: fx.GraphModule) -> int:
        """Replace every source attention; returns their number."""
        cm, descriptor = self.cm, self.descriptor
        nodes = source_nodes(gm, descriptor)
        cm.set_kernel_handles_cyclic_swa(descriptor.kernel_handles_cyclic_swa())
        names = descriptor.get_standard_metadata_args()
        standard = [self.add_input(gm, name) for name in names]
        meta_nodes_extra_by_group = {0: self.extra_metadata(gm, nodes[0], lambda name: name)}
        windows: list[int] = []
        layers = []
        caches_of: dict[int, tuple[list[fx.Node], int]] = {}
        for node in nodes:
            qkv = node.args[: descriptor.get_num_qkv_args()]
            layer, shared = descriptor.get_layer_idx(node), descriptor.get_shared_kv_source_layer_idx(node)
            if shared is not None:
                assert descriptor.supports_shared_kv()
                caches, group = caches_of[shared]
            else:
                caches = self.add_caches(gm, node)
                handler = cm._handlers[caches[0].name]
                if handler.sliding_window >= cm.info.max_seq_len:
                    handler.sliding_window = 0
                window = handler.sliding_window or cm.info.max_seq_len
                if window not in windows:
                    windows.append(window)
                group = windows.index(window)
            if layer is not None:
                assert shared is not None or layer not in caches_of, f"duplicate owner of layer {layer}"
                caches_of[layer] = (caches, group)
            descriptor.prepare_node_for_cache_insertion(gm, node)
            mask = node.kwargs.get("attn_mask")
            layers.append((node, qkv, caches, descriptor.get_constants(node), group, mask))
        cm.info.register_window_groups(windows)
        cm.set_kv_groups(windows)
        standard_by_group = {0: standard}
        for g in range(1, len(windows)):
            rename = {name: f"{name}_g{g}" for name in SWAPPABLE}
            standard_by_group[g] = [self.add_input(gm, rename.get(name, name)) for name in names]
            meta_nodes_extra_by_group[g] = self.extra_metadata(gm, nodes[0], _renamer(rename))
        for node, qkv, caches, constants, g, mask in layers:
            args = (*qkv, *standard_by_group[g], *meta_nodes_extra_by_group[g], *caches, *constants)
            self.replace(gm, node, args if mask is None else (*args, mask))
        gm.recompile()
        return len(nodes)


def _renamer(names: dict[str, str]) -> Callable[[str], str]:
    return lambda name: names.get(name, name)


def source_nodes(gm: fx.GraphModule, descriptor: Any) -> list[fx.Node]:
    """``is_op(n, source_op)``: the packet or an overload of it."""
    packet = descriptor.get_source_attention_op()
    return [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and getattr(node.target, "overloadpacket", node.target) is packet
    ]


def add_placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    """``add_graph_input``: after the last placeholder."""
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    with gm.graph.inserting_after(last):
        return gm.graph.placeholder(name)


def propagate_shapes(gm: fx.GraphModule, *example: torch.Tensor) -> None:
    """``run_shape_prop``: every op runs under FakeTensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example)
