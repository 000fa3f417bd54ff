"""The in-context autoencoder, ICAE: a context is compressed into memory slots that the frozen model reads.

See arXiv 2307.06945. `Icae` encodes, `decode` has the frozen decoder read. Needs the extra `icae` (peft).
"""

from model_worker.icae.config import IcaeConfig
from model_worker.icae.decode import answer, continue_, loss, restore
from model_worker.icae.expanded import to_kv
from model_worker.icae.model import Icae
from model_worker.icae.slots import Slots, combine

__all__ = ["Icae", "IcaeConfig", "Slots", "answer", "combine", "continue_", "loss", "restore", "to_kv"]
