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


def test_verbs_of_kernels_import_core_and_ops_no_verb(tree):
    op = "kernels/src/hone_kernels/op"
    tree.write(f"{op}/bench.py", "from hone_core.runs import Run\n")
    (found,) = boundaries.check(tree.path)
    assert "hone-kernels imports hone_core and does not declare hone-core" in found
    extra = "[project.optional-dependencies]\nbench = ['hone-core~=0.1.0']\n[project.scripts]"
    tree.pyproject("kernels", "[project.scripts]", extra)
    assert boundaries.check(tree.path) == []
    tree.write(f"{op}/api.py", "def f():\n    from .bench import Run\n")
    (found,) = boundaries.check(tree.path)
    assert "api.py:2: an op must not import hone_kernels.op.bench, which needs an extra" in found


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


def test_import_in_a_function_makes_a_circle(tree):
    tree.write(f"{ALPHA}/method.py", "class A:\n    @property\n    def f(self):\n        from . import models\n")
    tree.write(f"{ALPHA}/models.py", "import hone_alpha.method\n")
    (found,) = boundaries.check(tree.path)
    assert "in a circle: hone_alpha.method -> hone_alpha.models -> hone_alpha.method" in found


def test_import_for_typing_makes_no_circle(tree):
    tree.write(
        f"{ALPHA}/models.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hone_alpha.data import y\n"
        "else:\n    import hone_alpha.method\n",
    )
    tree.write(f"{ALPHA}/data.py", "import hone_alpha.models\n")
    assert boundaries.check(tree.path) == []
    tree.write(f"{ALPHA}/method.py", "from .models import z\n")
    assert len(boundaries.check(tree.path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch.nn\n",
        "def f():\n    from torch import nn\n",
        "class A:\n    @property\n    def f(self):\n        from .data import VALUE\n",
        "from . import data\n",
        "from hone_kernels import op\n",
        "from hone_kernels.op.api import VALUE\n",
    ],
)
def test_config_loads_no_torch(tree, text):
    tree.write(f"{ALPHA}/data.py", "import torch\n")
    # The package of a module loads before the module.
    tree.write("kernels/src/hone_kernels/op/__init__.py", "from .reference import VALUE\n")
    tree.write("kernels/src/hone_kernels/op/reference.py", "from torch import nn\n")
    tree.write(f"{ALPHA}/config.py", text)
    (found,) = boundaries.check(tree.path)
    assert found.startswith(f"{ALPHA}/config.py: a config loads no torch: hone_alpha.config -> ")
    assert found.endswith(" -> torch")


def test_config_may_load_what_imports_torch_in_its_functions_only(tree):
    tree.write(f"{ALPHA}/data.py", "def f():\n    import torch\n")
    tree.write(
        f"{ALPHA}/config.py",
        "from typing import TYPE_CHECKING\nfrom . import data\nif TYPE_CHECKING:\n    import torch\n",
    )
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


def test_what_a_member_declares_it_imports(tree):
    tree.pyproject("packages/alpha", '"tyro"', '"tyro", "einops>=1"')
    assert boundaries.check(tree.path) == ["hone-alpha declares einops, which it does not import"]
    # Core brings it, and what a library imports for us counts for those who import that library.
    tree.pyproject("shared/core", '"torch>=2"', '"torch>=2", "einops>=1", "ftfy"')
    tree.write(f"{CORE}/runs.py", "import einops\n")
    tree.write(f"{ALPHA}/models.py", "import hone_core.runs\n")
    assert boundaries.check(tree.path) == [
        "hone-core declares ftfy, which it does not import",
        "hone-alpha declares einops, which it does not import and hone-core brings",
        "hone-alpha installs ftfy through hone-core and has no use for it",
    ]


def test_a_package_installs_what_it_has_a_use_for(tree):
    tree.pyproject("shared/core", '"torch>=2"', '"torch>=2", "einops"')
    tree.write(f"{CORE}/shapes.py", "def f():\n    import einops\n")
    unused = "hone-alpha installs einops through hone-core and has no use for it"
    assert boundaries.check(tree.path) == [unused]
    tree.write(f"{ALPHA}/models.py", "def g():\n    from hone_core import shapes\n")
    assert boundaries.check(tree.path) == []
    # An extra is installed where a sibling asks for it, and not otherwise.
    tree.pyproject("shared/core", ', "einops"]', ']\noptional-dependencies = { x = ["einops"] }')
    tree.write(f"{ALPHA}/models.py", "")
    assert boundaries.check(tree.path) == []
    tree.pyproject("packages/alpha", "hone-core~=0.1.0", "hone-core[x]~=0.1.0")
    assert boundaries.check(tree.path) == [unused]
