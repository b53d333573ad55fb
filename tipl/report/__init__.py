"""The report stage: read results (`results`), judge (`estimates`, `verdict`), draw (`plots`, `paths`), `page`, `write`."""

from tipl.report.paths import PathSpectrum, path_spectrum, plot_store
from tipl.report.write import write_report

__all__ = ["PathSpectrum", "path_spectrum", "plot_store", "write_report"]
