"""The report stage: reads results (`results`), judges them (`intervals`, `verdict`), draws and writes (`document`)."""

from tipl.report.comparison import Arm, compare, plot_ledgers
from tipl.report.document import write_report
from tipl.report.forecast_plot import plot_forecast
from tipl.report.paths import PathSpectrum, path_spectrum, plot_store
from tipl.report.scores import Scores, plot_scores, score
from tipl.report.video import record_video

__all__ = [
    "Arm",
    "PathSpectrum",
    "Scores",
    "compare",
    "path_spectrum",
    "plot_forecast",
    "plot_ledgers",
    "plot_scores",
    "plot_store",
    "record_video",
    "score",
    "write_report",
]
