import boundaries
import pytest

ALPHA = "packages/alpha/src/hone_alpha"
CORE = "shared/core/src/hone_core"


def test_good_tree_and_allowed_directions(tree):
    tree.write(
        f"{ALPHA}/models.py",
        "import json\nimport torch\nfrom hone_core.runs import Run\n"
        "from hone_kernels import op\nfrom . import method\n",
    )
    assert boundaries.check(tree.path) == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        (f"{CORE}/runs.py", "import hone_alpha", "runs.py:1: shared/core must not import hone_alpha"),
        (f"{CORE}/runs.py", "from hone_kernels.op import api", "shared/core must not import hone_kernels"),
        ("kernels/src/hone_kernels/op/api.py", "import hone_core", "kernels must not import hone_core"),
        (
            f"{ALPHA}/models.py",
            "x = 1\ndef f():\n    import hone_beta.method\n",
            "models.py:3: packages/alpha must not",
        ),
        (f"{ALPHA}/models.py", "import einops\n", "hone-alpha imports einops and does not declare einops"),
        (f"{ALPHA}/models.py", "from PIL import Image\n", "does not declare pillow"),
    ],
)
def test_forbidden_import(tree, file, text, problem):
    tree.member("packages/beta", "hone-beta", [])
    tree.write(file, text)
    (found,) = boundaries.check(tree.path)
    assert problem in found


def test_sibling_must_be_declared(tree):
    tree.pyproject("packages/alpha", '"hone-kernels~=0.1.0", ', "")
    tree.write(f"{ALPHA}/models.py", "import hone_kernels\n")
    (found,) = boundaries.check(tree.path)
    assert "imports hone_kernels and does not declare hone-kernels" in found


def test_module_circle(tree):
    tree.write(f"{ALPHA}/method.py", "from hone_alpha.models import x\n")
    tree.write(f"{ALPHA}/models.py", "from .data import y\n")
    tree.write(f"{ALPHA}/data.py", "from . import method\n")
    (found,) = boundaries.check(tree.path)
    assert "hone_alpha.data -> hone_alpha.method -> hone_alpha.models -> hone_alpha.data" in found


def test_late_and_typing_imports_make_no_circle(tree):
    tree.write(f"{ALPHA}/method.py", "def f():\n    from hone_alpha.models import x\n    return x\n")
    tree.write(
        f"{ALPHA}/models.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hone_alpha.data import y\n"
        "import hone_alpha.method\n",
    )
    tree.write(f"{ALPHA}/data.py", "import hone_alpha.models\n")
    assert boundaries.check(tree.path) == []


def test_relative_imports_are_resolved(tree):
    file = tree.write(
        "kernels/src/hone_kernels/op/api.py", "from ..other import x\nfrom . import reference\nimport a.b\n"
    )
    found = [(item.module, item.names) for item in boundaries.imports(file, "hone_kernels.op.api")]
    assert found == [("hone_kernels.other", ("x",)), ("hone_kernels.op", ("reference",)), ("a.b", ())]


def test_circles_are_found_once():
    assert boundaries.circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a -> b -> a"]
    assert boundaries.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
