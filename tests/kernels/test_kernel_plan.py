"""``KernelPlan``: what is written is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan

KERNELS = st.builds(
    Kernel,
    st.sampled_from(["torch", "split_decode", "xqa"]),
    st.lists(st.integers(0, 4096), max_size=3).map(tuple),
)


@given(default=KERNELS, by_size=st.dictionaries(st.integers(1, 512), KERNELS, max_size=4))
def test_a_plan_is_read_as_it_was_written(default: Kernel, by_size: dict[int, Kernel]) -> None:
    """Each size that it names has its kernel and options, all others the default."""
    text = str(KernelPlan(default, by_size))
    plan = KernelPlan.parse(text)
    assert (plan, str(plan)) == (KernelPlan(default, by_size), text)
    assert [plan.at(size) for size in (*by_size, 1000)] == [*by_size.values(), default]
    assert set(plan.names) == {kernel.name for kernel in (default, *by_size.values())}
