"""The page of the local server in Chromium. No test reaches another machine."""

import re
import time
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from generation.text import Piece, Token
from prepare_data.novelty import Copied, Found, Novelty, Yardstick
from prepare_data.passage_index import Source
from prepare_data.passages import Passage
from server import completions
from server.options import ServerOptions
from tests.test_server import EOS, SERVED, ids_of, post, running, wait_for, written

pytestmark = pytest.mark.slow
MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&lt;b&gt;"


@pytest.fixture(scope="module")
def server():
    """Runs a server whose samples end only at their maximum length."""
    with running(replace(SERVED, sampling=replace(SERVED.sampling, stop=(), stop_at_eos=False))) as address_and_queue:
        yield address_and_queue


@pytest.fixture
def open_page(browser):
    """Opens an address in a new profile. At teardown, fails if the page logged an error or requested another host."""
    problems, contexts = [], []

    def open_page(address, *, phone=False, ready="#page"):
        size = {"width": 390, "height": 844} if phone else {"width": 1440, "height": 900}
        contexts.append(browser.new_context(viewport=size, has_touch=phone, is_mobile=phone))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else problems.append(request.url),
        )
        page.goto(address)
        expect(page.locator(ready)).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium logs "Failed to load" for every response with status 400.
    assert [problem for problem in problems if "Failed to load" not in problem] == []


def fill(page, prompt=None, **values):
    if prompt is not None:
        page.fill("#prompt", prompt)
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))


def wait_until_ended(page, outcome="done"):
    expect(page.locator(f"body[data-outcome={outcome}]")).to_be_attached(timeout=15_000)


def texts(page):
    """The texts of the samples on the page, without their prompts."""
    return page.eval_on_selector_all(
        ".text", "all => all.map(one => [...one.querySelectorAll('.token')].map(token => token.textContent).join(''))"
    )


def test_a_sample_is_streamed_and_equals_that_of_the_generator(server, open_page):
    page = open_page(server[0])
    expect(page).to_have_title("notes · Sprout")
    expect(page.locator("#prompt")).to_have_value("Once")  # from sample.py's flags, like the next two
    expect(page.locator("#set-n")).to_have_value("2")
    expect(page.locator("#set-temperature")).to_have_value("0.7")
    fill(page, "né", n=1, max_tokens=40, seed=5, temperature=1)
    page.keyboard.press("Control+Enter")
    wait_until_ended(page)
    assert texts(page) == written(ids_of("né"), 5, max_new_tokens=40, stop_at_eos=False)
    expect(page.locator(".prompt-end")).to_have_text("né")
    expect(page.locator(".top")).to_contain_text("40 tokens, maximum length")
    expect(page.locator("#status")).to_contain_text("seed 5")


def test_samples_are_side_by_side_and_stacked_on_a_phone(server, open_page):
    for phone in (False, True):
        page = open_page(server[0], phone=phone)
        if phone:
            page.click("summary")
        fill(page, "a", n=3, max_tokens=30, seed=1, temperature=1)
        page.click("#generate")
        wait_until_ended(page)
        assert texts(page) == written(ids_of("a"), 1, 3, max_new_tokens=30, stop_at_eos=False)
        boxes = [page.locator(".sample").nth(i).bounding_box() for i in range(3)]
        places = [(box["x"], box["y"]) for box in boxes]
        assert len({y for _, y in places}) == (3 if phone else 1)
        assert len({x for x, _ in places}) == (1 if phone else 3)
        assert page.evaluate_handle("document.documentElement").get_property("scrollWidth").json_value() <= (
            390 if phone else 1440
        )


def test_stop_and_escape_free_the_model(server, open_page):
    address, queue = server
    page = open_page(address)
    fill(page, "a", n=2, max_tokens=20_000, seed=1)

    def generate_until_text_appears():
        page.evaluate("document.querySelector('#samples').replaceChildren()")  # those of the last click
        page.click("#generate")
        page.locator(".sample").nth(1).locator(".token").nth(5).wait_for(state="attached")
        assert len(queue.jobs) == 1  # text appears before the sample ends

    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        generate_until_text_appears()
        stop()
        wait_until_ended(page, "stopped")
        wait_for(lambda: not queue.jobs)
        for i in range(2):
            expect(page.locator(".top").nth(i)).to_contain_text("stopped")
        expect(page.locator("#stop")).to_be_disabled()
    generate_until_text_appears()
    page.close()
    wait_for(lambda: not queue.jobs)


def test_the_card_of_a_token_shows_its_probability_and_alternatives(server, open_page):
    page = open_page(server[0])
    fill(page, "a", n=1, max_tokens=20, seed=3, temperature=0.7)
    page.click("#generate")
    wait_until_ended(page)
    answer = post(server[0], prompt="a", max_tokens=20, seed=3, temperature=0.7, logprobs=8, min_tokens=20)
    logprobs = answer["choices"][0]["logprobs"]
    offsets = logprobs["text_offset"]
    at = next(i for i, offset in enumerate(offsets) if offsets.count(offset) == 1 and logprobs["tokens"][i].isalnum())
    token = page.locator(".token").nth(len(set(offsets[: at + 1])) - 1)
    token.hover()
    card = page.locator("#card")
    expect(card).to_be_visible()
    expect(card.locator("h3")).to_contain_text(logprobs["tokens"][at])
    assert card.locator("li").count() == len(logprobs["top_logprobs"][at])
    shares = [float(text.strip(" %<")) for text in card.locator("em").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    page.mouse.move(5, 5)
    expect(card).to_be_hidden()

    page.locator(".token").first.focus()  # by keyboard
    page.keyboard.press("ArrowRight")
    expect(card).to_be_visible()
    expect(page.locator(".token.chosen")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()

    token.click()
    card.get_by_text("Continue from here").click()
    before = "".join(page.locator(".token").all_text_contents()[: len(set(offsets[: at + 1]))])
    expect(page.locator("#prompt")).to_have_value("a" + before)
    expect(card).to_be_hidden()


def test_a_drawn_end_of_text_is_shown_with_its_probability(server, open_page, monkeypatch):
    parts = [
        Piece(0, "Hi", (Token(72, "H", 0, -0.5, ()), Token(105, "i", 1, -3.0, ())), None),
        Piece(0, "", (Token(EOS, "", 2, -0.5, ((EOS, -0.5), (33, -1.5))),), "end of sequence"),
    ]
    monkeypatch.setattr(completions, "stream_texts", lambda *_, **__: iter(parts))
    page = open_page(server[0])
    fill(page, "Oh ", n=1)
    page.click("#generate")
    wait_until_ended(page)
    expect(page.locator(".top")).to_contain_text("3 tokens, end of document")
    assert texts(page) == ["Hi"]
    page.locator(".token.last").hover()
    expect(page.locator("#card h3")).to_have_text("end of text61 %")
    page.locator("#card li button").last.click()
    assert page.input_value("#prompt") == "Oh Hi!"


def test_tapping_an_alternative_continues_the_prompt_with_it(server, open_page, monkeypatch):
    tokens = [Token(72, "H", 0, -0.5, ((72, -0.5), (104, -1.5))), Token(105, "i", 1, -3.0, ((101, -0.25), (105, -3.0)))]
    monkeypatch.setattr(
        completions, "stream_texts", lambda *_, **__: iter([Piece(0, "Hi", tuple(tokens), "end of sequence")])
    )
    page = open_page(server[0], phone=True)
    page.click("summary")
    fill(page, "Oh ", n=1)
    page.click("summary")
    page.click("#generate")
    wait_until_ended(page)
    expect(page.locator(".top")).to_contain_text("2 tokens, end of document")
    page.locator(".token").nth(1).tap()
    expect(page.locator("#card h3")).to_have_text("i5.0 %")
    expect(page.locator("#card .drawn code")).to_have_text("i")
    expect(page.locator(".token").nth(1)).to_be_in_viewport()
    page.locator("#card li button").first.tap()
    assert page.input_value("#prompt") == "Oh He"


class CopiesAll(Novelty):
    """Finds one passage: characters 2 to 9."""

    def __init__(self):
        pass

    min_words = 2

    def check(self, texts):
        return [Copied(12, 7, [Found(Passage(2, 9, 2, 0), "two tre", Source(3, 7, 0, "be<b>fore", "after"))], None)]

    def yardstick(self, characters):
        return Yardstick(1, 100, 25, 3)

    def describe(self, found):
        return f"novel.txt, line {found.source.line}"


def test_copied_passages_are_a_second_tint_with_their_source(open_page, monkeypatch):
    text = "a two trees."
    tokens = tuple(Token(ord(char), char, i, -0.1, ((60, -1.0),)) for i, char in enumerate(text))
    monkeypatch.setattr(completions, "stream_texts", lambda *_, **__: iter([Piece(0, text, tokens, "length")]))
    with running(replace(SERVED, novelty=CopiesAll())) as (address, _):
        page = open_page(address)
        fill(page, "x", n=1)
        page.click("#generate")
        wait_until_ended(page)
        assert "".join(page.locator(".token.copied").all_inner_texts()) == "twotre"
        expect(page.locator(".end")).to_contain_text("copied 58.3 %; held-out text 25.0 %")
        expect(page.locator("#copied-legend")).to_be_visible()
        page.locator(".token.copied").first.hover()
        expect(page.locator("#card .source")).to_have_text("Copied: 2 words, novel.txt, line 7…be<b>foretwo treafter…")
        page.uncheck("#copied")
        assert page.locator(".token.copied").first.evaluate("one => getComputedStyle(one).boxShadow") == "none"


def test_a_page_without_the_dataset_says_so(open_page):
    for novelty, shown in (("the dataset is gone", True), (None, False)):
        with running(replace(SERVED, novelty=novelty)) as (address, _):
            page = open_page(address)
            expect(page.locator("#novelty-problem")).to_be_visible(visible=shown)
            if shown:
                expect(page.locator("#novelty-problem")).to_contain_text("the dataset is gone")
            expect(page.locator("#copied-switch")).to_be_hidden()


def test_markup_in_texts_is_shown_as_text(server, open_page, monkeypatch):
    tokens = tuple(Token(ord(char), char, i, -1.0, ((60, -1.0),)) for i, char in enumerate(MARKUP))
    monkeypatch.setattr(completions, "stream_texts", lambda *_, **__: iter([Piece(0, MARKUP, tokens, "length")]))
    page = open_page(server[0])
    fill(page, MARKUP, n=1, stop=MARKUP[:20])
    page.click("#generate")
    wait_until_ended(page)
    assert texts(page) == [MARKUP]
    expect(page.locator(".prompt-end")).to_have_text(MARKUP)
    page.locator(".token").first.hover()
    expect(page.locator("#card h3")).to_contain_text("<")
    assert page.locator("article script, article img, #card img").count() == 0
    assert page.evaluate_handle("window").get_property("hacked").json_value() is None


def test_characters_of_several_tokens_are_one_element(server, open_page, monkeypatch):
    parts = [
        Piece(0, "😀", (), None),
        Piece(0, "", tuple(Token(byte, "�", 0, -1.0, ()) for byte in "😀".encode()), None),
    ]
    parts.append(Piece(0, "!", (Token(33, "!", 1, -0.1, ()),), "length"))
    monkeypatch.setattr(completions, "stream_texts", lambda *_, **__: iter(parts))
    page = open_page(server[0])
    fill(page, "", n=1)
    page.click("#generate")
    wait_until_ended(page)
    assert page.locator(".token").all_inner_texts() == ["😀", "!"]
    page.locator(".token").first.hover()
    expect(page.locator("#card h3")).to_have_count(4)


def test_errors_are_shown_with_the_setting_that_caused_them(server, open_page, monkeypatch):
    page = open_page(server[0])
    fill(page, "a", temperature="hot")
    page.click("#generate")
    expect(page.locator("#error")).to_have_text(re.compile("temperature = 'hot': expected a number >= 0"))
    expect(page.locator(".setting.wrong label")).to_have_text("Temperature")
    fill(page, temperature=1)
    expect(page.locator(".setting.wrong")).to_have_count(0)
    page.click("#generate")
    expect(page.locator("#error")).to_be_hidden()
    wait_until_ended(page)

    def fail(*_, **__):
        yield Piece(0, "Once", (Token(79, "Once", 0, -1.0, ()),), None)
        time.sleep(0.1)
        yield Piece(0, " more", (Token(79, " more", 4, -1.0, ()),), None)
        raise completions.UserError("the model computes NaN")

    monkeypatch.setattr(completions, "stream_texts", fail)
    page.click("#generate")
    wait_until_ended(page, "failed")
    expect(page.locator("#error")).to_contain_text("the model computes NaN")
    assert texts(page)[0] == "Once more"


def test_a_reload_keeps_the_settings_and_reset_restores_the_flags(server, open_page):
    page = open_page(server[0])
    fill(page, "Zwei\nZeilen", n=4, top_k=7, stop="\\n\\n\nEnde")
    page.reload()
    expect(page.locator("#prompt")).to_have_value("Zwei\nZeilen")
    assert [page.input_value(f"#set-{name}") for name in ("n", "top_k", "stop")] == ["4", "7", "\\n\\n\nEnde"]
    page.click("#reset")
    assert [page.input_value(f"#set-{name}") for name in ("n", "top_k", "stop")] == ["2", "", ""]
    expect(page.locator("#prompt")).to_have_value("Zwei\nZeilen")


def test_keep_the_seed_repeats_the_samples(server, open_page):
    page = open_page(server[0])
    fill(page, "a", n=1, max_tokens=30, temperature=1.5)
    page.click("#generate")
    wait_until_ended(page)
    first = texts(page)
    page.click("#keep")
    page.click("#generate")
    wait_until_ended(page, "done")
    assert texts(page) == first


def test_the_login_form_asks_for_the_token(open_page):
    with running(options=ServerOptions(serve=True, host="0.0.0.0", port=0, api_token="a-long-secret")) as (address, _):
        page = open_page(address, ready="#login")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-error")).to_have_text("Wrong token.")
        page.fill("#token", "a-long-secret")
        page.keyboard.press("Enter")
        expect(page.locator("#page")).to_be_visible()
        fill(page, "a", n=1, max_tokens=5, seed=2, temperature=1)
        page.click("#generate")
        wait_until_ended(page)
        assert texts(page) == written(ids_of("a"), 2, max_new_tokens=5)


def test_a_stopped_server_is_reported(open_page):
    with running() as (address, _):
        page = open_page(address)
    page.click("#generate")
    page.locator("#error").wait_for()
    message = page.locator("#error p").text_content()
    assert message == "The server does not answer. Is sample.py --serve still running?"
