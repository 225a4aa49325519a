import json
import re
import tomllib

import gallery
import pytest
from workspace import ROOT

SPEC = tomllib.loads((ROOT / "results" / "nar" / "tables.toml").read_text(encoding="utf-8"))["demo"]


@pytest.fixture
def run(tmp_path):
    """A demo's run with the committed rows of hone-nar, one picture and one video."""
    folder = tmp_path / "nar"
    (folder / "figures").mkdir(parents=True)
    (folder / "artifacts").mkdir()
    committed = json.loads((ROOT / "results" / "nar" / SPEC["files"][0]).read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps({"status": "done", "rows": committed["rows"]}))
    (folder / "environment.json").write_text(json.dumps({"cpu": "A <b> CPU", "commit": "0123456789ab"}))
    (folder / "figures" / "a.png").write_bytes(b"picture")
    (folder / "figures" / "a.svg").write_bytes(b"the same")
    (folder / "artifacts" / "a.mp4").write_bytes(b"video")
    return folder


def test_the_page_needs_nothing_but_itself(run):
    text = gallery.page({"nar": run})
    sources = re.findall(r'src="([^"]*)"', text)
    picture = "data:image/png;base64,cGljdHVyZQ=="
    assert sources == [picture, "data:video/mp4;base64,dmlkZW8=", picture]
    assert "Not shown here: blade, " in text
    assert re.findall(r'href="(?!#)([^"]*)"', text) == ["https://arxiv.org/abs/2503.10696"]
    assert "Measured on A &lt;b&gt; CPU, commit 0123456789; from results.json." in text


def test_the_table_is_that_of_the_readme(run):
    readme = (ROOT / "packages" / "nar" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- table: demo -->\n(.*?)\n\n", readme, re.S)[1].splitlines()
    cells = [cell.strip() for line in [table[0], *table[2:]] for cell in line.strip("|").split("|")]
    assert re.findall(r"<t[hd]>(.*?)</t[hd]>", gallery.page({"nar": run})) == cells


def test_only_finished_demos_are_read(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gallery.py", "--read", "--only", "nar,blade", "--runs", str(run.parent)])
    assert gallery.main() == 0
    assert (run.parent / "index.html").is_file()
    assert "without blade" in capsys.readouterr().out
    (run / "results.json").write_text(json.dumps({"status": "running", "rows": []}))
    assert gallery.main() == 1
    assert "no demo has run" in capsys.readouterr().out


def test_a_demo_that_fails_is_no_success(run, monkeypatch):
    asked = []
    monkeypatch.setattr(gallery, "perform", lambda package, folder: asked.append((package, folder)))
    monkeypatch.setattr("sys.argv", ["gallery.py", "--only", "nar,blade", "--runs", str(run.parent)])
    assert gallery.main() == 1
    assert asked == [("blade", run.parent / "blade")]


def test_a_package_without_a_demo_is_left_out_and_named(run, monkeypatch, capsys):
    known = list(gallery.methods.load())
    without = run.parent / "tables.toml"
    without.write_text("")
    named = {name: gallery.specs(name) for name in known}
    monkeypatch.setattr(gallery, "specs", lambda name, root=ROOT: without if name == "blade" else named[name])
    asked = []
    monkeypatch.setattr(gallery, "perform", lambda package, folder: asked.append(package) or True)
    monkeypatch.setattr("sys.argv", ["gallery.py", "--runs", str(run.parent)])
    assert gallery.main() == 0
    # That of nar has run.
    assert asked == [name for name in known if name not in ("blade", "nar") and "[demo]" in named[name].read_text()]
    assert "blade" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gallery.py", "--only", "blade", "--runs", str(run.parent)])
    with pytest.raises(SystemExit):
        gallery.main()
    assert "blade has no demo yet" in capsys.readouterr().err
