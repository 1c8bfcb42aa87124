"""Options that several commands share, and what is wrong with them before torch is imported."""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from qtool.cli.console import check_replaceable
from qtool.errors import OutputError
from qtool.recipe.values import MOST_SEED
from qtool.settings import KvCache
from qtool.wording import reason

if TYPE_CHECKING:
    import torch


class DryRun(StrEnum):
    """What --dry-run does; by itself it plans."""

    PLAN = "plan"
    MEASURE = "measure"


class RecipeDryRun(StrEnum):
    """Likewise of a recipe's run."""

    PLAN = "plan"
    MEASURE = "measure"
    CLUSTER = "cluster"


BARE = {"--dry-run": DryRun.PLAN}
"""Values of options that may be given without one; one is given with '='."""
GATE_FAILED = 3
"""Exit code of a run that was carried out, and failed by what the recipe allows."""
KEPT = "Finished layers are kept: the same command with --resume goes on after them."
PLOT_SUFFIXES = (".png", ".svg")
ModelArgument = Annotated[
    str, typer.Argument(help="Directory, hub id, .gguf file, or demo:smollm2.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON; - is stdout.")
]
BackendOption = Annotated[str | None, typer.Option(help="Run quantized layers with this backend.")]
KvCacheOption = Annotated[
    KvCache | None,
    typer.Option(help="Keep keys and values in the model's dtype, or as int8; default: auto."),
]
AdapterOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Set an adapter that qtool adapt has made.")
]
DTypeOption = Annotated[
    str | None,
    typer.Option(help="float16, bfloat16 or float32; default: float16 on a card, else float32."),
]


def in_panel(name: str) -> Callable[..., Any]:
    """Return what makes options that stand together, under a heading, in --help."""
    return functools.partial(typer.Option, rich_help_panel=name)


def checked_seed(seed: int | None) -> int | None:
    """Return a seed that every generator takes; as callback, since a range would widen --help."""
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise typer.BadParameter(f"it is {seed}; give a whole number from 0 to {MOST_SEED}.")
    return seed


def given_options(context: typer.Context) -> list[Any]:
    """Return the options and arguments that stand on the command line, by name."""
    given = (
        one
        for one in context.command.params
        if getattr(context.get_parameter_source(one.name or ""), "name", "") == "COMMANDLINE"
    )
    return sorted(given, key=lambda one: one.name or "")


def refuse_ignored(context: typer.Context, why: Mapping[str, str]) -> None:
    """Raise a usage error for an option that would be ignored.

    Args:
        context: Of the command.
        why: By heading of --help, what is said of the options under it.
    """
    for option in given_options(context):
        reason_of_panel = why.get(getattr(option, "rich_help_panel", None) or "")
        if reason_of_panel is not None:
            raise typer.BadParameter(f"{option.opts[0]} {reason_of_panel}.")


def _device(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise typer.BadParameter(f"it is {text!r}; give cpu, cuda, or cuda:1 for the second card.")
    return text


DeviceOption = Annotated[
    str | None,
    typer.Option(callback=_device, help="cpu, cuda or cuda:1; default: the first card, else cpu."),
]


class Command(typer.core.TyperCommand):
    """A command whose options are given once, but for those that make a list; nothing is empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Parse the arguments.

        Raises:
            typer.BadParameter: an option is given twice, so that the first would be forgotten; or a
                value is empty, which as a path would mean the current directory.
        """
        args = self._with_values(args)
        values, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for number, option in enumerate(given):
            if values.get(option.name) == "":
                name = option.opts[0]
                if isinstance(option, typer.core.TyperArgument):
                    name = name.upper()
                raise typer.BadParameter(
                    f"{name} is empty. Give a value, such as '.' for the current directory.",
                    ctx=ctx,
                )
            once = isinstance(option, typer.core.TyperOption) and not (
                option.multiple or option.is_flag
            )
            if once and option in given[:number]:
                message = f"{option.opts[0]} is given twice. Give one value."
                raise typer.BadParameter(message, ctx=ctx)
        return super().parse_args(ctx, args)

    def _with_values(self, args: list[str]) -> list[str]:
        """Give options that may be given without a value theirs, once."""
        valued = [option for option in self.params if not getattr(option, "is_flag", True)]
        bare = BARE.keys() & {name for option in valued for name in option.opts}
        once = [arg for n, arg in enumerate(args) if arg not in bare or arg not in args[:n]]
        return [f"{arg}={BARE[arg]}" if arg in bare else arg for arg in once]


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """Return torch's dtype of a name; None: the default."""
    if name not in (None, "float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype is {name!r}; it is float16, bfloat16 or float32.")
    if name is None:
        return None
    from qtool.formats._dtypes import dtype_of  # torch: slow

    return dtype_of(name)


def wrong_plot_name(plot: Path | None) -> list[str]:
    """Return what is wrong with a plot's name: it says in which format the plot is."""
    if plot is None or Path(plot).suffix in PLOT_SUFFIXES:
        return []
    return [f"--plot takes a {' or '.join(PLOT_SUFFIXES)} file, not {plot}."]


def check_targets(targets: Sequence[Path | None]) -> None:
    """Raise, before hours of work, for results that couldn't be written.

    Raises:
        OutputError: a folder isn't there or is closed, or stands where the file would be; or a
            file is there that isn't a result of an earlier run.
        typer.BadParameter: two are the same.
    """
    files = [target for target in targets if target is not None]
    if sum(str(file) == "-" for file in files) > 1:
        raise typer.BadParameter("--json and --markdown can't both be -: stdout takes one.")
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise typer.BadParameter(
            f"Two results can't go to {files[-1]}: the second would replace the first. Give each "
            "a file of its own."
        )
    for file in files:
        if str(file) != "-":
            _check_writable(file)


def _parent(file: Path) -> Path:
    return (file.resolve() if file.is_symlink() else file).parent


def _check_writable(file: Path) -> None:
    """Open a file as it will be opened, and leave it as it was."""
    try:
        real = Path(os.path.realpath(file))  # a link whose target isn't there yet stays
        if real.is_dir():
            raise OutputError(f"Can't write {file}: it is a folder. Name a file in it.")
        if real.exists() and not real.is_file():  # a pipe waits for its reader when it is opened
            return
        check_replaceable(file)
        if real.exists():
            with real.open("ab"):
                return
        with real.open("xb"):
            real.unlink()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        if isinstance(error, FileNotFoundError) and not _parent(file).is_dir():
            raise OutputError(
                f"Can't write {file}: there is no folder {_parent(file)}. Make it first."
            ) from error
        raise OutputError(f"Can't write {file}: {reason(error)}. Give another file.") from error
