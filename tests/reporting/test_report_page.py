"""The page of `upcycle report` in a real browser: at a desk and on a phone, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
import left_behind
from browser import Browser
from left_behind import write_checkpoint, write_run
from upcycle.reporting import report
from upcycle.reporting.inks import DARK, LIGHT, Inks

pytestmark = pytest.mark.skipif(
    browser.found() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
DESK, PHONE = 1280, 375  # CSS pixels
SCHEMES = {"light": LIGHT, "dark": DARK}
LONG = "a-name-without-a-place-to-break-it-" * 4 + "</script><script>window.broken=1</script>".replace(
    "/", "∕"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section but similarity, and names that want to break it."""
    folder = tmp_path_factory.mktemp("report")
    dense = [write_run(folder / f"dense{i}", lambda t: 2.4 - 1e-4 * t, steps=60, seed=i) for i in (0, 1)]
    moe = [
        write_run(folder / f"moe{i}", lambda t, i=i: 2.5 - 3e-4 * t + i / 90, moe={}, seed=i) for i in (0, 1)
    ]
    cut = write_run(folder / LONG, lambda t: 2.6, moe={"num_experts": 64}, done=15)
    ends = [
        write_checkpoint(folder / "dense-end", dense[0], step=60, eval=left_behind.scores(piqa=(0.6, 0.01))),
        write_checkpoint(
            folder / "moe-end",
            moe[0],
            eval=left_behind.scores(piqa=(0.63, 0.01)),
            routing=left_behind.ROUTING,
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
        report([*dense, *moe, cut, *ends], folder / "r.html", dense_flops=1e6, title="<b>Report</b>")
    return folder / "r.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def rgb(colour: str) -> str:
    """#rrggbb as a browser says it."""
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def style(chromium: Browser, selector: str, name: str) -> str:
    found = chromium.evaluate(
        f"getComputedStyle(document.querySelector({selector!r})).getPropertyValue({name!r})"
    )
    return str(found)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_nothing_is_fetched_nothing_complains_and_nothing_sticks_out(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    assert chromium.requests() == [page.as_uri()]
    assert chromium.complaints() == []
    assert chromium.evaluate("window.broken") is None
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    # Whatever is wider stands in a box that scrolls by itself, and that box is on the page.
    outside = chromium.evaluate(
        """[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') || e.tagName === 'svg')
        .filter(e => !e.parentElement.closest('.scroll'))
        .filter(e => { const r = e.getBoundingClientRect();
                       return r.width && (r.right > innerWidth + 0.5 || r.left < -0.5); })
        .map(e => e.tagName + '.' + e.className)"""
    )
    assert outside == []
    assert chromium.evaluate("document.querySelectorAll('figure svg').length") >= 9


def test_tables_scroll_on_a_phone_and_keep_the_names_of_their_rows(chromium, page):
    chromium.open(page, width=PHONE)
    box = "document.querySelector('#loss .scroll')"
    assert chromium.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    before = chromium.evaluate(f"{box}.querySelector('tbody th').getBoundingClientRect().left")
    chromium.evaluate(f"{box}.scrollLeft = 200")
    assert chromium.evaluate(f"{box}.scrollLeft") == 200
    assert chromium.evaluate(f"{box}.querySelector('tbody th').getBoundingClientRect().left") == before


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_text_is_large_enough_to_read(chromium, page, width):
    """Paragraphs and cells in CSS pixels; the smallest text of a figure as large as it is shown."""
    chromium.open(page, width=width)
    smallest = chromium.evaluate(
        """Math.min(...[...document.querySelectorAll('p, td, th, figcaption, a, button')]
        .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 14
    drawn = chromium.evaluate(
        """Math.min(...[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
            const size = t => parseFloat(getComputedStyle(t).fontSize) * scale;
            return [...svg.querySelectorAll('text')].map(size);
        }))"""
    )
    assert drawn >= 9.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_follow_the_system(chromium, page, scheme):
    inks = SCHEMES[scheme]
    chromium.open(page, width=DESK, dark=scheme == "dark")
    assert style(chromium, "body", "background-color") == rgb(inks.paper)
    assert style(chromium, "section", "background-color") == rgb(inks.card)
    assert style(chromium, "td", "color") == rgb(inks.ink)
    assert_figures_are_in(chromium, inks)


def assert_figures_are_in(chromium: Browser, inks: Inks) -> None:
    """Text of figures is ink or faint, and the first curve has the colour of the first series."""
    texts = chromium.evaluate(
        "[...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    assert {*texts} <= {rgb(inks.ink), rgb(inks.faint)}
    strokes = chromium.evaluate(
        "[...document.querySelectorAll('#figure-loss-tokens path')].map(t => getComputedStyle(t).stroke)"
    )
    assert {rgb(inks.series[0]), rgb(inks.series[1])} <= {*strokes}


def test_the_button_goes_round_and_is_remembered(chromium, page):
    chromium.open(page, width=DESK, dark=True)
    button = "document.getElementById('theme')"
    press = f"{button}.click(), {button}.textContent"
    assert style(chromium, "body", "background-color") == rgb(DARK.paper)
    assert chromium.evaluate(press) == "Colours: light"
    assert style(chromium, "body", "background-color") == rgb(LIGHT.paper)
    assert style(chromium, ":root", "color-scheme") == "light"
    assert_figures_are_in(chromium, LIGHT)
    chromium.open(page, width=DESK, dark=True)
    assert style(chromium, "body", "background-color") == rgb(LIGHT.paper)
    assert chromium.evaluate(press) == "Colours: dark"
    chromium.open(page, width=DESK, dark=False)
    assert style(chromium, "body", "background-color") == rgb(DARK.paper)
    assert chromium.evaluate(press) == "Colours: auto"
    assert style(chromium, "body", "background-color") == rgb(LIGHT.paper)
    assert chromium.complaints() == []


def test_without_scripts_the_page_is_whole(chromium, page):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page, width=PHONE, dark=True)
        root = chromium.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
        found = chromium.call("DOM.querySelectorAll", nodeId=root, selector="figure svg")
        assert len(found["nodeIds"]) >= 9
        button = chromium.call("DOM.querySelector", nodeId=root, selector="#theme[hidden]")
        assert button["nodeId"]  # a button that can do nothing is not shown
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_names_are_shown_as_they_are(chromium, page):
    chromium.open(page, width=DESK)
    assert chromium.evaluate("document.querySelector('h1').textContent") == "<b>Report</b>"
    assert chromium.evaluate("document.title") == "<b>Report</b>"
    assert LONG in chromium.evaluate("document.querySelector('#built').textContent")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_that_is_shown_has_contrast_where_it_stands(chromium, page, dark):
    """The computed colour of every text against the nearest background that is painted behind it."""
    chromium.open(page, width=PHONE, dark=dark)
    poor = chromium.evaluate(
        """(() => {
        const parse = c => c.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = parse(c).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (parse(c).length === 3 || parse(c)[3] === 1) return c; } };
        const out = [];
        const all = 'h1, h2, h3, p, td, th, a, button, figcaption, footer, text';
        for (const e of document.querySelectorAll(all)) {
            const s = getComputedStyle(e), b = light(behind(e));
            const a = light(e.tagName === 'text' ? s.fill : s.color);
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < 4.5) out.push(`${e.tagName} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
        }
        return out; })()"""
    )
    assert poor == []
