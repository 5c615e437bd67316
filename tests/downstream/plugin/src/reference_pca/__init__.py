from reference_pca._model import ReferencePCA

__all__ = ["ReferencePCA"]
