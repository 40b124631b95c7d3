"""TVRN: image-text matching with mutual textual and visual refinement, as a Hub-native transformers model.

Importing this package makes `AutoConfig`, `AutoModel` and `AutoProcessor` know "tvrn" and loads neither torch nor
transformers: the classes below load on first use, and the Auto classes learn about them when they are themselves first
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register_when_imported

if TYPE_CHECKING:
    from .configuration_tvrn import TVRNConfig
    from .encoded_tvrn import EncodedImages, EncodedTexts
    from .front_door import load_model
    from .modeling_tvrn import TVRNModel, TVRNOutput, TVRNPreTrainedModel
    from .processing_tvrn import TVRNProcessor

__version__ = "0.1.0"
__all__ = [
    "EncodedImages",
    "EncodedTexts",
    "TVRNConfig",
    "TVRNModel",
    "TVRNOutput",
    "TVRNPreTrainedModel",
    "TVRNProcessor",
    "load_model",
]

_HOME = {
    "EncodedImages": "encoded_tvrn",
    "EncodedTexts": "encoded_tvrn",
    "TVRNConfig": "configuration_tvrn",
    "TVRNModel": "modeling_tvrn",
    "TVRNOutput": "modeling_tvrn",
    "TVRNPreTrainedModel": "modeling_tvrn",
    "TVRNProcessor": "processing_tvrn",
    "load_model": "front_door",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)} and its submodules."
        )
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported(__name__)
