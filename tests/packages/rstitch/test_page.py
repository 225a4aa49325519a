"""The server's page in a real browser: Chromium, headless, where it and playwright are installed."""

import os
import shutil

import pytest
from hone_rstitch.config import EngineConfig, StitchConfig

from .test_serve import KEY, Served, direct, pair  # noqa: F401, a fixture

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    errors = []
    found = browser.new_page()
    found.on("pageerror", lambda error: errors.append(error))
    yield found
    found.close()
    assert not errors


@pytest.fixture(scope="module")
def served(pair):  # noqa: F811
    served = Served(pair, EngineConfig(), api_key=KEY, stitch=StitchConfig(tau=0.02))
    yield served
    served.close()


def ask(page, served, question, *, key=KEY, **fields):
    page.goto(served.url)
    page.fill("#prompt", question)
    page.fill("#key", key)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")
    page.wait_for_selector("#go:enabled")


def test_an_answer_is_coloured_by_model(page, served, pair):  # noqa: F811
    text, output = direct(pair, "123*45")
    ask(page, served, "123*45")
    assert page.inner_text("#answer") == text[0]
    spans = page.query_selector_all("#answer span")
    # The end of the text is a token without text.
    who = [span.get_attribute("class").split() for span in spans]
    assert [names[0] for names in who] == [("small", "large")[m] for m in output.models[0].tolist()]
    assert sum("cut" in names for names in who) == output.usage[0].discarded > 0
    colours = {page.evaluate("e => getComputedStyle(e).backgroundColor", span) for span in spans}
    assert len(colours) == 2
    usage = output.usage[0]
    assert page.inner_text("#cost") == (
        f"{usage.tokens[0]} tokens by the small model, {usage.tokens[1]} by the large one; "
        f"{usage.discarded} thrown away, {usage.calls[0]} + {usage.calls[1]} calls"
    )
    assert page.inner_text("#error") == ""
    assert "entropy" in spans[0].get_attribute("title")


def test_settings_reach_the_server(page, served, pair):  # noqa: F811
    ask(page, served, "123*45", tau="2", most="5")
    spans = page.query_selector_all("#answer span")
    assert [span.get_attribute("class") for span in spans] == ["small"] * 5


def test_errors_are_said_and_the_page_goes_on(page, served):
    ask(page, served, "123*45", key="another")
    assert "key" in page.inner_text("#error")
    page.fill("#key", KEY)
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    assert page.inner_text("#error") == ""
    assert page.inner_text("#answer")
