"""Optional packages: a missing one is named together with the command that installs it."""

import importlib
import importlib.util
from types import ModuleType


def optional(module: str) -> ModuleType:
    """Import a package of the ``recipes`` extra.

    Args:
        module: name to import, for example ``"datasets"``.

    Returns:
        The module.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        names = {"sklearn": "scikit-learn", "rouge_score": "rouge-score", "PIL": "pillow"}
        package = names.get(top, top)
        raise ImportError(f"This needs {package}, which is not installed: pip install {package}")
    return importlib.import_module(module)
