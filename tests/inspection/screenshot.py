"""Makes docs/report.png, the picture in README.md, anew: ``python -m tests.inspection.screenshot``."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from ad_flashinfer_pass import AutoDeployConfig, inspection
from ad_flashinfer_pass.inspection.report import to_html
from tests.inspection.browser import Page

FILE = Path(__file__).parents[2] / "docs" / "report.png"
WIDTH, HEIGHT, SCALE = 1360, 1345, 0.8


def picture(profile: Path) -> bytes:
    """The upper part of the demo model's report for an H200, as PNG."""
    file = profile / "report.html"
    config = AutoDeployConfig(dtype="bfloat16", device="cuda", compile_backend="torch-cudagraph")
    found = inspection.report(config, memory=141 * 10**9, sm=90)
    file.write_text(to_html(found), encoding="utf-8")
    with Page(profile) as page:
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=SCALE,
            mobile=False,
        )
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.open(file)
        return base64.b64decode(page.call("Page.captureScreenshot")["data"])


def main() -> int:
    """Write the file."""
    with tempfile.TemporaryDirectory() as profile:
        FILE.write_bytes(picture(Path(profile)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
