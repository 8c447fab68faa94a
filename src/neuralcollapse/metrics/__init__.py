"""Metrics of neural collapse: class moments, the published metrics as functions, and the measurement of a model.

Each name is imported when it is first used, and torchmetrics is imported only with `NeuralCollapse`. The names are
listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
