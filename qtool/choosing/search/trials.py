"""Two ways through the values of a unit: one number after the other, and as Optuna proposes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType

from qtool.choosing.search.units import SearchUnit, Setting
from qtool.errors import MissingExtraError
from qtool.recipe.search import SearchSection

PRUNED_AFTER = 5
"""Trials, before one whose block errs more than the median's is spared the loss."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting that was tried."""

    setting: Setting
    error: float
    """Of the outputs of the block, relative."""
    loss: float | None
    """Of the whole model, in nats per token; None: the error was reason enough not to look."""


@dataclass(slots=True)
class Judge:
    """Measures settings, each at most once, and remembers them in the order of the measurements."""

    error_of: Callable[[Setting], float]
    loss_of: Callable[[Setting], float]
    errors: dict[Setting, float] = field(default_factory=dict)
    losses: dict[Setting, float] = field(default_factory=dict)

    def error(self, setting: Setting) -> float:
        """Return the error of the block's outputs."""
        if setting not in self.errors:
            self.errors[setting] = self.error_of(setting)
        return self.errors[setting]

    def loss(self, setting: Setting) -> float:
        """Return the loss of the whole model."""
        self.error(setting)
        if setting not in self.losses:
            self.losses[setting] = self.loss_of(setting)
        return self.losses[setting]

    def best(self) -> Setting:
        """Return the setting of the least loss so far; of equal ones the first."""
        return min(self.losses, key=self.losses.__getitem__)

    def trials(self) -> tuple[Trial, ...]:
        """Return all that was tried."""
        return tuple(Trial(p, error, self.losses.get(p)) for p, error in self.errors.items())


def try_settings(unit: SearchUnit, judge: Judge, section: SearchSection, seed: int) -> None:
    """Try settings of a unit, what the recipe says first.

    Raises:
        MissingExtraError: Optuna is asked for, and isn't installed.
    """
    judge.loss(unit.start)
    if section.method == "grid":
        _coordinates(unit, judge, section.keep)
    else:
        _proposed(unit, judge, section.trials, seed)


def _coordinates(unit: SearchUnit, judge: Judge, keep: int) -> None:
    """Change one number after the other, each as is best with those before it."""
    for place, knob in enumerate(unit.knobs):
        now = judge.best()
        others = [(*now[:place], value, *now[place + 1 :]) for value in knob.tried]
        for setting in sorted([now, *others], key=judge.error)[:keep]:
            judge.loss(setting)


def _proposed(unit: SearchUnit, judge: Judge, trials: int, seed: int) -> None:
    """Let a tree-structured Parzen estimator propose places in the lists of all numbers.

    Source: Bergstra et al. 2011 (Algorithms for Hyper-Parameter Optimization), multivariate as in
    Optuna.
    """
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({str(number): 0 for number in range(len(unit.knobs))})
    for _ in range(trials):
        trial = study.ask()
        places = [trial.suggest_int(str(n), 0, len(k.tried)) for n, k in enumerate(unit.knobs)]
        choices = ((None, *knob.tried) for knob in unit.knobs)
        setting = tuple(values[place] for values, place in zip(choices, places, strict=True))
        error = judge.error(setting)
        trial.report(error, 0)
        if setting not in judge.losses and _is_hopeless(judge, error):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, judge.loss(setting))


def _is_hopeless(judge: Judge, error: float) -> bool:
    return len(judge.errors) > PRUNED_AFTER and error > median(judge.errors.values())


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise MissingExtraError("search.method tpe", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
