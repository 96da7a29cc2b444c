"""The two pictures of signal_theory.py, which passes what they show."""

import math
from pathlib import Path

import matplotlib
import numpy
from matplotlib.figure import Figure

matplotlib.rcdefaults()  # dark on white, whatever the reader's own style


def draw_theory(laws: tuple, settings: tuple, decisions: list[dict], path: Path) -> None:
    """Three panels: V with both laws; Q and S; V / Q with D*. Measured is grey."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    v_axes, s_axes, cost_axes = figure.subplots(1, 3)

    distance, bound, local, closed, enumerated = laws
    v_axes.plot(distance, bound, "C3--", label=r"bound $e^{\beta D}$")
    v_axes.plot(distance, local, "C0:", lw=2, label=r"local $e^{kD^2}$")
    v_axes.plot(distance, closed, "k", label="V, closed form")
    v_axes.plot(distance[::8], enumerated, "ko", label="V, enumerated")
    v_axes.set(title="V of 5-token answers", yscale="log", ylim=(0.5, 10 * closed[-1]))

    distance, *both = settings
    for color, name, (quality, variance, best) in zip("01", ("early", "mid-training"), both):
        least = numpy.interp(best, distance, variance / quality)
        s_axes.plot(distance, quality, f"C{color}", label=f"Q, {name}")
        s_axes.plot(distance, quality / variance, f"C{color}--", label=f"S, {name}")
        s_axes.plot(best, 1 / least, f"C{color}o")
        cost_axes.plot(
            distance, variance / quality, f"C{color}", label=f"{name}: $D^*$ = {best:.0f}"
        )
        cost_axes.plot([best, best], [1, least], f"C{color}o:")
    s_axes.set(title="Q rises, S = Q / V peaks at $D^*$", ylim=(0, 1))
    cost_axes.set(title="1/S = V / Q is U-shaped", yscale="log", ylim=(1, 200))

    for decision in decisions:
        table, keys = decision["autonpo/table"], ("distance", "quality", "variance")
        at, good, noisy = (numpy.array([row[key] for row in table]) for key in keys)
        name = f"run's step {decision['autonpo/step']}"
        v_axes.plot(at, noisy, "C7x-", label=f"V, {name}")
        s_axes.plot(at, good, "C7x-", label=f"Q, {name}")
        s_axes.plot(at, good / noisy, "C7x--", label=f"S, {name}")
        cost = noisy / numpy.where(good > 0, good, math.nan)  # nothing solved: no point
        cost_axes.plot(at, cost, "C7x-", label=name)
    for axes in (v_axes, s_axes, cost_axes):
        axes.set_xlabel("D (steps)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)


def draw_law(curves: dict[str, dict[int, tuple]], path: Path) -> None:
    """Ratio -> L -> (q, pull), a panel per ratio; the curves start at D = 0, where q = p."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels, titles = figure.subplots(1, 3, sharey=True), ("token ratio", "sequence ratio", "no IS")
    for axes, title, by_length in zip(panels, titles, curves.values()):
        for color, (length, (q, pull)) in enumerate(by_length.items()):
            axes.plot(q, pull, f"C{color}", label=f"L = {length}")
            axes.plot(q[0], pull[0], f"C{color}s", ms=6, clip_on=False)
            axes.plot(q[-1], pull[-1], f"C{color}o", ms=7, mfc="white", clip_on=False, zorder=3)
            best = pull.argmax()
            if pull[best] > 1.01 * max(pull[0], pull[-1]):
                axes.plot(q[best], pull[best], f"C{color}*", ms=14)
        axes.axhline(1, color="k", ls=":", lw=1)
        axes.set(title=title, yscale="log", xlim=(0, 1), xlabel="q, the guide's probability")
        axes.grid(alpha=0.3)
    for marker, name in (("ks", "D = 0: q = p"), ("k*", "near: the peak"), ("ko", "far: q = 1")):
        fill = "white" if marker == "ko" else "k"
        panels[0].plot([], [], marker, mfc=fill, label=name)
    panels[0].set_ylabel("pull on the decisive logit (GRPO = 1)")
    panels[0].legend(fontsize=9, ncols=2)
    figure.savefig(path, dpi=150)
