"""Settings of every test session, made before any test module imports torch."""

import os

# Tests are distributed over processes; more threads than cores only slows them down.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# A test that wants the network is a mistake: it would pass or fail with the machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
