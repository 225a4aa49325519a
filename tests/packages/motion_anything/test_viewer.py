"""The page of motions: what it holds, and in a real browser (Chromium, headless) where it and playwright are there."""

import base64
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from hone_motion_anything.config import ConvertConfig, GenerateConfig
from hone_motion_anything.grammar import draw_scenes, perform
from hone_motion_anything.motion_files import Motion, write_motion
from hone_motion_anything.music import click_track, write_wav
from hone_motion_anything.skeletons import KIT
from hone_motion_anything.viewer import write_viewer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
TITLES = ("a </script><b>person</b>", "waves & bows")


@pytest.fixture(scope="module")
def motions():
    joints = perform(draw_scenes(2, torch.Generator().manual_seed(2)))
    return dict(zip(TITLES, joints, strict=True))


@pytest.fixture(scope="module")
def path(motions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    sound = write_wav(click_track(120, 0.0, 4.0), folder / "music.wav")
    cells = torch.zeros(20, 6, dtype=torch.bool)
    cells[5:10, 4] = True
    return write_viewer(motions, folder / "page.html", marks={TITLES[1]: cells}, beats=[0, 10], sound=sound)


def held(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(text)


def test_the_page_holds_what_it_shows(path, motions):
    data = held(path)
    assert [motion["title"] for motion in data["motions"]] == list(TITLES)
    assert (data["fps"], data["frames"], data["beats"]) == (20, 81, [0, 10])
    for entry, joints in zip(data["motions"], motions.values(), strict=True):
        places = np.frombuffer(base64.b64decode(entry["places"]), "<f4").reshape(joints.shape)
        assert np.array_equal(places, joints.numpy().astype("<f4"))
    marks = np.frombuffer(base64.b64decode(data["motions"][1]["marks"]), np.uint8).reshape(20, 6)
    assert marks.sum() == 5
    assert marks[5:10, 4].all()
    assert base64.b64decode(data["sound"]) == path.with_name("music.wav").read_bytes()
    # Left wrist, right ankle, neck, pelvis.
    assert [data["part_of"][joint] for joint in (20, 8, 12, 0)] == [4, 2, 3, 0]
    # It asks for nothing from elsewhere.
    assert not re.search(r'(src|href)="|https?://|url\(|@import', path.read_text(encoding="utf-8"))


def test_other_skeletons_and_rates(tmp_path):
    joints = torch.rand(4, KIT.count, 3)
    data = held(write_motion(Motion(joints, 12.5, KIT), tmp_path / "kit.html"))
    assert (data["fps"], len(data["parents"]), data["motions"][0]["title"]) == (12.5, 21, "kit")
    assert ConvertConfig(source=tmp_path / "a.bvh", to="html").to == "html"
    assert GenerateConfig(texts=("a person bows",), formats=("html",)).formats == ("html",)


def test_bad_motions(motions, tmp_path):
    some = motions[TITLES[0]]
    with pytest.raises(ValueError, match=r"ending in \.html"):
        write_viewer(motions, tmp_path / "a.htm")
    with pytest.raises(ValueError, match=r"of one length; got \[80, 81\]"):
        write_viewer({"a": some, "b": some[1:]}, tmp_path / "a.html")
    with pytest.raises(ValueError, match="another skeleton"):
        write_viewer({"a": some[:, 1:]}, tmp_path / "a.html")
    for title, cells in (("b", torch.ones(20, 6)), ("a", torch.ones(20, 5))):
        with pytest.raises(ValueError, match=r"\[time, 6\] of a shown motion"):
            write_viewer({"a": some}, tmp_path / "a.html", marks={title: cells.bool()})
    with pytest.raises(FileNotFoundError):
        write_viewer({"a": some}, tmp_path / "a.html", sound=tmp_path / "none.wav")
    assert not (tmp_path / "a.html").exists()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, path):
    errors, asked = [], []
    found = browser.new_page(viewport={"width": 800, "height": 600})
    found.on("pageerror", lambda error: errors.append(error))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(path.as_uri())
    yield found
    found.close()
    assert not errors
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def frame(page):
    return int(page.evaluate("document.documentElement.dataset.frame"))


def picture(page):
    return page.evaluate("document.getElementById('stage').toDataURL()")


def test_the_browser_plays_and_stops(page):
    assert frame(page) == 0
    page.click("#play")
    page.wait_for_function("Number(document.documentElement.dataset.frame) > 5")
    assert page.inner_text("#play") == "Pause"
    page.click("#play")
    stopped = frame(page)
    assert page.evaluate("document.getElementById('sound').paused")
    # Sound and motion are at one place.
    assert abs(page.evaluate("document.getElementById('sound').currentTime") - stopped / 20) < 0.1
    page.wait_for_timeout(150)
    assert frame(page) == stopped
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert frame(page) == stopped + 1


def test_the_browser_shows_frames_views_beats_and_marks(page):
    seen = [picture(page)]
    page.fill("#time", "40")
    assert frame(page) == 40
    assert page.inner_text("#clock") == "2.00 s, frame 40 of 80"
    assert page.evaluate("getComputedStyle(document.getElementById('beat')).visibility") == "hidden"
    seen.append(picture(page))
    page.fill("#time", "11")
    assert page.evaluate("getComputedStyle(document.getElementById('beat')).visibility") == "visible"
    page.fill("#time", "40")
    page.mouse.move(400, 200)
    page.mouse.down()
    page.mouse.move(500, 220)
    page.mouse.up()
    seen.append(picture(page))
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(100)
    seen.append(picture(page))
    page.click("#names input >> nth=0")
    seen.append(picture(page))
    assert len(set(seen)) == 5
    # Marked time steps are bright in the strip: a quarter of the way, in the fifth row, and not at its end.
    colour = """x => {
        const strip = document.getElementById('parts'), row = strip.height / 7;
        return [...strip.getContext('2d').getImageData(x * strip.width, 4.5 * row, 1, 1).data].slice(0, 3);
    }"""
    assert page.evaluate(colour, 0.12 + 0.86 * 7.5 / 20) == [0xFF, 0xD5, 0x4A]
    assert page.evaluate(colour, 0.12 + 0.86 * 15.5 / 20) == [0xD8, 0xDE, 0xE9]


def test_titles_are_text_in_the_browser(page):
    assert [label.strip() for label in page.locator("#names label").all_inner_texts()] == list(TITLES)
    assert page.locator("#names b").count() == 0
