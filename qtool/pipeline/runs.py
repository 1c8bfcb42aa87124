"""How the result of a run of `quantize` is written."""

import time
from dataclasses import replace
from math import prod

import qtool
from qtool.checkpoint.manifest import Manifest
from qtool.checkpoint.marks import CONFIG_NAME, REPORT_NAME
from qtool.checkpoint.writer import CheckpointWriter
from qtool.modeling.card import Provenance, model_card, read_licence
from qtool.pipeline.reports import QuantizeResult, report_bytes
from qtool.steps.memory import peak_memory
from qtool.steps.run import Run
from qtool.steps.solve import LayerResult


def write_result(
    run: Run, results: tuple[LayerResult, ...], writer: CheckpointWriter, started: float
) -> QuantizeResult:
    """Write all files of a result that was `started` at so many seconds, and give it its name.

    Raises:
        QtoolError: see `CheckpointWriter.finish`.
    """
    stored = sum(result.entry.num_bytes() for result in results)
    result = QuantizeResult(
        out_dir=writer.place.named,
        average_bits=8 * stored / sum(prod(result.entry.shape) for result in results),
        weight_bytes=run.plan.kept_bytes + stored,
        source_bytes=run.plan.source_bytes,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(run.env.device),
        device=run.env.device,
        layers=results,
    )
    manifest = _manifest(run, results, writer.digests())
    files = run.source.companions()
    card = model_card(manifest, run.source.public_name, _about(run, result))
    files["README.md"] = card.encode()
    names = sorted({*files, REPORT_NAME, CONFIG_NAME})
    files[REPORT_NAME] = report_bytes(result, run=writer.run_digest, files=names)
    config = {key: value for key, value in run.source.config.items() if key != "_name_or_path"}
    writer.finish(files, {**config, "quantization_config": manifest.to_config()})
    return result


def _manifest(run: Run, results: tuple[LayerResult, ...], digests: dict[str, str]) -> Manifest:
    layers = {result.name: result.entry for result in results}
    if run.plan.tied_head is not None:
        embedding = run.source.adapter.embedding
        layers[run.plan.tied_head] = replace(layers[embedding], shared_with=embedding)
    return Manifest(
        tool_version=qtool.__version__,
        recipe=run.recipe.model_dump(mode="json"),
        layers=layers,
        source=run.source.public_name,
        calibration=run.calibration.digest() if run.calibration else None,
        digests=digests,
    )


def _about(run: Run, result: QuantizeResult) -> Provenance:
    """Return what the model card says of a run."""
    names = {"added_error": "error added to the outputs", "nmse": "error of the weights (NMSE)"}
    values = {
        name: [layer.metrics[key] for layer in result.layers if key in layer.metrics]
        for key, name in names.items()
    }
    return Provenance(
        licence=read_licence(run.source.directory),
        calibration=run.calibration.provenance if run.calibration else {},
        weight_bytes=result.weight_bytes,
        source_bytes=result.source_bytes,
        num_weights=sum(prod(spec.shape) for spec in run.source.shards.specs.values()),
        errors={name: sum(found) / len(found) for name, found in values.items() if found},
    )
