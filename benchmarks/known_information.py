"""Probes on representations whose information about the label is known: what they read of it, and what intervals hold.

python benchmarks/known_information.py --draws 40

One feature tells the labels, by its mean; the others are noise; all are turned, so that none tells anything alone. The
truth comes from numeric quadrature. The table of docs/information.md is made of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import click
import numpy as np
from scipy.integrate import quad
from scipy.stats import entropy, norm

from tale_ray.results.probe import ProbeRule, entropy_bits, mean_intervals, read_labels, surprisal_bits
from tale_ray.results.statistics import Interval


@dataclass(frozen=True, slots=True)
class Source:
    """Labels with these shares, whose feature has these means and deviation 1; rows that are drawn, and features."""

    means: tuple[float, ...]
    shares: tuple[float, ...]
    rows: int
    features: int

    @property
    def shortfall(self) -> float:
        """About what a probe misses, in bits: (d + 1)(c - 1) / 2n ln 2, of n fitted rows."""
        fitted = self.rows * (1 - 1 / ProbeRule().folds)
        return (self.features + 1) * (len(self.means) - 1) / (2 * fitted * float(np.log(2)))


SOURCES = (
    Source((0.0, 2.0), (0.5, 0.5), 2000, 8),
    Source((0.0, 2.0), (0.5, 0.5), 600, 8),
    Source((0.0, 2.0), (0.5, 0.5), 600, 128),
    Source((0.0, 1.0), (0.3, 0.7), 1000, 8),
    Source((0.0, 1.5, 4.0), (0.2, 0.3, 0.5), 1500, 4),
)


def truth(means: Sequence[float], shares: Sequence[float]) -> float:
    """Return I(X; Y) = H(Y) - the mean of H(Y|x) over x, in bits; noise that knows nothing of Y adds nothing."""

    def integrand(x: float) -> float:
        joint = norm.pdf(x, means) * np.array(shares)
        return float(joint.sum() * entropy(joint, base=2)) if joint.sum() > 0 else 0.0

    return float(entropy(shares, base=2)) - float(quad(integrand, -10, 14, limit=300)[0])


def draw(source: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return representations (rows, features) and their labels."""
    generator = np.random.default_rng(seed)
    labels_n = generator.choice(len(source.means), source.rows, p=source.shares)
    states_nd = generator.normal(size=(source.rows, source.features))
    states_nd[:, 0] += np.array(source.means)[labels_n]
    turn_dd = np.linalg.qr(generator.normal(size=(source.features, source.features)))[0]
    return (states_nd @ turn_dd).astype(np.float32), labels_n


def estimate(source: Source, seed: int) -> tuple[float, Interval]:
    """Return the information that a probe reads of a draw, and its interval."""
    states_nd, labels_n = draw(source, seed)
    reading = read_labels(states_nd, labels_n, ProbeRule(seed=seed))
    (interval,) = mean_intervals((surprisal_bits(labels_n) - reading.losses_n)[None], seed)
    return reading.bits(entropy_bits(labels_n)), interval


@click.command()
@click.option("--draws", default=40, show_default=True, help="Of every source.")
def main(draws: int) -> None:
    """Print what probes read of known information."""
    click.echo("| labels | rows | features | truth | bits read | shortfall | intervals hold the mean | the truth |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for source in SOURCES:
        known = truth(source.means, source.shares)
        found = [estimate(source, seed) for seed in range(draws)]
        mean = sum(bits for bits, _ in found) / draws
        held = [sum(each.low <= value <= each.high for _, each in found) / draws for value in (mean, known)]
        click.echo(
            f"| {len(source.means)} | {source.rows} | {source.features} | {known:.3f} | {mean:.3f} | "
            f"{known - mean:.3f} | {held[0]:.0%} | {held[1]:.0%} |"
        )


if __name__ == "__main__":
    main()
