"""What ``--help`` of every verb of a script prints and imports, from one process a script."""

import json
import os
import subprocess
import sys
from functools import cache

HEAVY = ("torch", "diffusers", "transformers", "matplotlib")

ALL = f"""
import contextlib, importlib.metadata, io, json, re, sys
script = sys.argv[1]
(point,) = importlib.metadata.entry_points(group="console_scripts", name=script)

def call(*argv):
    sys.argv, code, out = [script, *argv], 0, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = point.load()()
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), [name for name in {HEAVY} if name in sys.modules]

overview = call("--help")[1].partition("verbs:\\n")[2]
print(json.dumps({{verb: call(verb, "--help") for verb in re.findall(r"^  (\\S+)  +\\S", overview, re.M)}}))
"""


@cache
def verb_helps(script):
    """Verb to its exit code, its text at 200 columns, and what is loaded after it of ``HEAVY``."""
    command = [sys.executable, "-P", "-c", ALL, script]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
