from pkgutil import extend_path

import diffusers

from tim_kernels import Packing, pack, unpack

from .transformer import TiMTransformer2DModel, TiMTransformer2DModelOutput

diffusers.TiMTransformer2DModel = TiMTransformer2DModel  # where AutoModel looks up its name
__path__ = extend_path(__path__, __name__)  # the published modules, where they are installed too
__all__ = ["Packing", "TiMTransformer2DModel", "TiMTransformer2DModelOutput", "pack", "unpack"]
