"""A command that a test starts in two processes, with a tiny host that is smaller still."""

from hone_pmloss import cli, finetune
from hone_pmloss.config import HostConfig
from hone_pmloss.models import tiny

SMALL = HostConfig(channels=(8, 8, 32), layers=1, candidates=8, size=32)

if __name__ == "__main__":
    finetune.tiny = lambda *, seed: tiny(SMALL, seed=seed)
    cli.main()
