"""What torch's own types say nothing of."""

from typing import Any

AutogradContext = Any  # of an autograd.Function; takes any attribute
