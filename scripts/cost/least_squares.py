"""Robust least squares on log errors: Gauss-Newton with damping, numeric derivatives, numpy only. Deterministic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Rows = NDArray[np.int64] | None
"""Places in the vector of errors; None: all of them."""


@dataclass(frozen=True)
class Parameter:
    """A positive number to fit. It may move about `freedom` (a factor's logarithm) from where it starts."""

    name: str
    start: float
    freedom: float = 0.5


def fit(
    parameters: list[Parameter],
    log_errors: Callable[[dict[str, float], Rows], Vector],
    *,
    rows_of: Callable[[str], Rows] = lambda _name: None,
    scale: float,
    steps: int = 12,
    weights: Vector | None = None,
    initial: dict[str, float] | None = None,
) -> dict[str, float]:
    """Least of sum(w * log(1 + (error / scale)^2)) + sum((log(x / start) / freedom)^2).

    `rows_of` names the errors that a parameter touches, so that only those are computed for its derivative.
    `initial` is where the search begins; what is found is pulled to the parameters' own starts all the same.
    Cauchy's loss: errors far above `scale` hardly pull, so that points which are something else do not rule.
    """
    start = np.log([parameter.start for parameter in parameters])
    freedom = np.array([parameter.freedom for parameter in parameters])

    def named(values: Vector) -> dict[str, float]:
        return {parameter.name: float(np.exp(value)) for parameter, value in zip(parameters, values, strict=True)}

    def cost_of(values: Vector, errors: Vector) -> float:
        loss = np.log1p((errors / scale) ** 2)
        if weights is not None:
            loss = loss * weights
        return float(np.sum(loss) + np.sum(((values - start) / freedom) ** 2))

    values = start.copy() if initial is None else np.log([initial[parameter.name] for parameter in parameters])
    errors = log_errors(named(values), None)
    cost, damping = cost_of(values, errors), 1e-3
    for _ in range(steps):
        jacobian = np.zeros((len(errors), len(values)))
        for column in range(len(values)):
            moved = values.copy()
            moved[column] += 0.01
            rows = rows_of(parameters[column].name)
            places = slice(None) if rows is None else rows
            jacobian[places, column] = (log_errors(named(moved), rows) - errors[places]) / 0.01
        pull = 1 / (1 + (errors / scale) ** 2) / scale**2
        if weights is not None:
            pull = pull * weights
        normal = jacobian.T @ (jacobian * pull[:, None]) + np.diag(1 / freedom**2)
        gradient = jacobian.T @ (pull * errors) + (values - start) / freedom**2
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = values + np.clip(step, -0.7, 0.7)
            tried_errors = log_errors(named(tried), None)
            tried_cost = cost_of(tried, tried_errors)
            if tried_cost < cost:
                break
            damping *= 5
        else:
            break
        gained = cost - tried_cost
        values, errors, cost = tried, tried_errors, tried_cost
        damping = max(damping / 5, 1e-6)
        if gained < 1e-4 * cost:
            break
    return named(values)
