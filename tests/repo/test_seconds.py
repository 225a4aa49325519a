import json

import pytest
import seconds
import workspace

OUTPUT = """
PASSED tests/a.py
============ seconds per member ============
  177.4 kernels
  195.0 packages/blade
    3.5 repo
=========== slowest 20 durations ===========
84.41s call     tests/kernels/test_interpreter_lane.py::test_interpreted
======= 5324 passed, 7 skipped in 471.71s (0:07:51) =======
"""


def test_rows_of_a_run():
    found = {row["variant"]: row["value"] for row in seconds.rows(OUTPUT)}
    assert found == {seconds.WHOLE: 471.71, "kernels": 177.4, "packages/blade": 195.0, "repo": 3.5}
    assert seconds.over(seconds.rows(OUTPUT)) == ["packages/blade takes 195 s; at most 160 are allowed"]
    late = OUTPUT.replace("471.71s (0:07:51)", "721.00s (0:12:01)")
    assert "the whole command takes 721 s" in seconds.over(seconds.rows(late))[0]


@pytest.mark.parametrize("end", ["1 failed, 5 passed in 3.00s", "5 passed, 1 error in 3.00s", "no tests ran in 0.01s"])
def test_a_run_that_did_not_pass_gives_no_rows(end):
    with pytest.raises(ValueError, match="expected the output of tests that passed"):
        seconds.rows(OUTPUT.replace("5324 passed, 7 skipped in 471.71s (0:07:51)", end))


def test_the_measured_command_is_that_of_the_readme_and_of_ci():
    assert " ".join(seconds.COMMAND) in (workspace.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert " ".join(seconds.COMMAND[:-1]) in (workspace.ROOT / "README.md").read_text(encoding="utf-8")


def test_every_member_has_to_be_listed_once(tmp_path, monkeypatch):
    names = [seconds.WHOLE, "repo", *(str(member.folder) for member in workspace.members())]
    monkeypatch.setattr(seconds, "FILE", tmp_path / "seconds.json")

    def check(names):
        seconds.FILE.write_text(json.dumps({"rows": [{"variant": name} for name in names]}))
        return seconds.check()

    assert check(names) == []
    for wrong in (names[:-1], [*names, names[-1]], [*names, "packages/gone"]):
        (problem,) = check(wrong)
        assert problem.endswith(f"missing, unknown or twice: {wrong[-1] if len(wrong) > len(names) else names[-1]}")
