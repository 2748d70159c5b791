"""The report's drawings, as SVG."""

import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"instance": "#d2691e", "prior": "#4583c4"}
WIDTH = 7.5  # inches of 72 units: letters of 10 units are as large as the page's small ones if it draws this 560 to 700 pixels wide
UNITS = ((3600, "h", "hours"), (60, "min", "minutes"), (1, "s", "seconds"))


def losses(history: list[dict[str, float]]) -> str:
    """The losses of each kind of rows that there were, as trained on and, dashed, at fixed noise, as SVG."""
    figure, axes = _figure(2.8)
    for name, colour in COLOURS.items():
        if not any(r[name] for r in history):
            continue  # without prior preservation
        alone = "." if len(history) == 1 else None  # a line has two ends
        axes.plot([r["step"] for r in history], [r[name] for r in history], color=colour, alpha=0.6, linewidth=1, marker=alone, label=name)
        fixed = [r for r in history if f"validation_{name}" in r]
        if fixed:
            axes.plot([r["step"] for r in fixed], [r[f"validation_{name}"] for r in fixed], "o--", color=colour, markersize=4, label=f"{name}, fixed noise")
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=2)
    return _svg(figure, "The losses over the steps")


def bars(seconds: dict[str, float]) -> str:
    """The time of each stage as a bar, in the unit that suits the longest, as SVG."""
    figure, axes = _figure(0.6 + 0.28 * len(seconds))
    names = list(seconds)[::-1]
    size, _, unit = _unit(max(seconds.values()))
    drawn = axes.barh(names, [seconds[n] / size for n in names], color=COLOURS["prior"])
    axes.bar_label(drawn, labels=[duration(seconds[n]) for n in names], padding=4)
    axes.set_xlabel(unit)
    axes.margins(x=0.12)  # for the longest one's label
    return _svg(figure, f"Time of each stage: {', '.join(f'{name} {duration(n)}' for name, n in seconds.items())}")


def duration(seconds: float) -> str:
    """A time for people to read: 45 s, 3.5 min, 1.2 h."""
    size, name, _ = _unit(seconds)
    return f"{seconds / size:.{0 if size == 1 else 1}f} {name}"


def _unit(seconds: float) -> tuple[int, str, str]:
    return next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])


def _figure(height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "Figure", name: str) -> str:
    """The figure as SVG, with a name for those who cannot see it; letters and lines have the page's own colour, on its own paper, dark, light or printed."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue().partition("<svg")[2].replace("#000000", "currentColor")
    return f'<svg role="img" aria-label="{html.escape(name)}" fill="currentColor"{drawn}'
