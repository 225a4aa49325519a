import importlib.util
import itertools
import socket
import threading
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from hone_splat import Gaussians
from hone_splat.formats import write_cloud
from hone_splat.viewer import MARKED
from hone_zpressor import inputs, viewing
from hone_zpressor.config import ViewConfig

spec = importlib.util.spec_from_file_location(
    "capturefiles", Path(__file__).parents[2] / "shared" / "splat" / "capturefiles.py"
)
capturefiles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capturefiles)


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def viewers(monkeypatch):
    """Those that are made, with the sliders that they have."""
    made, real = [], viewing.Viewer

    class Watched(real):
        def __init__(self, *args):
            super().__init__(*args)
            self.sliders, self.frustums = [], []
            made.append(self)

        def slider(self, *args):
            self.sliders.append(super().slider(*args))
            return self.sliders[-1]

        def cameras(self, *args, **kwargs):
            self.frustums = super().cameras(*args, **kwargs)
            return self.frustums

    monkeypatch.setattr(viewing, "Viewer", Watched)
    return made


@pytest.fixture
def over(monkeypatch):
    """Event that ends a page's time, which otherwise stands still: no test depends on how fast the machine is."""
    event = threading.Event()
    later = itertools.count(1)  # over before the page's end is reckoned, too
    clock = types.SimpleNamespace(
        monotonic=lambda: 1e9 * next(later) if event.is_set() else 0.0, perf_counter=time.perf_counter, sleep=time.sleep
    )
    monkeypatch.setattr(viewing, "time", clock)
    return event


def test_a_file_is_shown(tmp_path, start, port, viewers, over):
    cloud = Gaussians(
        torch.eye(3), torch.full((3, 3), 0.1), torch.eye(4)[:3], torch.full((3,), 0.5), torch.zeros(3, 3, 1)
    )
    cfg = inputs.find_viewed(ViewConfig(splat=write_cloud(cloud, tmp_path / "a.spz"), port=port, seconds=2.0))
    with start(cfg, "view") as run:
        found = []

        def ask():
            while not viewers:
                time.sleep(0.02)
            found.append(urllib.request.urlopen(viewers[0].url))
            over.set()

        asks = threading.Thread(target=ask)
        asks.start()
        report = viewing.view(cfg, run)
        asks.join()
    assert found[0].status == 200
    assert {row.metric: row.value for row in report.rows} == {"gaussians": 3, "made": 0}


def test_a_slider_sets_the_anchors(tmp_path, start, port, viewers, stored, over):
    folder = capturefiles.write_colmap(tmp_path / "scene", binary=True, views=8)
    cfg = ViewConfig(
        colmap=folder, model="tiny", checkpoint=stored(), views=6, anchors=3, size=(32, 32), prune=0.0, port=port,
        seconds=2.5,
    )  # fmt: skip
    colours = []

    def move():
        while not (viewers and viewers[0].sliders):
            time.sleep(0.02)
        colours.append([handle.color for handle in viewers[0].frustums])
        first = viewers[0].frustums
        viewers[0].sliders[0].value = 5
        while viewers[0].frustums is first:
            time.sleep(0.02)
        over.set()

    mover = threading.Thread(target=move)
    with start(inputs.find_viewed(cfg), "view") as run:
        mover.start()
        report = viewing.view(cfg, run)
        mover.join()
    colours.append([handle.color for handle in viewers[0].frustums])
    # Frustums stand where the photographs were taken, in the capture's units.
    taken = capturefiles.room(views=8)[1][:, :3, 3]
    shown = torch.tensor([list(handle.position) for handle in viewers[0].frustums]).double()
    assert float(torch.cdist(shown, taken).amin(1).max()) < 1e-4
    assert [len({*shown}) for shown in colours] == [2, 2]
    assert [sum(colour == MARKED for colour in shown) for shown in colours] == [3, 5]
    assert {row.metric: row.value for row in report.rows} == {"gaussians": 5 * 32 * 32, "made": 2}


def test_nothing_to_show_is_named(tmp_path):
    with pytest.raises(ValueError, match="name a file by splat, or your photographs"):
        inputs.find_viewed(ViewConfig())
    with pytest.raises(FileNotFoundError, match="there is no"):
        inputs.find_viewed(ViewConfig(splat=tmp_path / "a.ply"))
    with pytest.raises(ValueError, match="ending in"):
        ViewConfig(splat=tmp_path / "a.obj")
