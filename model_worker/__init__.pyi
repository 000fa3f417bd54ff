# The names that `import model_worker` offers, listed once: type checkers read this file, and so does `lazy_loader`.
from .attaching import attach as attach
from .attachment.attachment import Attachment as Attachment
from .embed.base import Embedder as Embedder
from .embed.callable import CallableEmbedder as CallableEmbedder
from .embed.encoder import EncoderEmbedder as EncoderEmbedder
from .embed.hybrid import HybridEmbedder as HybridEmbedder
from .model import Losses as Losses
from .model import MemoryModel as MemoryModel
from .model_settings import ModelSettings as ModelSettings
from .remember.memory import Memory as Memory
from .remember.settings import MemorySettings as MemorySettings
from .window.cache import MemoryCache as MemoryCache
from .window.tova import TovaRule as TovaRule
