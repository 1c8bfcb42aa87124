"""What torch calls while it is imported: lets transformers find checkpoints without `import qtool`.

The entry point `torch.backends` in pyproject.toml names it. It lies beside the package, and not in
it, because torch stops with an error where an entry point can't be imported, and a user's own
`qtool.py` would be enough for that. TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off: docs/adr/0020.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

HOOK = "integrations/transformers/registration.py"


def register() -> None:
    """Set qtool's import hook; what goes wrong is logged, for `import torch` must not fail."""
    try:
        found = find_spec("qtool")
        folders = (found and found.submodule_search_locations) or ()
        if any(Path(folder, HOOK).is_file() for folder in folders):  # else another's `qtool`
            import qtool  # noqa: F401, which registers itself
    except Exception:
        logging.getLogger(__name__).warning(
            "qtool can't register with transformers, so its checkpoints need `import qtool`, which "
            "shows the reason. TORCH_DEVICE_BACKEND_AUTOLOAD=0 silences this.",
            exc_info=True,
        )
