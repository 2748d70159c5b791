"""The report's drawings, as SVG."""

import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"instance": "#d2691e", "prior": "#3a6ea5"}


def losses(history: list[dict[str, float]]) -> str:
    """Of each kind of rows that there were, as trained on, and, dashed, at fixed noise."""
    figure, axes = _figure(2.8)
    for name, colour in COLOURS.items():
        if not any(r[name] for r in history):
            continue  # without prior preservation
        alone = "." if len(history) == 1 else None  # a line has two ends
        axes.plot([r["step"] for r in history], [r[name] for r in history], color=colour, alpha=0.45, linewidth=1, marker=alone, label=name)
        fixed = [r for r in history if f"validation_{name}" in r]
        if fixed:
            axes.plot([r["step"] for r in fixed], [r[f"validation_{name}"] for r in fixed], "o--", color=colour, markersize=4, label=f"{name}, fixed noise")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False, ncols=2)
    return _svg(figure, "The losses over the steps")


def bars(seconds: dict[str, float]) -> str:
    """A bar a stage."""
    figure, axes = _figure(0.6 + 0.3 * len(seconds))
    names = list(seconds)[::-1]
    axes.bar_label(axes.barh(names, [seconds[n] for n in names], color=COLOURS["prior"]), fmt="%.0f s", padding=4)
    axes.set_xlabel("seconds")
    return _svg(figure, f"Seconds of each stage: {', '.join(f'{name} {n:.0f}' for name, n in seconds.items())}")


def _figure(height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "Figure", name: str) -> str:
    """With a name for those who cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return f'<svg role="img" aria-label="{html.escape(name)}"' + text.getvalue().partition("<svg")[2]
