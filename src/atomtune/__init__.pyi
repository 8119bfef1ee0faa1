# What type checkers and editors see of the package: its functions, which __init__.py imports when they are asked for.
from atomtune.api import evaluate as evaluate
from atomtune.api import inspect as inspect
from atomtune.api import load as load
from atomtune.api import sweep as sweep
from atomtune.api import train as train
from atomtune.own_loop import share_prefixes as share_prefixes

__version__: str
