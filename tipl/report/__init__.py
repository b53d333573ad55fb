"""The report stage: reads results (`results`), judges them (`intervals`, `verdict`), draws and writes (`document`)."""

from tipl.report.document import write_report
from tipl.report.paths import PathSpectrum, path_spectrum, plot_store

__all__ = ["PathSpectrum", "path_spectrum", "plot_store", "write_report"]
