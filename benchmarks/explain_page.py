"""Times the page of `explain` in headless Chromium: first paint, and each layer's unfolding.

    python benchmarks/explain_page.py PAGE.html --out FILE

PAGE.html: `atom-compile explain MODEL_DIR --html PAGE.html`. Layers are unfolded one after the
other and stay open, so that the graph grows. Needs playwright and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

VISITS, LAYERS = 5, 16
_UNFOLD = """layer => new Promise(done => {
    const path = `module:model.layers.${layer}`;
    const head = document.querySelector(`#after .group[data-id="${path}"] > .group-head`);
    const { x, y } = head.getBoundingClientRect();
    const start = performance.now();
    head.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX: x + 5, clientY: y + 5 }));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0));
})"""
_FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def visit(page: Page, url: str) -> tuple[float, list[float]]:
    """Milliseconds to the first paint, and of each layer's unfolding until it is drawn."""
    page.goto(url)
    page.wait_for_selector("#after .item")
    unfolds = [page.evaluate(_UNFOLD, layer) for layer in range(LAYERS)]
    return page.evaluate(_FIRST_PAINT), unfolds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with sync_playwright() as driver:
        chromium = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        url = arguments.page.resolve().as_uri()
        visits = [visit(browser.new_page(), url) for _ in range(VISITS)]
        version = browser.version
    unfolds = [unfold for _, one in visits for unfold in one]
    found = {
        "chromium": version,
        "cpus": os.cpu_count(),
        "bytes": arguments.page.stat().st_size,
        "first_paint_ms": [round(paint) for paint, _ in visits],
        "unfold_ms": {
            "count": len(unfolds),
            "median": round(statistics.median(unfolds)),
            "largest": round(max(unfolds)),
        },
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
