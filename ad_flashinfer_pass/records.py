"""What transforms report, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import fx

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.graph.weights import StepWeights
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.select import Choice
from ad_flashinfer_pass.runtime.drafts.drafter import Drafter
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo


@dataclass(frozen=True)
class Skip:
    """Something that a transform looked at and left alone."""

    where: str
    reason: str


@dataclass
class TransformReport:
    """What one transform did."""

    name: str
    num_matches: int = 0
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Evidence and numbers, one line each."""
    removed: list[str] = field(default_factory=list)
    """Names of the nodes that it took out of the graph; ``Pipeline.run`` fills in this and the next two."""
    added: list[str] = field(default_factory=list)
    rewired: list[str] = field(default_factory=list)
    """Nodes that it gave other arguments or another target."""
    seconds: float = 0.0


@dataclass(frozen=True)
class KvCacheResource:
    """A pool that the runtime must own: the pages of one layer.

    Shape: [num_pages, planes, num_kv_heads, page_size, head_dim], K at [:, 0], V at [:, 1].
    """

    name: str
    """The graph input that takes it."""
    num_kv_heads: int
    head_dim: int
    """The larger of the head sizes of K and V."""
    page_size: int
    dtype: torch.dtype
    planes: int = 2
    """1 for a latent, whose V is the first part of K."""

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page of this layer, K and V together."""
        return self.planes * self.num_kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    def allocate(self, num_pages: int, device: torch.device) -> torch.Tensor:
        """The pool; zeroed, because kernels multiply what they do not need by zero.

        Raises:
            CapacityError: the CPU's memory does not hold it.
        """
        shape = (num_pages, self.planes, self.num_kv_heads, self.page_size, self.head_dim)
        if device.type != "cpu" or not num_pages:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        # Zero without being written: of what no sequence uses the machine gives no memory and takes no time.
        num_bytes = num_pages * self.bytes_per_page
        try:
            memory = mmap(-1, num_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        except OSError as err:
            raise CapacityError(
                f"{self.name}: the CPU does not give {num_bytes} bytes for {num_pages} pages "
                f"({err.strerror}). Lower kv_cache_config.max_tokens, max_batch_size or max_seq_len."
            ) from None
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)


@dataclass(frozen=True)
class StateResource:
    """A pool that the runtime must own: the states of one layer, a slot for each sequence.

    Shape: [num_slots, *shape].
    """

    name: str
    """The graph input that takes it."""
    shape: tuple[int, ...]
    """Of one state."""
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one state."""
        return prod(self.shape) * self.dtype.itemsize

    def allocate(self, num_slots: int, device: torch.device) -> torch.Tensor:
        """The pool."""
        return torch.zeros((num_slots, *self.shape), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class StateSite:
    """One op with a state after insertion."""

    where: str
    module: str
    """Path of the module that made it."""
    op: str
    """The source op."""
    prefill: str
    """Kernel for steps with prompts."""
    decode: str
    """Kernel for one token of each sequence."""
    cache: str
    """Name of the state resource."""


@dataclass
class SiteNotes:
    """What was found about an attention on its way; its node carries it as ``meta["site_notes"]``."""

    form: str
    """How it stood in the graph."""
    folded: list[str] = field(default_factory=list)
    """What the op took over from nodes around it."""
    mask: str = "causal, as the graph says"
    """The mask's certificate."""


@dataclass
class CachedSite:
    """One attention site after insertion: what it needs and who does it."""

    where: str
    module: str
    """Path of the module that made it."""
    notes: SiteNotes
    site: Site
    prefill: Choice
    decode: Choice
    cache: str
    """Name of the cache resource."""
    verify: str = ""
    """Kernel for drafts; empty: that for prefill, or nothing is drafted."""


@dataclass
class TransformContext:
    """What transforms share: settings on the way in, what was found on the way out."""

    config: AutoDeployConfig
    device: torch.device
    sequence_info: SequenceInfo
    rank: int = 0
    """Which of ``config.world_size`` this process is."""
    stored: Mapping[torch.Tensor, torch.Tensor] | None = None
    """What the fake weights of a module stand for, where they are read once it is known which are needed."""
    are_logits_alike: bool = False
    """Whether all ranks get the logits bit by bit alike: each part of them is computed by one rank."""
    resources: list[KvCacheResource] = field(default_factory=list)
    sites: list[CachedSite] = field(default_factory=list)
    states: list[StateResource] = field(default_factory=list)
    state_sites: list[StateSite] = field(default_factory=list)
    caches: dict[str, torch.Tensor] = field(default_factory=dict)
    """Allocated pools by the name of their graph input."""
    vocab_size: int = 0
    """Width of the logits."""
    small_batch_model: fx.GraphModule | None = None
    """The graph for steps of few tokens, where there is another one."""
    weights: StepWeights = field(default_factory=StepWeights)
    """What steps read of the weights."""
    drafter: Drafter | None = None
    """Guesses tokens of the next steps."""
    draft: TransformContext | None = None
    """Of the model that guesses, if one does; its pools have as many pages."""
    hidden_states: tuple[str, ...] = ()
    """Paths of the modules whose results are kept for a head that guesses."""
    is_draft: bool = False
    """Whether the model only guesses: its steps are captured with those of another."""
    num_pages: int = 0
    """Pages of each pool, the scratch page included."""
    target: torch.device | None = None
    """The device that will run the graph, if it is not ``device``: one can look at it elsewhere."""
    sm: int | None = None
    """Compute capability of the target, 90 for 9.0, if it is not here."""
    keeps_strides: bool = False
    """Whether the weights must stay as they lie, because somebody else relies on their strides."""
    on_event: Callable[[str], None] = lambda text: None
    """Takes a line of progress from a transform that takes long."""
