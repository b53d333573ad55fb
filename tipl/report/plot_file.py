"""The file of a plot that a user asked for: checked before the work, written whole or not at all after it."""

from pathlib import Path

from tipl.files.locations import write_atomically
from tipl.files.publishing import check_output, claimed, remove_dead_claim
from tipl.report.drawing import Plot


def plot_path(owner: str, path: str | Path, *, overwrite: bool) -> Path:
    """Return where a plot goes; error texts begin with `owner`.

    Raises ValueError where it is no .svg or .png file, FileExistsError where it exists and `overwrite` is not set,
    NotADirectoryError where a file is in the place of a folder above it.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{owner}: path must end in .svg or .png, got {path}")
    check_output(path, owner, "plot")
    if path.exists() and not overwrite:
        remove_dead_claim(path)
        raise FileExistsError(f"{owner}: {path} exists; choose another file, or overwrite it (--overwrite)")
    return path


def write_plot(plot: Plot, path: Path) -> None:
    """Write a plot to a path that `plot_path` returned."""
    data = plot.svg() if path.suffix == ".svg" else plot.png()
    with claimed(path, "plot"):
        write_atomically(path, data)
