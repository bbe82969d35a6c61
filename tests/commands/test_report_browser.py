"""The page in a browser: it draws, it complains of nothing, its clicks work, and no text in it does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Reader
from support.browser import browser as headless
from support.page_runs import HOSTILE, a_recorded_run, a_result, an_lm_eval_run

from specrej_eval import cli
from specrej_eval.wording import inert_page

pytestmark = pytest.mark.full
QUESTIONS = [f"question {number}" for number in range(30)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [an_lm_eval_run(folder / name, QUESTIONS, rejects=name == "spr") for name in ("bo", "spr")]
    return written(folder / "page.html", runs)


def written(out: Path, runs: list[Path]) -> Path:
    assert cli.main(["report", *map(str, runs), "--html", str(out)]) == 0
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_draws_at_every_width_without_a_complaint(
    width: int, scheme: str, browser: Any, page: Path, counted: Callable[[str, int], None]
) -> None:
    with Reader(browser, page, width=width, scheme=scheme) as reader:
        tab = reader.tab
        assert not reader.complaints and reader.requests == [page.resolve().as_uri()], "no network"
        assert tab.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out at the side"
        shown = tab.locator("svg.chart:visible").count()
        assert shown == tab.locator("figure").count() + 2, "each chart once, and one for each side of the viewer"
        small = tab.evaluate(
            """() => [...document.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width)
            .flatMap((svg) => [...svg.querySelectorAll("text")].map((text) =>
                parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width
                / svg.viewBox.baseVal.width))
            .filter((size) => size < 10.5)"""
        )
        assert not small, "letters in charts are never tiny"
        cut = tab.evaluate(
            """() => [...document.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width)
            .flatMap((svg) => { const frame = svg.getBoundingClientRect(); return [...svg.querySelectorAll("text")]
                .filter((text) => { const box = text.getBoundingClientRect();
                    return box.left < frame.left - 1 || box.right > frame.right + 1
                        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1; })
                .map((text) => text.textContent); })"""
        )
        assert not cut, "no label is cut"
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 30)")
    counted("pages drawn in a browser", 1)


def test_the_toggle_turns_light_into_dark_and_back(browser: Any, page: Path) -> None:
    with Reader(browser, page) as reader:
        colours = []
        for _ in range(3):
            colours.append(reader.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            reader.tab.click("#theme")
        assert colours[0] == colours[2] != colours[1]


def test_tables_sort_by_number_and_by_word_in_both_directions(browser: Any, page: Path) -> None:
    with Reader(browser, page) as reader:
        tab = reader.tab

        def column(place: int) -> list[str]:
            return [
                text.strip() for text in tab.locator(f"#summary-0 tbody tr > :nth-child({place})").all_inner_texts()
            ]

        tokens = [int(text.replace(",", "")) for text in column(4)]
        assert len(tokens) == 2
        head = tab.locator("#summary-0 thead th").nth(3)
        head.locator("button").click()
        assert [int(text.replace(",", "")) for text in column(4)] == sorted(tokens, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"
        head.locator("button").click()
        assert [int(text.replace(",", "")) for text in column(4)] == sorted(tokens)
        tab.locator("#summary-0 thead th").nth(0).locator("button").click()
        assert column(1) == sorted(column(1)) and head.get_attribute("aria-sort") is None
        assert not reader.complaints


def test_the_viewer_shows_prompts_rows_and_texts_on_a_click(browser: Any, page: Path) -> None:
    with Reader(browser, page) as reader:
        tab = reader.tab
        left, right = (tab.locator(".side").nth(place) for place in (0, 1))
        assert "Best-of-N" in left.locator("select option:checked").inner_text()
        assert "Speculative Rejection" in right.locator("select option:checked").inner_text()
        for place in (0, 1, 2, 29):
            tab.select_option("#prompt", str(place))
            for side, rejects in ((left, False), (right, True)):
                result = a_result(QUESTIONS[place], rejects=rejects)
                lines = side.locator("table.rows tbody tr.row")
                assert lines.count() == 6
                assert f"row {result.best.row}" in side.locator(".answer h4").inner_text()
                assert side.locator(".answer pre").inner_text() == result.best.text
                fates = side.locator("tr.row td:nth-child(2)").all_inner_texts()
                assert fates.count("won") == 1 and fates.count("rejected") == 5 * rejects
        line = right.locator("tr.row.rejected").nth(1)
        number = line.locator("th").inner_text().strip()
        assert right.locator("tr.text").count() == 0
        line.click()
        assert right.locator("tr.text pre").inner_text() == f"row {number} of seed 0"
        assert line.locator("button").get_attribute("aria-expanded") == "true"
        right.locator("thead th").nth(2).locator("button").click()  # its text stays below it when the table is sorted
        texts = right.locator("tbody tr").evaluate_all("rows => rows.map((row) => row.className)")
        assert texts[texts.index("text") - 1] == "row rejected"
        line.locator("button").press("Enter")
        assert right.locator("tr.text").count() == 0 and not reader.complaints


def test_arrows_and_order_go_through_the_prompts(browser: Any, page: Path) -> None:
    with Reader(browser, page) as reader:
        tab = reader.tab
        assert tab.locator("#previous").is_disabled()
        tab.click("#next")
        assert tab.locator("#prompt option:checked").inner_text() == "2. question 1"
        tab.click("#previous")
        tab.select_option("#order", "gap")
        shown = tab.locator("#prompt option").evaluate_all("options => options.map((each) => Number(each.value))")
        gaps = []
        for place in shown:
            one, other = (a_result(QUESTIONS[place], rejects=rejects).best.reward for rejects in (False, True))
            gaps.append(abs(one - other))
        assert sorted(shown) == list(range(30)) and gaps == sorted(gaps, reverse=True)
        tab.locator(".side select").nth(0).select_option("1")
        assert tab.locator(".side").nth(0).locator("tr.row.rejected").count() == 5 and not reader.complaints


def test_markdown_and_latex_are_copied_on_a_click(browser: Any, page: Path) -> None:
    with Reader(browser, page) as reader:
        reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
        reader.tab.locator("details.paste summary").first.click()
        for name in ("markdown", "latex"):
            reader.tab.click(f"button[data-copy=summary-0-{name}]")
            reader.tab.wait_for_function(
                f"""async () => (await navigator.clipboard.readText())
                    === document.querySelector("#summary-0-{name}").textContent"""
            )


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_text_of_each_kind_is_read_and_does_nothing(
    kind: str, browser: Any, tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    text = HOSTILE[kind]
    runs = [
        a_recorded_run(
            tmp_path / name, [text, "second"], rejects=name == "spr", name=text, text=lambda row: f"{row} {text}",
            pretrained=text, reward_model=text,
        )
        for name in ("bo", "spr")
    ]  # fmt: skip
    out = written(tmp_path / "page.html", runs)
    with Reader(browser, out) as reader:
        tab = reader.tab
        for number in range(2):
            tab.locator(".side").nth(number).locator("tr.row").nth(0).click()
        shown = tab.locator(".side").nth(0).locator("tr.text pre").evaluate("element => element.textContent")
        best = tab.locator(".side").nth(0).locator("tr.row th").nth(0).inner_text().strip()
        assert shown == inert_page(f"{best} {text}")
        assert tab.locator("#question").evaluate("element => element.textContent") == inert_page(text)
        tab.click("#next")
        tab.locator("details").evaluate_all("all => all.forEach((each) => { each.open = true; })")
        assert "owned" not in tab.title() or text in tab.title()
        assert tab.evaluate("document.title !== 'owned'")
        assert tab.locator("img, iframe, object, embed, a[href], form").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") == 1280
        assert not reader.complaints and reader.requests == [out.resolve().as_uri()]
    counted("hostile texts looked at in a browser", 1)


def test_an_injected_script_or_style_would_be_stopped_by_the_policy(browser: Any, page: Path, tmp_path: Path) -> None:
    """The second line of defence: were a text ever to become markup, the browser would not run it."""
    planted = (
        "<script>document.title='owned'</script><p style='color:red' onclick='1'>x</p><img src='http://x.invalid/'>"
    )
    out = tmp_path / "planted.html"
    out.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{planted}", 1), encoding="utf-8")
    with Reader(browser, out) as reader:
        assert reader.tab.title() != "owned"
        assert reader.tab.locator("main > p").evaluate("element => getComputedStyle(element).color") != "rgb(255, 0, 0)"
        assert sum("Content Security Policy" in text for text in reader.complaints) >= 3
        assert reader.stopped == ["http://x.invalid/ csp"]


def test_a_large_run_opens_in_moments(browser: Any, tmp_path: Path) -> None:
    questions = [f"{number} of many" for number in range(400)]
    runs = [
        a_recorded_run(tmp_path / name, questions, n=32, rejects=name == "spr", text=lambda row: f"{row} " + "so " * 60)
        for name in ("bo", "spr")
    ]
    with Reader(browser, written(tmp_path / "page.html", runs)) as reader:
        assert reader.tab.locator(".side").nth(0).locator("tr.row").count() == 32
        reader.tab.select_option("#prompt", "5")
        assert not reader.complaints
