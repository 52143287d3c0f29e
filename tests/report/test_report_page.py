"""The report in Chromium: text stays text, lists are sorted and paged, and all works by keyboard.

Needs Chromium on the path (`apt-get install chromium`) and Playwright's Python package.
"""

import re
import shutil

import pytest
from support.report_data import response, scored_data

from star_dss_plugin.report.page import render_page
from star_dss_plugin.visible import visible

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium on the path: apt-get install chromium"
    ),
]

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script><!--",
    "<img src=x onerror=alert(3)><svg onload=alert(4)>",
    '<a href="javascript:alert(5)">click</a>',
    "\" onmouseover=alert(6) x='",
    "<iframe src=http://127.0.0.1:9/></iframe><style>*{background:url(http://127.0.0.1:9/)}",
    "\u202e\u2066reversed\u2069 \u200bhidden \x00\x1b[31m \ud800 end",
    "שלום עולם ‏ abc",
]


@pytest.fixture(scope="module")
def browser():
    """Return a started Chromium."""
    with sync_api.sync_playwright() as playwright:
        # As root, as in containers, Chromium refuses to start with its sandbox.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_report(browser, tmp_path):
    """Return a function that opens a report; fail on any dialog, message, error or request."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems, requests = [], []
    page.on("dialog", lambda d: (problems.append(f"dialog {d.message}"), d.dismiss()))
    page.on("console", lambda m: problems.append(f"{m.type} {m.text}"))
    page.on("pageerror", lambda e: problems.append(f"error {e}"))
    page.on("request", lambda r: requests.append(r.url))
    path = tmp_path / "report.html"

    def open_(responses, scheme="light", provenance=None, **options):
        html = render_page(scored_data(*responses, **(provenance or {})), name="test", **options)
        path.write_text(html, encoding="utf-8")
        page.emulate_media(color_scheme=scheme)
        page.goto(path.as_uri())
        return page

    yield open_
    assert problems == []
    assert set(requests) <= {path.as_uri()}
    context.close()


def response_titles(page):
    return page.locator("#list .what").all_inner_texts()


def shown_rows(page):
    """Return the numbers of the rows in the list."""
    return [int(re.search(r"row (\d+)", text).group(1)) for text in response_titles(page)]


def many_responses(count):
    """Return responses of two sources with all kinds of scores."""
    scores = [((7 * i) % count) / count for i in range(count)]
    return [
        response(i, (f"word{i} ", "the end"), (max(s, 1 - s), s), source="ab"[i % 2])
        for i, s in enumerate(scores)
    ]


def test_hostile_text_is_shown_as_text(open_report):
    page = open_report(
        [
            response(
                i,
                (text, text),
                source=text,
                context=({"role": text, "content": text}, {"role": "user", "content": text}),
            )
            for i, text in enumerate(HOSTILE)
        ]
    )
    page.select_option("#sort", "row")
    for i, text in enumerate(HOSTILE):
        page.locator("#list button").nth(i).click()
        assert page.locator("#text").evaluate("e => e.textContent") == visible(text) * 2
        page.mouse.move(600, 600)
    found = "img, iframe, a, object, embed, link, form, base, [onerror], [onload], [onmouseover]"
    assert page.locator(found).count() == 0
    assert page.locator("script").count() == 2
    assert page.locator("style").count() == 1
    # A right-to-left text does not change the order of the text around it.
    isolated = "e => getComputedStyle(e).unicodeBidi"
    assert page.locator("#text").evaluate(isolated) in ("isolate", "plaintext")
    assert page.locator("tbody th bdi").first.evaluate(isolated) == "isolate"


def test_the_content_policy_stops_markup_that_was_not_escaped(browser, tmp_path):
    html = render_page(scored_data(response()), name="x")
    path = tmp_path / "r.html"
    path.write_text(html.replace("<footer", "<img src=x onerror=alert(1)><footer", 1))
    page = browser.new_page()
    dialogs, blocked = [], []
    page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    page.on("console", lambda m: blocked.append(m.text))
    page.goto(path.as_uri())
    page.wait_for_timeout(200)
    assert dialogs == []
    assert any("Content Security Policy" in text for text in blocked)
    page.close()


def test_a_text_of_a_megabyte_is_clipped_until_all_is_requested(open_report):
    long = "x" * 2**20
    page = open_report([response(0, (long, "tail"), context=({"role": "user", "content": long},))])
    shown = "e => e.textContent.length"
    assert page.locator("#text").evaluate(shown) == 20000
    assert page.locator(".message .prose").evaluate(shown) == 20000
    page.get_by_text("Show all 1,048,580 characters").click()
    assert page.locator("#text").evaluate(shown) == 2**20 + 4
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_ten_thousand_responses_are_paged(open_report):
    page = open_report(many_responses(10_000))
    assert page.locator("#status").inner_text().startswith("10,000 of 10,000 responses")
    assert page.locator("#list li").count() == 50
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    page.click("#next")
    assert page.locator("#pages").inner_text() == "page 2 of 200"
    assert page.locator("#list li").count() == 50
    page.fill("#search", "word4321 ")
    sync_api.expect(page.locator("#list li")).to_have_count(1)
    assert shown_rows(page) == [4321]
    assert page.locator("#text").inner_text() == "word4321 the end"
    assert page.evaluate("CSS.highlights.get('found').size") == 1
    page.fill("#search", "nothing has this")
    sync_api.expect(page.locator("#list li")).to_have_count(0)
    assert "No response matches" in page.locator("#detail").inner_text()


def test_responses_are_sorted_and_filtered(open_report):
    responses = many_responses(101)
    page = open_report(responses)

    def expected(key):
        return [r.row for r in sorted(responses, key=key)[:50]]

    for order, key in {
        "lowest": lambda r: r.lowest,
        "mixed": lambda r: -round(r.largest_fall, 4),
        "mean": lambda r: round(r.mean, 4),
        "row": lambda r: r.row,
    }.items():
        page.select_option("#sort", order)
        assert shown_rows(page) == expected(key), order
    page.select_option("#sort", "row")
    page.select_option("#filter", "safe")
    assert shown_rows(page) == [r.row for r in responses if r.crossing(0.5) is None][:50]
    page.select_option("#filter", "mixed")
    assert shown_rows(page) == [r.row for r in responses if r.crossing(0.5) == 6][:50]
    page.select_option("#source", label="b")
    assert all(row % 2 for row in shown_rows(page))


def test_the_keyboard_reaches_everything(open_report):
    page = open_report(many_responses(60))
    title = page.locator("#detail h2")
    order = shown_rows(page)
    assert title.inner_text().startswith(f"Row {order[0]} ")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert title.inner_text().startswith(f"Row {order[1]} ")
    page.keyboard.press("ArrowRight")
    assert page.locator("#readout").inner_text().startswith("tokens 1 to 5: score")
    page.keyboard.press("ArrowRight")
    assert page.locator(".marked").inner_text() == "the end"
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.locator("#search").input_value() == "jk"
    sync_api.expect(page.locator("#list li")).to_have_count(0)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.press("Delete")
    sync_api.expect(page.locator("#list li")).to_have_count(50)
    for _ in range(12):  # Tab alone reaches the list
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#list') !== null"):
            break
    for _ in range(50):
        page.keyboard.press("ArrowDown")
    assert page.locator("#pages").inner_text() == "page 2 of 2"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_page_scrolls_to_a_response_only_after_a_key(open_report):
    page = open_report(many_responses(60))
    page.set_viewport_size({"width": 1280, "height": 400})
    page.reload()
    assert page.evaluate("scrollY") == 0
    page.keyboard.press("j")
    assert page.locator("#detail h2").evaluate("e => e.getBoundingClientRect().top < innerHeight")


def test_the_right_end_of_the_chart_is_the_last_token(open_report):
    page = open_report([response(0, "abcd", (0.9, 0.8, 0.2, 0.1))])
    box = page.locator(".chart svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 50)
    assert page.locator("#readout").inner_text() == "tokens 16 to 20: score 0.100"
    page.mouse.move(box["x"] + 1, box["y"] + 50)
    assert page.locator("#readout").inner_text() == "tokens 1 to 5: score 0.900"


def test_many_sources_are_listed_in_part(open_report):
    page = open_report([response(i, source=f"id-{i}") for i in range(500)])
    assert page.locator("#source option").count() == 201
    assert page.locator("tbody tr").count() == 40
    assert "and 460 more sources" in page.locator(".summary").inner_text()


def test_the_first_token_below_the_threshold_is_marked(open_report):
    page = open_report([response(3, ("good ", "bad ", "good"), (0.9, 0.2, 0.8))])
    assert page.locator(".crossed").inner_text() == "bad "
    assert "below 0.5 from token 6 of 15" in page.locator("#facts").inner_text()
    assert page.locator("circle.cross").count() == 1
    assert "question 3" in page.locator(".message").inner_text()
    kinds = [s.get_attribute("class") for s in page.locator("#text span").all()]
    assert kinds == ["h9", "h2 below crossed", "h8"]


def test_blurred_text_is_revealed_on_request(open_report):
    page = open_report(many_responses(3), blur=True)
    blur = "e => getComputedStyle(e).filter"
    text = page.locator("#text")
    assert "blur" in text.evaluate(blur)
    assert "blur" in page.locator(".snippet").first.evaluate(blur)
    page.keyboard.press("r")
    assert text.evaluate(blur) == "none"
    assert "blur" in page.locator(".snippet").first.evaluate(blur)
    page.keyboard.press("j")
    assert "blur" in page.locator("#text").evaluate(blur)
    page.get_by_text("Reveal this text").click()
    assert page.locator("#text").evaluate(blur) == "none"
    page.click("#blur")
    assert page.locator("#blur").get_attribute("aria-pressed") == "false"
    assert page.locator(".snippet").first.evaluate(blur) == "none"


def test_a_report_without_text_shows_none(open_report):
    page = open_report(many_responses(3), text=False)
    assert page.locator("#text, #search, .snippet, .message").count() == 0
    assert "word" not in page.locator("body").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#readout").inner_text().startswith("tokens 1 to 5: score")


def test_demonstration_scores_are_marked_everywhere(open_report):
    page = open_report(many_responses(3), provenance={"demonstration_guard": True})
    assert "demonstration" in page.title()
    for where in (".warning", "#status", "#facts"):
        assert "demonstration scores" in page.locator(where).first.inner_text().lower()


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgb(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
  };
  const worst = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || node.matches("script, noscript *, :disabled, option, title")) continue;
    const style = getComputedStyle(node);
    const svg = node.namespaceURI.endsWith("svg");
    const [a, b] = [rgb(svg ? style.fill : style.color), behind(node)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    worst.push([ratio, node.tagName + "." + node.getAttribute("class")]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(open_report, scheme):
    levels = [k / 10 for k in range(11)]
    page = open_report(
        [response(0, [f"{k} " for k in levels], levels, source="s")],
        scheme,
        provenance={"demonstration_guard": True},
    )
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    page.click("#theme")  # switch to the other scheme
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
