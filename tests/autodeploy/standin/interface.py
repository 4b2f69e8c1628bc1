"""SequenceInfo, the cache interface, the attention registry and the resource handlers of each generation."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from tests.autodeploy.standin import Generation

POISON = float("nan") if torch.cuda.is_available() else 100.0
"""What pools hold where no token was written; the reference decode, only used on a CPU, needs it finite."""


class Request(NamedTuple):
    """One sequence of a step."""

    token_ids: Sequence[int]
    input_pos: int
    pages: Sequence[int]
    """Of all its tokens, in every pool."""


class SequenceInfo:
    """The inputs of the graph.

    E5, attention_interface.py ``SequenceInfo.__init__``: tensor_specs (names, capacities, dtypes), persistent
    views of one buffer, all but input_ids and position_ids passed at full capacity.
    """

    def __init__(
        self,
        generation: Generation,
        max_seq_len: int,
        max_batch_size: int,
        max_num_tokens: int,
        page_size: int,
    ) -> None:
        self.generation = generation
        self.max_seq_len, self.max_num_tokens = max_seq_len, max_num_tokens
        # E5: "Buffer capacity must accommodate at least bs=2"
        self.max_batch_size = max(2, max_batch_size)
        self.max_blocks_per_seq = -(-max_seq_len // page_size)
        self.tokens_per_block = self._page = page_size
        self.num_pages = self.num_blocks = 0
        self.device = torch.device("cpu")
        b, t = self.max_batch_size, max_num_tokens
        self._specs: dict[str, tuple[int, torch.dtype]] = {
            "input_ids": (t, torch.int),
            "position_ids": (t, torch.long),
            "seq_len": (b, torch.int),
            "cu_seqlen": (b + 1, torch.int),
            "input_pos": (b, torch.int),
            "cu_num_pages": (b + 1, torch.int),
            "seq_len_with_cache": (b, torch.int),
            "last_page_len": (b, torch.int),
            "cache_loc": (t, torch.int),  # resized later
        }
        self._windows: list[int] = []
        self._host: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self._active = ["input_ids", "position_ids"]
        size = generation.batch_info
        self._batch_info = torch.zeros(size, dtype=torch.int32)
        self._shape = (1, 1)
        self._make_views()

    def _make_views(self) -> None:
        """Views of fresh memory (``InputBuffer.resize`` makes them anew)."""
        for name, (size, dtype) in self._specs.items():
            self._host[name] = torch.zeros(size, dtype=dtype)
            self._views[name] = torch.zeros(size, dtype=dtype, device=self.device)
        self._poison()

    def _poison(self) -> None:
        """Entries that are stale: what some other step could have left."""
        draw = random.Random(0)
        top = {"cache_loc": max(1, self.num_pages), "position_ids": self.max_seq_len, "input_ids": 8}
        for name, view in self._views.items():
            limit = top.get(name.split("_g")[0], self.max_seq_len)
            view.copy_(torch.tensor([draw.randrange(limit) for _ in range(view.numel())]))

    def to(self, device: torch.device) -> None:
        """Move the inputs."""
        self.device = device
        self._make_views()

    @property
    def available_args(self) -> set[str]:
        """What a graph may ask for."""
        return {*self._specs, *(f"{name}_host" for name in self._specs), "batch_info_host"}

    def activate_arg(self, name: str) -> None:
        """Make it an input of the graph."""
        assert name in self.available_args, f"{name} not found in {sorted(self.available_args)}"
        if name not in self._active:
            self._active.append(name)

    @property
    def named_args(self) -> dict[str, Tensor]:
        """The active inputs, the same objects at every call except the two that are shaped."""
        return {name: self._arg(name) for name in self._active}

    def _arg(self, name: str) -> Tensor:
        if name == "batch_info_host":
            return self._batch_info
        if name.endswith("_host"):
            return self._host[name.removesuffix("_host")]
        view = self._views[name]
        if name in ("input_ids", "position_ids"):
            return view[: self._shape[0] * self._shape[1]].view(self._shape)
        return view

    def update_cache_information(self, num_pages: int, block_offset_multiplier: int) -> None:
        """``update_cache_information``."""
        self.num_pages = self.num_blocks = num_pages
        wanted = self.max_batch_size * self.max_blocks_per_seq + 1
        for name in [name for name in self._specs if name.startswith("cache_loc")]:
            self._specs[name] = (max(wanted, self._specs[name][0]), torch.int)
        self._make_views()
        self._batch_info[6:10] = torch.tensor(
            [self.max_seq_len, self.max_blocks_per_seq, block_offset_multiplier, self.max_batch_size]
        )

    def register_host_prepare_for_attention_forward(self, function: Any, args: list[str]) -> None:
        """The plugin has no such function."""
        raise AssertionError("the plugin must not need a host-prepare function")

    def register_window_groups(self, windows: list[int]) -> None:
        """E6 kvcache.py: one set of page inputs a pool, suffixed _g1 and on."""
        self._windows = windows
        for i in range(1, len(windows)):
            for name in ("cache_loc", "cu_num_pages", "last_page_len", "seq_len_with_cache"):
                self._specs[f"{name}_g{i}"] = self._specs[name]
        self._make_views()

    def set_max_draft_len(self, max_draft_len: int) -> None:
        """E6 ``BatchInfo.update_max_draft_len``."""
        if self._batch_info.numel() > 12:
            self._batch_info[12] = max_draft_len

    def nest_sequences(self, requests: Sequence[Request], *, num_extend: int = 0) -> None:
        """Write one step; ``requests`` are ordered prefill, extend, decode. Tails stay as they were."""
        lens = [len(r.token_ids) for r in requests]
        past = [r.input_pos for r in requests]
        num_decode = next((i for i, n in enumerate(reversed(lens)) if n != 1), len(lens))
        self._count(lens, num_extend, num_decode)
        generate = num_decode == len(lens)
        self._shape = (len(lens), 1) if generate else (1, sum(lens))
        self._write("input_ids", [t for r in requests for t in r.token_ids])
        self._write("position_ids", [p + i for p, n in zip(past, lens, strict=True) for i in range(n)])
        self._write("seq_len", lens)
        self._write("cu_seqlen", [0, *accumulate(lens)])
        self._write("input_pos", past)
        for i in range(max(1, len(self._windows))):
            self._write_pages(requests, i)

    def _count(self, lens: list[int], num_extend: int, num_decode: int) -> None:
        rest = len(lens) - num_decode
        tokens = [sum(lens[: rest - num_extend]), sum(lens[rest - num_extend : rest])]
        # E5 BatchInfo: prefill, extend and decode, each with its tokens
        counted = [rest - num_extend, tokens[0], num_extend, tokens[1], num_decode, num_decode]
        self._batch_info[:6] = torch.tensor(counted)

    def _write_pages(self, requests: Sequence[Request], pool: int) -> None:
        """E6: in a pool of a window, pages that every new token has left behind are gone, from the front."""
        window = self._windows[pool] if self._windows else self.max_seq_len
        gone = [max(0, r.input_pos - window + 1) // self._page for r in requests]
        used = [-(-(r.input_pos + len(r.token_ids)) // self._page) for r in requests]
        pages = [list(r.pages[g:u]) for r, g, u in zip(requests, gone, used, strict=True)]
        total = [r.input_pos + len(r.token_ids) - g * self._page for r, g in zip(requests, gone, strict=True)]
        suffix = f"_g{pool}" if pool else ""
        self._write(f"cache_loc{suffix}", [page for one in pages for page in one])
        self._write(f"cu_num_pages{suffix}", [0, *accumulate(len(one) for one in pages)])
        self._write(f"seq_len_with_cache{suffix}", total)
        self._write(f"last_page_len{suffix}", [(n - 1) % self._page + 1 for n in total])

    def _write(self, name: str, values: list[int]) -> None:
        self._host[name][: len(values)] = torch.tensor(values, dtype=self._host[name].dtype)
        self._views[name][: len(values)] = self._host[name][: len(values)].to(self.device)

    def set_generate_only_batch(self, batch_size: int) -> None:
        """``set_generate_only_batch``: [[1]] * bs, input_pos 0, cache_loc range(sum(pages))."""
        self.nest_sequences([Request([1], 0, [i]) for i in range(batch_size)])

    def set_max_num_tokens_sample(self) -> None:
        """``set_max_num_tokens_sample``: max_batch_size sequences of max_num_tokens // max_batch_size."""
        each = min(self.max_num_tokens // self.max_batch_size, self.max_seq_len)
        pages = -(-each // self._page)
        self.nest_sequences(
            [Request([1] * each, 0, range(i * pages, (i + 1) * pages)) for i in range(self.max_batch_size)]
        )


class BatchInfo:
    """Wrapper of ``batch_info_host``; attention_interface.py ``BatchInfo`` of E5."""

    def __init__(self, batch_info_host: Tensor) -> None:
        self.batch_info_host = batch_info_host


class BatchInfoWithDrafts(BatchInfo):
    """Of E6, as shim/interface.py uses it; where its integer stands was not read."""

    def get_max_draft_len(self) -> int:
        """Draft tokens of one request, at most."""
        return int(self.batch_info_host[12])


class KVPagedResourceHandler:
    """E3 on, attention_interface.py ``KVPagedResourceHandler``."""

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_factor: int = 2,
        kv_layout: str = "HND",
    ) -> None:
        assert kv_layout == "HND"
        self.num_kv_heads, self.head_dim, self.dtype = num_kv_heads, head_dim, dtype
        self.kv_factor, self.kv_layout, self.sliding_window = kv_factor, kv_layout, 0

    def key(self) -> tuple[Any, ...]:
        """``__eq__``: head_dim, dtype, kv_factor, kv_layout and, since E6, sliding_window."""
        return self.head_dim, self.dtype, self.kv_factor, self.kv_layout, self.sliding_window


class WindowedHandler(KVPagedResourceHandler):
    """E6, as trtllm_attention.py and kvcache.py use it."""

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_factor: int = 2,
        kv_layout: str = "HND",
        sliding_window: int = 0,
        attention_type: str = "mha",
    ) -> None:
        super().__init__(num_kv_heads, head_dim, dtype, kv_factor, kv_layout)
        self.sliding_window = sliding_window


class CachedSequenceInterface:
    """Owner of inputs and caches; AD/shim/interface.py.

    ``add_resource(key, handler)`` names r{n}_{key}; the pool of KVCacheManager holds all layers, and each
    cache is a strided view of it (``get_buffers``); the pool is made anew at a resize.
    """

    def __init__(self, generation: Generation, info: SequenceInfo, device: torch.device, config: Any) -> None:
        self.generation, self.info, self.kv_cache_config = generation, info, config
        self.device = device
        self.caches: dict[str, Tensor] = {}
        self.pools: list[Tensor] = []
        self._handlers: dict[str, Any] = {}
        self.cyclic: bool | None = None

    @property
    def named_args(self) -> dict[str, Tensor]:
        """All inputs of the graph."""
        return {**self.info.named_args, **self.caches}

    def add_resource(self, key: str, handler: Any) -> str:
        """``add_resource``."""
        name = f"r{len(self._handlers)}_{key}"
        self._handlers[name] = handler
        return name

    def initialize(self, num_pages: int) -> None:
        """``initialize_resources``."""
        self.info.to(self.device)
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """``resize_kv_cache_manager``."""
        self._pages(num_pages)
        self._make_pools()
        self.poison()

    def _pages(self, num_pages: int) -> None:
        self.info.update_cache_information(num_pages, 2 * max(1, len(self._handlers)))

    def _make_pools(self) -> None:
        """[blocks, layers, 2, kv heads, tokens, head_dim] a group of equal handlers."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, handler in self._handlers.items():
            groups.setdefault(handler.key(), []).append(name)
        self.pools = []
        for names in groups.values():
            h = self._handlers[names[0]]
            shape = (
                self.info.num_pages,
                len(names),
                2,
                h.num_kv_heads,
                self.info.tokens_per_block,
                h.head_dim,
            )
            pool = torch.empty(shape, device=self.device, dtype=h.dtype)
            self.pools.append(pool)
            self.caches.update({name: pool[:, i] for i, name in enumerate(names)})

    def poison(self) -> None:
        """What the allocator left."""
        for pool in self.pools:
            pool.fill_(POISON)

    def update_kv_cache_config(self, **kwargs: Any) -> None:
        """E6 kvcache.py seeds max_attention_window."""
        vars(self.kv_cache_config).update(kwargs)

    def set_kernel_handles_cyclic_swa(self, cyclic: bool) -> None:
        """E6 kvcache.py: False asks for pages and lengths of the window."""
        self.cyclic = cyclic

    def set_kv_groups(self, windows: list[int]) -> None:
        """E6 kvcache.py."""
        self.windows = windows


class AttentionRegistry:
    """attention_interface.py ``AttentionRegistry``, of one generation at a time."""

    _attention_registry: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register(cls, name: str) -> Any:
        """Decorator."""

        def decorator(descriptor: Any) -> Any:
            assert name not in cls._attention_registry, f"{name} already registered"
            cls._attention_registry[name] = descriptor
            return descriptor

        return decorator

    @classmethod
    def get(cls, name: str) -> Any:
        """The descriptor."""
        assert cls.has(name), f"{name} not registered"
        return cls._attention_registry[name]

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether it is registered."""
        return name in cls._attention_registry


def attention_interface(generation: Generation) -> dict[str, Any]:
    """The names of custom_ops/attention_interface.py."""

    class Registry(AttentionRegistry):
        _attention_registry: ClassVar[dict[str, Any]] = {}

    return {
        "AttentionRegistry": Registry,
        "AttentionDescriptor": _descriptor(),
        "SequenceInfo": SequenceInfo,
        "BatchInfo": BatchInfoWithDrafts if generation.window_pools else BatchInfo,
        "KVPagedResourceHandler": WindowedHandler if generation.window_pools else KVPagedResourceHandler,
    }


def _descriptor() -> type:
    """The abstract methods: what the plugin leaves out makes its class abstract."""

    class AttentionDescriptor(ABC):
        @classmethod
        @abstractmethod
        def get_attention_layout(cls) -> str: ...

        @classmethod
        @abstractmethod
        def get_num_qkv_args(cls) -> int: ...

        @classmethod
        @abstractmethod
        def get_source_attention_op(cls) -> Any: ...

        @classmethod
        @abstractmethod
        def get_cached_attention_op(cls) -> Any: ...

        @classmethod
        @abstractmethod
        def get_standard_metadata_args(cls) -> list[str]: ...

        @classmethod
        @abstractmethod
        def get_cache_initializers(cls, node: fx.Node, cache_config: Any) -> dict[str, Any]: ...

        @classmethod
        def prepare_node_for_cache_insertion(cls, gm: fx.GraphModule, attn_node: fx.Node) -> None:
            """Nothing, by default."""
            return None

        @classmethod
        def get_host_prepare_metadata_function(cls) -> None:
            """None, by default."""
            return None

        @staticmethod
        def resolve_cache_dtype(dtype_config: str, fallback: torch.dtype) -> torch.dtype:
            """E5: "auto" -> fallback, else str_dtype_to_torch."""
            names = {"fp8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16, "float32": torch.float32}
            return fallback if dtype_config == "auto" else names[dtype_config]

        @classmethod
        def get_layer_idx(cls, node: fx.Node) -> int | None:
            """E6: by the argument of the source op."""
            return node.kwargs.get("layer_idx")  # type: ignore[return-value]

        @classmethod
        def get_shared_kv_source_layer_idx(cls, node: fx.Node) -> int | None:
            """E6: by the argument of the source op."""
            return node.kwargs.get("shared_kv_source_layer_idx")  # type: ignore[return-value]

    return AttentionDescriptor
