"""What next-token logits say of certainty: entropy, likeliest token and its probability, in one pass over them."""

from .api import SUPPORT, LogitSignals, read_logits
from .reference import read_logits_reference

__all__ = ["SUPPORT", "LogitSignals", "read_logits", "read_logits_reference"]
