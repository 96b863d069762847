"""The page of a report, as its readers meet it: opened from disk in a real Chromium."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WIDTHS = (390, 1440)

# The ratio of WCAG 2 between every text and what is behind it; those below 4.5.
FAINT = """() => {
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const luminance = colour => numbers(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const found = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.tagName == 'title') continue;
    const style = getComputedStyle(element);
    const [a, b] = [element.ownerSVGElement ? style.fill : style.color, behind(element)]
      .map(luminance).sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    seen += 1;
    if (!(ratio >= 4.5)) found.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.slice(0, 40)}`);
  }
  return seen > 100 ? found : [`only ${seen} texts`];
}"""


@pytest.fixture(scope="module")
def report(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On all samples, some photos of nobody knows what, and a failure; the names are long ones."""
    folder = tmp_path_factory.mktemp("report")
    mixed = folder / ("a-folder-with-a-name-that-does-not-end" * 4)
    mixed.mkdir()
    for path in sorted(samples.rglob("*.JPEG"))[:8]:
        shutil.copy(path, mixed / f"{'unbroken' * 15}{path.name}")
    (mixed / f"{'damaged' * 15}.jpg").write_bytes(b"no image")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tinyserve.cli", "classify", samples, mixed),
            *("-m", "inception", "--report", folder / "out", "--min-confidence", "0.3"),
        ],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "TINYSERVE_DEVICE": "cpu"},
        timeout=300,
    )
    assert run.returncode == 3, run.stderr
    return folder / "out" / "index.html"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_asks_for_nothing_and_can_be_read(browser, report, width, scheme):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Nothing sticks out of what it is in, unless that can be scrolled.
    outside = """e => [...e.querySelectorAll('*')].filter(x => !x.closest('.scroll'))
        .filter(x => x.getBoundingClientRect().right > innerWidth + .5).map(x => x.outerHTML)"""
    assert page.eval_on_selector("body", outside) == []
    loaded = "images => images.filter(i => i.complete && i.naturalWidth > 0).length"
    assert page.eval_on_selector_all("img", loaded) == page.locator("img").count() > 40
    assert page.locator("h2").all_inner_texts() == [
        "Confidence",
        "Worst confusions",
        "Most confident mistakes",
        "Classes",
        "Predicted classes",
        "Least certain",
        "Failed",
        "The model",
    ]
    assert page.evaluate(FAINT) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 20, 23)") is (scheme == "dark")
    context.close()


@pytest.mark.browser
def test_the_tables_can_be_scrolled_with_the_keyboard(browser, report):
    page = browser.new_page(viewport={"width": 390, "height": 900}, bypass_csp=True)
    page.goto(report.as_uri())
    table = page.get_by_role("region", name="Accuracy by class")
    table.focus()
    page.keyboard.press("End")
    page.wait_for_function("document.activeElement.scrollTop > 100")
    assert page.get_by_role("columnheader", name="most often taken for").count() == 1
    page.close()
