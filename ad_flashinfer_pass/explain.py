"""``explain``: every attention site of a model, and what the pass does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.kernels.capability import ledger

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.registry import CachedSite, TransformContext, TransformReport

# What comes after the sites are known allocates memory.
_AFTER_INSERTION = ("initialize_cache", "compile_model")


@dataclass(frozen=True, kw_only=True)
class SiteExplanation:
    """One attention site."""

    index: int
    module: str
    """Path of the module that made it."""
    where: str
    """Node and source line."""
    form: str
    """How it stood in the graph."""
    folded: list[str]
    """What the op took over from nodes around it."""
    mask: str
    """Class of the mask, with the evidence."""
    needs: dict[str, str]
    """Every item that a kernel must honour."""
    prefill: str
    """Kernel and reason."""
    decode: str
    cache: str
    """Name of the pool, which several sites can share."""
    cache_bytes_per_token: int
    """Of the pool; 0 for a site that reads the pool of another."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All sites of a model, and what each transform reported."""

    sites: list[SiteExplanation]
    transforms: dict[str, list[str]]
    """Notes and skips by transform."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def explain(config: AutoDeployConfig, *, on_event: Callable[[str], None] | None = None) -> Explanation:
    """Run the pass up to the insertion and say what it found; no cache is allocated.

    Args:
        config: the model and the settings of the pass.
        on_event: called with the name of each phase as it begins.

    Raises:
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model; the message names the node and the way out.
    """
    from ad_flashinfer_pass import pipeline
    from ad_flashinfer_pass.models.loading import load_model

    if on_event is not None:
        on_event("load_model")
    loaded = load_model(config)
    ctx = pipeline.context(config)
    _, reports = pipeline.run(loaded.module, ctx, on_event, skip=_AFTER_INSERTION)
    return Explanation(sites=_sites(ctx), transforms=_notes(reports))


def _sites(ctx: TransformContext) -> list[SiteExplanation]:
    pools = {resource.name: resource.bytes_per_page // resource.page_size for resource in ctx.resources}
    return [_site(index, site, pools) for index, site in enumerate(ctx.sites)]


def _site(index: int, site: CachedSite, pools: dict[str, int]) -> SiteExplanation:
    return SiteExplanation(
        index=index,
        module=site.module,
        where=site.where,
        form=site.notes.form,
        folded=site.notes.folded,
        mask=site.notes.mask,
        needs=ledger(site.site),
        prefill=f"{site.prefill.kernel}: {site.prefill.reason}",
        decode=f"{site.decode.kernel}: {site.decode.reason}",
        cache=site.cache,
        cache_bytes_per_token=0 if site.site.shares_kv else pools[site.cache],
    )


def _notes(reports: list[TransformReport]) -> dict[str, list[str]]:
    return {
        report.name: [*report.notes, *(f"passed over {skip.where}: {skip.reason}" for skip in report.skipped)]
        for report in reports
    }


def as_tables(explanation: Explanation) -> list[RenderableType]:
    """The explanation for a terminal: a table of the sites, then the evidence."""
    from rich.table import Table

    sites = Table("#", "module", "matched as", "mask", "prefill", "decode", "cache", "bytes a token")
    for site in explanation.sites:
        sites.add_row(
            str(site.index),
            site.module,
            f"{site.form}; {', '.join(site.folded)}",
            site.mask.partition(":")[0],
            site.prefill.partition(":")[0],
            site.decode.partition(":")[0],
            site.cache,
            str(site.cache_bytes_per_token),
        )
    total = sum(site.cache_bytes_per_token for site in explanation.sites)
    sites.caption = f"{len(explanation.sites)} sites, {total} cache bytes a token"
    evidence = Table("transform", "what it found", title="Evidence")
    for name, notes in explanation.transforms.items():
        for note in notes:
            evidence.add_row(name, note)
    where = Table("#", "node and source line", title="Where")
    for site in explanation.sites:
        where.add_row(str(site.index), site.where)
    return [sites, where, evidence]
