"""Tables with one row per prefix and one column per predictor; every cell has an estimate and its interval."""

from collections.abc import Sequence

from tipl.report import page
from tipl.report.drawing import percent
from tipl.report.intervals import Bootstrap, Statistic, leaders, ranking
from tipl.report.page import Html, element, fmt, fmt_interval
from tipl.report.predictor_info import predictor_info
from tipl.report.results import Results


def error_table(
    results: Results,
    bootstrap: Bootstrap,
    caption: str,
    measure: str,
    names: Sequence[str],
    statistic: Statistic = "mean",
) -> Html:
    """Return a table of the mean or IQM of `measure` at the end of the path, with each prefix's best marked."""
    rows = []
    for f in results.prefixes:
        best = leaders(ranking(results, measure, f, statistic))
        row = [element("th", percent(f), element("small", f"{results.horizons[f][-1]} ahead"))]
        for n in names:
            estimate = bootstrap.estimate(results.at_end(measure, f, n), statistic)
            row.append(predictor_cell(n, fmt(estimate.value), fmt_interval(estimate), best))
        rows.append(row)
    return page.table(caption, [element("th", "prefix"), *map(page.column_head, names)], rows)


def predictor_cell(name: str, text: str, interval: str, best: set[str]) -> Html:
    """Return the table cell of a predictor's estimate: marked if its name is in `best`, in grey if it is a floor."""
    return page.estimate_cell(text, interval, is_best=name in best, is_quiet=predictor_info(name).is_floor)
