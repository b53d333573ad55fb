"""tipl: policy weights under PPO as a sequence, and a Transformer that continues it (arXiv 2503.04074)."""

import os
from importlib.metadata import version

import lazy_loader

# After torch's last parallel loop libgomp's threads spin for up to 16 ms, on the cores that a decoder wants: on two
# cores it ran at 0.6 of its speed. Some tenths of a millisecond serve torch as well. This is read when torch is loaded;
# where torch was imported before tipl, the choice is its importer's.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# The public names stand in __init__.pyi. Each is imported when it is first asked for: StreamingSVD needs neither torch
# nor MuJoCo, which take 1.5 s and 250 MB.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("tipl")
