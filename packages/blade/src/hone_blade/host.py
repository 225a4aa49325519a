"""The tiny host: ``hone_video``'s, which this package's ``train-host`` makes and which ships there.

Other methods start from the same weights, so they lie where all can read them.
"""

from hone_video.host import Host, load_host, save_host
from hone_video.host_config import PACKAGE, PACKAGED

__all__ = ["PACKAGE", "PACKAGED", "Host", "load_host", "save_host"]
