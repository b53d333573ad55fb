"""The report stage: `results` are read, judged (`estimates`, `verdict`), drawn (`plots`, `paths`, `page`), written."""

from tipl.report.document import write_report
from tipl.report.paths import PathSpectrum, path_spectrum, plot_store

__all__ = ["PathSpectrum", "path_spectrum", "plot_store", "write_report"]
