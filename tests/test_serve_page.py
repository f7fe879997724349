"""The page in a real browser: what it shows, who wrote it, keys, sizes, and that nothing leaves for another host."""

import json
from collections.abc import Iterator

import pytest

import cats
from cats.writers import WRITERS
from tests.answering_server import Gate, Served, load_tiny, serving, until
from tests.browser import CHROMIUM, Page, browsing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
METHOD = cats.CascadeConfig(tree_topk=4, total_tokens=24)
QUESTION = "Tell me a story about two brothers."
IDLE = "document.getElementById('send').textContent === 'Send'"
TURNS = "[...document.querySelectorAll('.assistant')]"
ENTER, ESCAPE = ("Enter", 13, "\r"), ("Escape", 27)


@pytest.fixture(scope="module")
def model() -> cats.CatsModel:
    return load_tiny()


@pytest.fixture(scope="module")
def served(model: cats.CatsModel) -> Iterator[Served]:
    with serving(model, cats.build_method(METHOD, model), max_tokens=48) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(browser: Page, served: Served) -> Page:
    browser.events.clear()
    browser.command("Page.navigate", url=served.address)
    browser.until("document.readyState === 'complete' && document.getElementById('legend').children.length === 6")
    return browser


def ask(page: Page, question: str) -> None:
    page.type(question)
    page.press(*ENTER)
    page.until(f"{TURNS}.length > 0 && {IDLE}")


def shown(page: Page) -> list[str]:
    """Text of every answer, without the line of its cost."""
    lines = (
        f"{TURNS}.map((turn) => {{ const copy = turn.cloneNode(true); copy.querySelector('.cost')?.remove(); return copy.textContent; }})"
    )
    return list(page.evaluate(lines))


def test_a_conversation_is_the_librarys_and_each_token_has_its_writer(browser: Page, served: Served, model: cats.CatsModel) -> None:
    page = opened(browser, served)
    ask(page, QUESTION)
    first = model.chat(QUESTION, METHOD, max_new_tokens=48)
    assert shown(page) == [first.text]
    classes = page.evaluate("[...document.querySelectorAll('.assistant span:not(.cost)')].map((span) => span.className)")
    assert {"by-draft", "by-target"} < set(classes) <= {f"by-{writer}" for writer in WRITERS}
    styles = page.evaluate("[...document.querySelectorAll('#legend span')].map((span) => getComputedStyle(span).textDecoration)")
    assert len(set(styles)) == len(WRITERS)
    assert page.evaluate("document.getElementById('status').textContent").startswith(f"{METHOD.label((2, 6))} \u00b7 no memory budget")
    assert "tokens/pass" in page.evaluate("document.getElementById('status').textContent")
    ask(page, "Go on.")
    messages = [("user", QUESTION), ("assistant", first.text), ("user", "Go on.")]
    second = model.chat([{"role": role, "content": text} for role, text in messages], METHOD, max_new_tokens=48)
    assert shown(page) == [first.text, second.text]


def test_nothing_leaves_and_nothing_is_amiss(browser: Page, served: Served) -> None:
    page = opened(browser, served)
    ask(page, "<img src=http://example.com/x onerror=alert(1)>")
    assert page.evaluate("document.querySelector('.user').textContent").startswith("<img")
    assert not page.evaluate("document.querySelectorAll('img').length")
    asked = [event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(served.address) for url in asked)
    assert not [event for event in page.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]


def test_keys_and_a_new_chat(browser: Page, model: cats.CatsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    method = cats.build_method(METHOD, model)
    gate = Gate(method.propose)
    monkeypatch.setattr(method, "propose", gate)
    with serving(model, method, max_tokens=48) as served:
        page = opened(browser, served)
        page.type("one")
        page.press(*ENTER, shift=True)
        page.type("two")
        assert page.evaluate("document.getElementById('question').value") == "one\ntwo"
        page.press(*ENTER)
        until(lambda: gate.begun == 1)
        assert not page.evaluate(IDLE)
        page.press(*ESCAPE)
        page.until(IDLE)
        until(lambda: served.desk.inside == 0)
        gate.open()
        assert "stopped" in page.evaluate("document.querySelector('.cost').textContent")
        page.evaluate("document.getElementById('fresh').click()")
        assert not page.evaluate("document.getElementById('log').textContent")
        ask(page, QUESTION)
        assert shown(page) == [model.chat(QUESTION, METHOD, max_new_tokens=48).text]


def test_it_fits_a_phone_and_follows_the_colour_scheme(browser: Page, served: Served) -> None:
    page = opened(browser, served)
    grounds = set()
    for dark in (False, True):
        page.resize(360, 640, dark=dark, phone=True)
        ask(page, "x" * 200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.getElementById('send').getBoundingClientRect().bottom") <= 640
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.resize(900, 700)
    assert len(grounds) == 2


def test_a_key_is_asked_for(browser: Page, model: cats.CatsModel) -> None:
    with serving(model, api_key="secret", max_tokens=8) as served:
        page = opened(browser, served)
        page.until("!document.getElementById('key').hidden")
        page.evaluate(f"document.getElementById('key').value = {json.dumps('secret')}")
        page.evaluate("document.getElementById('question').focus()")
        ask(page, "Hello there")
        assert shown(page) == [model.chat("Hello there", cats.CascadeConfig(), max_new_tokens=8).text]
