"""Commands, links and names in Markdown files are real."""

import re
import shlex

import pytest
import workspace
from helps import verb_helps

ROOT = workspace.ROOT
PAGES = [name for name in workspace.tracked_files() if name.suffix == ".md"]
BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
MEMBERS = {member.name: member for member in workspace.members()}


def commands(page):
    """Single commands of a page's shell blocks: comments dropped, continued lines joined, && split."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line and not line.startswith("#"):
                yield from (part.strip() for part in line.split("&&"))


ALL = [pytest.param(page, command, id=f"{page}: {command}"[:90]) for page in PAGES for command in commands(page)]


def check_words(words):
    """Follow a command to the script that it names, and look at the script's verbs and flags."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["uv", "run"]:
        rest = words[2:]
        while rest and rest[0].startswith("--"):
            takes_value = rest[0] in ("--package", "--extra", "--group", "--with", "--python")
            if rest[0] == "--package":
                assert rest[1] in MEMBERS, f"no member {rest[1]}"
            rest = rest[2 if takes_value else 1 :]
        return check_words(rest)
    if words[0] in MEMBERS and len(words) > 1 and not words[1].startswith("-"):
        assert words[0] in MEMBERS[words[0]].project.get("scripts", {}), f"{words[0]} declares no script"
        helps = verb_helps(words[0])
        assert words[1] in helps, f"{words[0]} has no verb {words[1]}"
        shown = helps[words[1]][1]
        for flag in (word.partition("=")[0] for word in words[2:] if re.match(r"--[a-z]", word)):
            assert re.search(rf"{re.escape(flag)}\b", shown), f"{words[0]} {words[1]} has no {flag}"
        return None
    if words[0] in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        shown = (ROOT / words[1]).read_text(encoding="utf-8")
        for flag in (word.partition("=")[0] for word in words[2:] if re.match(r"--[a-z]", word)):
            assert f'"{flag}"' in shown, f"{words[1]} has no {flag}"
        return None
    known = {"pip", "uv", "pytest", "cd", "git", "python", "python3", "accelerate", "lm_eval", "torchrun", *MEMBERS}
    assert words[0] in known, f"unknown command {words[0]}"
    for word in words[1:]:
        if re.match(r"(packages|shared|kernels|tests|tools|docs)/", word):
            assert (ROOT / word).exists(), f"there is no {word}"
    return None


@pytest.mark.parametrize(("page", "command"), ALL)
def test_commands_name_what_exists(page, command):
    # A substitution is a command of its own.
    for inner in re.findall(r"\$\(([^)]*)\)", command):
        check_words(shlex.split(inner))
    check_words(shlex.split(re.sub(r"\$\([^)]*\)", "X", command)))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [a or b for a, b in LINK.findall(text)]
    missing = [
        target
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and not (ROOT / page).parent.joinpath(target.partition("#")[0]).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("member", [one.folder for one in MEMBERS.values() if one.kind != "packages"], ids=str)
def test_the_python_of_shared_members_runs_as_it_stands(member, tmp_path, monkeypatch):
    """That of methods is in their contract."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / member / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    # Published weights are not at hand.
    here = [block for block in blocks if "load_published" not in block and "from_published" not in block]
    assert here
    scope = {}
    for block in here:
        exec(compile(block, f"{member} README", "exec"), scope)


def test_the_two_commands_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install uv && uv run --package hone-blade hone-blade demo\n" in text
    assert "\npip install uv && uv run --all-packages pytest\n" in text
    assert "uv run --all-packages pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_tree_names_every_top_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)/ +\S", text, re.M))
    tracked = {name.parts[0] for name in workspace.tracked_files() if len(name.parts) > 1 and name.parts[0][0] != "."}
    assert tracked - {"results"} <= listed <= tracked | {"results"}
