"""A command that tests start in several processes, with the environment that ``torchrun`` gives them."""

import os
import sys

from hone_fpsattention import cli

if __name__ == "__main__":
    try:
        cli.main()
    except SystemExit as stop:
        # Not through the interpreter's end: gloo's threads may still run there, and then abort a process that is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
