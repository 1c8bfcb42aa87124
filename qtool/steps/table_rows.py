"""Rows of unlike bits in a plan: what is asked of the recipe, and what they take."""

from collections.abc import Mapping
from dataclasses import replace

from qtool.base import Method, PartSpec
from qtool.checkpoint.manifest import codec
from qtool.errors import RecipeError, SchemeError
from qtool.formats.coded_scales import CODED_SCALES
from qtool.formats.mixed_rows import MIXED_ROWS
from qtool.plugins import PluginOptions
from qtool.recipe.rows import RowsSection
from qtool.recipe.schema import TableSection
from qtool.scheme import Shape2D, WeightScheme

ANY_SHAPE = Shape2D(64, 64)


def parts_of(
    method: Method,
    scheme: WeightScheme,
    shape: Shape2D,
    options: PluginOptions,
) -> Mapping[str, PartSpec]:
    """Return the parts that a layer will be stored in."""
    if scheme.rows:
        return codec(MIXED_ROWS).layout(scheme, shape)
    return method.layout(scheme, shape, options)


def expected_scheme(rows: RowsSection, scheme: WeightScheme, shape: Shape2D) -> WeightScheme:
    """Return the scheme of a table whose rows' bits aren't chosen yet."""
    found = rows.expected(shape.out_features)
    return replace(scheme, num_bits=found[0][0], rows=found)


def check_rows(
    name: str,
    section: TableSection,
    method: Method,
    options: PluginOptions,
    *,
    calibrated: bool,
) -> None:
    """Check what a recipe asks for the rows of an embedding or a head.

    Raises:
        RecipeError: there are no samples, or the method doesn't write what classes of rows are.
        SchemeError: groups run along rows, or the method doesn't have the bits.
    """
    rows, scheme = section.rows, section.scheme.to_scheme()
    assert rows is not None
    if scheme.group_dim != "in_features":
        raise SchemeError(
            f"{name}: rows have bits of their own, so groups run along in_features; group_dim is "
            f"{scheme.group_dim}.",
            layer=name,
        )
    stored = codec(CODED_SCALES).layout(scheme, ANY_SHAPE)
    if method.layout(scheme, ANY_SHAPE, options) != stored:
        raise RecipeError(
            f"{name}: rows with bits of their own are stored in format {CODED_SCALES}, which "
            f"'{section.method}' doesn't write as it is set. Use method: bcq with options: "
            "{scales: coded}.",
            layer=name,
        )
    widths = [num_bits for num_bits, _ in rows.expected(1000)] + [rows.min_bits, rows.max_bits]
    if not {min(widths), max(widths)} <= set(method.num_bits):
        raise SchemeError(
            f"{name}: rows have {min(widths)} to {max(widths)} bits; '{section.method}' takes "
            f"{method.num_bits.start} to {method.num_bits.stop - 1}.",
            layer=name,
        )
    if not calibrated:
        raise RecipeError(
            f"{name}: which rows get how many bits is told by how often their tokens come in "
            "calibration data. Give the recipe a section 'calibration', leave out "
            "--no-calibration, or leave out 'rows'.",
            layer=name,
        )
