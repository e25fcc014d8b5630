"""Report pages in a real browser."""

import dataclasses
import os
import shutil

import pytest
import torch

from normfree import characterize, compare, create_model
from normfree.benchmarks.page_time import report_of

pytest.importorskip("playwright")
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("needs chromium on the PATH", allow_module_level=True)
HOSTILE = "block</script><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    reports = [characterize(create_model(n, width=0.5), x, name=n) for n in ("bn_resnet26", "nf_resnet26")]
    first = dataclasses.replace(reports[0][0], name=HOSTILE)
    reports[0] = dataclasses.replace(reports[0], records=(first, *reports[0].records[1:]))
    path = tmp_path_factory.mktemp("page") / "index.html"
    return compare({"white noise": reports, "photographs": reports}, title="A <title>").save(path)


@pytest.fixture(scope="module")
def page(page_path):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda r: page.problems.append(r.url) if r.url.startswith("http") else None)
        page.goto(page_path.as_uri())
        page.wait_for_selector("body[data-drawn=true]")
        yield page
        browser.close()


def lines(page):
    paths = page.locator("#chart svg g.mark-line path")
    return paths.evaluate_all("paths => paths.filter(path => path.getAttribute('d')).length")


def test_opens_from_disk_without_errors_or_requests(page):
    assert page.problems == []


def test_three_panels_for_each_input_are_drawn(page):
    text = page.locator("#chart svg").first.text_content()
    for panel in ("Average channel squared mean", "Average channel variance", "Residual average channel variance"):
        assert text.count(panel) == 2, panel
    # Two models in six panels, and the dashed prediction of one of them in the two panels of the variance.
    assert lines(page) == 2 * 6 + 2


def test_the_legend_hides_and_shows(page):
    entry = page.locator("#chart svg g.role-legend text", has_text="bn_resnet26")
    before = lines(page)
    entry.click()
    page.wait_for_timeout(300)
    assert lines(page) == before - 6
    entry.click()
    page.wait_for_timeout(300)
    assert lines(page) == before


def test_points_name_their_module_on_hover(page):
    page.locator("#chart svg g.mark-symbol.role-mark path").first.hover()
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    assert "module" in tooltip.text_content()


def test_names_are_shown_as_text(page):
    assert page.title() == "A <title>"
    page.locator("body > section summary").first.click()
    assert HOSTILE in page.locator("body > section table").first.text_content()
    assert HOSTILE in page.locator("#tree button").first.text_content()


def test_panels_stand_side_by_side_inside_the_page(page):
    boxes = page.locator("#chart svg path.background").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
    )
    panels = []
    for box in (box for box in boxes if 290 < box[2] - box[0] < 310):
        # Several groups draw one background, half a pixel apart.
        if all(max(abs(a - b) for a, b in zip(box, other, strict=True)) > 2 for other in panels):
            panels.append(box)
    assert len(panels) == 6, panels
    for i, a in enumerate(panels):
        assert a[0] >= 0
        assert a[2] <= 1300
        for b in panels[i + 1 :]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"panels {a} and {b} overlap"


def shown(page):
    rows = page.locator("#details tr").all()
    return dict(row.locator("td").all_text_contents() for row in rows)


def test_a_click_on_a_block_or_on_a_point_shows_its_numbers(page):
    page.locator("#tree button", has_text="stages.2.0").nth(1).click()
    found = shown(page)
    assert found["module"] == "stages.2.0"
    assert found["shortcut"] == "projection"
    assert float(found["expected variance"]) == pytest.approx(1.04)
    assert page.locator("#tree button[aria-current=true]").count() == 1
    points = page.locator("#chart svg g.mark-symbol.role-mark path")
    points.nth(3).click(force=True)
    assert shown(page)["block"] == "4"
    assert page.locator("#tree button[aria-current=true]").text_content().startswith(shown(page)["module"])


def test_arrows_walk_through_the_blocks(page):
    page.locator("#tree button").first.focus()
    page.keyboard.press("Enter")
    assert shown(page)["block"] == "1"
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert shown(page)["block"] == "3"
    page.keyboard.press("ArrowUp")
    assert shown(page)["block"] == "2"


def test_printing_opens_the_tables_and_leaves_the_tree_out(page):
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("body > section > details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert not page.locator("#tree").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")


@pytest.mark.parametrize("joins", [1, 50, 600])
def test_pages_of_few_and_of_many_joins_are_drawn(page, tmp_path, joins):
    path = report_of(joins).save(tmp_path / "page.html")
    other = page.context.browser.new_page()
    other.goto(path.as_uri())
    other.wait_for_selector("body[data-drawn=true]")
    assert other.locator("#tree button").count() == joins
    other.locator("#tree button").last.evaluate("button => button.click()")
    found = shown(other)
    assert found["module"] == f"blocks.{joins - 1}"
    assert "predicted variance" in found
    assert other.locator("#tree summary").count() == max(1, joins // 100)
    other.close()
