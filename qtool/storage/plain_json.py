"""Values as JSON has them."""

import math
from collections.abc import Mapping
from typing import Any


def plain_json(value: Any) -> Any:  # noqa: ANN401
    """Return mappings, lists, texts, whole and finite numbers; anything else as its text.

    A number that isn't finite is None: JSON knows no NaN, and few readers take it.
    """
    if hasattr(value, "tolist"):  # numpy's, which needn't be imported for that
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain_json(one) for one in value]
    return str(value)
