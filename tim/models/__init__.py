from .transformer import TiMTransformer2DModel, TiMTransformer2DModelOutput

__all__ = ["TiMTransformer2DModel", "TiMTransformer2DModelOutput"]
