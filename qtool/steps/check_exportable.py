"""Whether a plan can be said in the format of another program, asked before anything is solved."""

from collections.abc import Iterator

from qtool.checkpoint.manifest import LayerEntry
from qtool.core.experts import expert_name
from qtool.errors import RecipeError
from qtool.exchange import load_exchange, targets
from qtool.formats.mixed_rows import MIXED_ROWS
from qtool.modeling.expert_layout import expert_layouts
from qtool.modeling.skeleton import empty_model
from qtool.modeling.source import ModelSource
from qtool.scheme import ActivationScheme
from qtool.steps.method_choice import load_method
from qtool.steps.plan import LayerPlan, Plan
from qtool.wording import first_alike, list_names

JOINED_EXPERTS = (
    "{target} can't say the experts of this family: files hold them in one tensor, such as {name}. "
    "--target dense takes them; overrides that skip '*.experts.*' leave something to export."
)
SOME_STEP = ActivationScheme(granularity="tensor", scale=1.0)
"""Of inputs whose step only samples give."""


def check_exportable(source: ModelSource, plan: Plan, target: str) -> None:
    """Check that what a plan will make of a model can be exported.

    Raises:
        UnknownNameError: there is no such target.
        RecipeError: it can't: names layers, why, and targets that take all.
    """
    joined = None if load_exchange(target).takes_floats else _joined_experts(source, plan)
    if joined is not None:
        raise RecipeError(JOINED_EXPERTS.format(target=target, name=joined))
    refused = _refused(plan, target)
    if not refused:
        return
    alike, reason = first_alike(refused)
    able = [f"--target {name}" for name in targets() if not _refused(plan, name)]
    others = f"This plan goes to: {', '.join(able)}." if able else "Nor does another target."
    raise RecipeError(
        f"{target} can't say {list_names(alike)}: {reason}. Change weights.scheme or the method, "
        f"or skip them with an override. {others}",
        layer=alike[0],
    )


def _joined_experts(source: ModelSource, plan: Plan) -> str | None:
    """Return a tensor of all experts in files, if layers of these are quantized."""
    names = [expert for layer in plan.layers if (expert := expert_name(layer.name)) is not None]
    if not names:
        return None
    layouts = expert_layouts(empty_model(source.parsed, source.directory))
    wanted = (layouts[expert.fused] for expert in names)
    return next((layout.fused for layout in wanted if not layout.pieces), None)


def _refused(plan: Plan, target: str) -> dict[str, str]:
    """Return why layers can't be said."""
    refuses = load_exchange(target).refuses
    found: dict[str, str] = {}
    for layer in plan.layers:
        for each in layer.alternatives():
            place = each.role
            reason = "it is only read" if refuses is None else refuses(_entry(each), place)
            if reason is not None:
                found.setdefault(layer.name, reason)
    for head, entry in _tied(plan):
        reason = None if refuses is None else refuses(entry, "head")
        if reason is not None:
            found.setdefault(head, reason)
    return found


def _entry(layer: LayerPlan) -> LayerEntry:
    """Return what a manifest will say of a layer."""
    written = load_method(layer.method).writes(layer.options)
    known = layer.activation
    inputs = known if known is None or isinstance(known, ActivationScheme) else SOME_STEP
    return LayerEntry(
        format=MIXED_ROWS if layer.scheme.rows else written,
        scheme=layer.scheme,
        shape=layer.shape,
        method=layer.method,
        activation=inputs,
    )


def _tied(plan: Plan) -> Iterator[tuple[str, LayerEntry]]:
    for layer in plan.layers:
        if plan.tied_head is not None and layer.role == "embedding":
            entry = _entry(layer)
            yield (
                plan.tied_head,
                LayerEntry(
                    format=entry.format,
                    scheme=entry.scheme,
                    shape=entry.shape,
                    method=entry.method,
                    shared_with=layer.name,
                ),
            )
