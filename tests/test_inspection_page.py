"""The page of sample.py --inspect in Chromium: selecting heads and tokens, the numbers shown, the layout."""

import math

import pytest
import torch

from common.tokenizer import bytes_tokenizer
from generation.options import SamplingOptions
from inspection.page import inspect_prompt, render_page
from tests.oracle import attention_weights
from tests.test_inspection import EOS, KINDS, SMALL, TEXT, make, queries_and_keys

pytestmark = pytest.mark.slow

LAYER, HEAD, QUERY = 1, 2, 15


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of a model and a prompt. It may log no message, raise no error and request nothing but itself."""
    problems, requests, pages = [], [], []

    def open_page(model, ids, options=None, **context):
        data = inspect_prompt(model, bytes_tokenizer(), ids, options or SamplingOptions())
        (tmp_path / "out.html").write_text(render_page(data, "a <model>"), encoding="utf-8")
        tab = browser.new_context(**context).new_page()
        pages.append(tab)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((tmp_path / "out.html").as_uri())
        return tab

    yield open_page
    assert problems == []
    assert requests == [(tmp_path / "out.html").as_uri()] * len(pages)
    for tab in pages:
        tab.context.close()


def scores(tab):
    """The rows of the table: {key position: numbers as shown}."""
    rows = tab.locator("#scores tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {int("".join(filter(str.isdigit, row[0][:3]))): row[1:5] for row in rows}


def number(shown):
    return 0.00005 if shown.startswith("<") else float(shown.replace("−", "-").replace("∞", "inf").replace("–", "nan"))


@pytest.mark.parametrize("kind", ["learned", "documents, window, n-grams"])
def test_the_numbers_of_a_chosen_head_and_token_are_the_models(visit, kind):
    model = make(kind)
    tab = visit(model, TEXT)
    assert "a <model>" in tab.title()
    tab.locator("#grid button").nth(LAYER * SMALL.n_head + HEAD).click()
    tab.locator("#tokens button").nth(QUERY).click()
    assert tab.locator("#h-map").text_content() == "One head: layer 2, head 3"
    assert (tab.locator("#layer").input_value(), tab.locator("#head").input_value()) == (str(LAYER), str(HEAD))

    q, k = queries_and_keys(model, TEXT)[LAYER]
    key = k[:, HEAD // (SMALL.n_head // model.config.kv_heads)]
    first = model.first_visible(torch.tensor([TEXT]))
    begin = 0 if first is None else int(first[0, QUERY])
    expected = attention_weights(q[QUERY : QUERY + 1, HEAD], key[begin : QUERY + 1])[0]
    shown = scores(tab)
    assert len(shown) == len(TEXT)
    for s in range(len(TEXT)):
        dot, scaled, _, weight = shown[s + 1]
        if begin <= s <= QUERY:
            assert number(dot) == pytest.approx(float(q[QUERY, HEAD] @ key[s]), abs=0.011)
            assert number(scaled) == pytest.approx(number(dot) / math.sqrt(SMALL.head_size), abs=0.011)
            assert number(weight) == pytest.approx(float(expected[s - begin]), abs=6e-4)
        else:
            assert (scaled, weight) == ("−∞", "0")
    assert sum(number(row[3]) for row in shown.values()) == pytest.approx(1, abs=0.002)
    assert tab.locator("#scores tfoot td").nth(4).text_content() == "1.000"

    likely = tab.locator("#next tbody tr").first.locator("td").nth(2).text_content()
    with torch.no_grad():
        probabilities = model(torch.tensor([TEXT[: QUERY + 1]]))[0, -1].softmax(0)
    assert float(likely.removesuffix(" %")) == pytest.approx(100 * float(probabilities.max()), abs=0.06)
    assert "The actual next token is" in tab.locator("#summary").text_content()


def test_keyboard_and_map_change_the_choice(visit):
    tab = visit(make("learned"), TEXT)
    grid, tokens = tab.locator("#grid button"), tab.locator("#tokens button")
    grid.first.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert grid.nth(SMALL.n_head + 1).get_attribute("aria-pressed") == "true"
    tokens.nth(3).click()
    tab.keyboard.press("ArrowRight")
    assert tokens.nth(4).get_attribute("aria-pressed") == "true"
    tab.locator("#map").focus()
    tab.keyboard.press("ArrowUp")
    assert tokens.nth(3).get_attribute("aria-pressed") == "true"
    cell = tab.evaluate("[layout.edge + 1.5 * layout.cell, layout.edge + 6.5 * layout.cell]")  # key 1, query 6
    tab.locator("#map").click(position={"x": cell[0], "y": cell[1]})
    assert tokens.nth(6).get_attribute("aria-pressed") == "true"
    weight = scores(tab)[2][3]
    assert f"as query, t (2) as key: weight {weight}" in tab.locator("#readout").text_content()
    assert tab.locator("#scores tr[aria-selected=true]").text_content().startswith("2")
    tab.locator("#products canvas").first.hover(position={"x": 2, "y": 2})
    assert tab.locator("#products + p").text_content().startswith("number 1: ")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390), ("light", 320)])
def test_every_kind_of_model_fits_the_screen(visit, scheme, width):
    for kind in KINDS:
        tab = visit(make(kind), TEXT, color_scheme=scheme, viewport={"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab = visit(make("learned"), [EOS], SamplingOptions(temperature=0), color_scheme=scheme)
    assert "only one token can be drawn" in tab.locator("#summary").text_content()
    tab = visit(make("learned"), [EOS, *(b"a long text. " * 24)], color_scheme=scheme)
    assert "Shortened: " in tab.locator("#omitted").text_content()
    assert "not shown" in tab.locator("#scores tbody").text_content()
    assert tab.locator("#scores tfoot td").nth(4).text_content() == "1.000"
