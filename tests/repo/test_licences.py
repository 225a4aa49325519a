from email.message import Message

import licences
import pytest
import workspace


def metadata(**fields):
    message = Message()
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License_Expression": "MPL-2.0 AND MIT", "License": "other"}, "MPL-2.0 AND MIT"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        (
            {
                "License": "Copyright (c) 2015\n\nRedistribution",
                "Classifier": ["License :: OSI Approved :: MIT License"],
            },
            "MIT",
        ),
        ({"Classifier": ["Topic :: X", "License :: OSI Approved :: A", "License :: B"]}, "A and B"),
        ({}, ""),
    ],
)
def test_what_metadata_state(fields, expected):
    assert licences.licence("x", metadata(**fields)) == expected


def test_what_asks_for_a_look():
    texts = {
        "a": "MIT",
        "b": "LGPL-2.1",
        "c": "MPL-2.0 AND MIT",
        "d": "CC-BY-NC-4.0",
        "e": "LicenseRef-NVIDIA-Proprietary",
    }
    shown = licences.tables(texts, {name: ["hone-blade", "hone-nar[fid]"] for name in texts})
    assert [line.split(" | ")[0] for line in shown["named"].splitlines()[2:]] == ["| b", "| c", "| d", "| e"]
    assert "| a | MIT | blade, nar[fid] |" in shown["all"]


@pytest.mark.skipif(not (workspace.ROOT / "uv.lock").exists(), reason="no resolution here: uv has not been run")
def test_who_installs_what():
    by = licences.installers()
    assert by["torch"] == ["all ten"]
    assert by["torchao"] == ["hone-fpsattention[linears]"]
    assert not any(name.startswith("hone-") for name in by)


@pytest.mark.skipif(not (workspace.ROOT / "uv.lock").exists(), reason="no resolution here: uv has not been run")
def test_a_page_that_differs_is_found(monkeypatch):
    text = licences.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(licences, "here", lambda: {"rich": "MIT"})
    assert licences.check(text) == []
    assert (
        "rich: its metadata say 'MIT', the page 'GPL'"
        in licences.check(text.replace("| rich | MIT |", "| rich | GPL |"))[0]
    )
    assert "rich is missing" in licences.check(text.replace("| rich | MIT |", "| rch | MIT |"))[1]
    assert (
        "who installs what differs"
        in licences.check(text.replace("| rich | MIT | all ten |", "| rich | MIT | nar |"))[0]
    )
