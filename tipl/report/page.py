"""The report's HTML: style sheet, elements and number formats, independent of the report's content.

`element` escapes every text that is not yet `Html`, so that a name from a file is shown and never interpreted.
"""

import html
import math
import re
from collections.abc import Iterable

from tipl.report.drawing import NBSP, THEME, Mark, Plot
from tipl.report.intervals import Estimate
from tipl.report.predictor_info import predictor_info

MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Return text as HTML; a number and its percent sign stay on one line."""
    return text if isinstance(text, Html) else Html(re.sub(r"(?<=\d) %", f"{NBSP}%", html.escape(text)))


def join(*parts: Html) -> Html:
    return Html("".join(parts))


def element(tag: str, *content: str, cls: str = "") -> Html:
    """Return <tag class=cls> around `content`, plain strings escaped."""
    attribute = f' class="{html.escape(cls)}"' if cls else ""
    return Html(f"<{tag}{attribute}>{''.join(escape(part) for part in content)}</{tag}>")


def section(anchor: str, title: str, *content: str) -> Html:
    return Html(f'<section id="{anchor}">{element("h2", title)}{"".join(escape(part) for part in content)}</section>')


def facts(items: Iterable[tuple[str, str]]) -> Html:
    """Return name-value pairs as a grid of tiles."""
    tiles = (element("div", element("dt", name), element("dd", value)) for name, value in items)
    return element("dl", *tiles, cls="facts")


def table(caption: str, head: Iterable[Html], rows: Iterable[Iterable[Html]]) -> Html:
    """Return a table of header cells and rows of cells, under its caption; it scrolls sideways on a narrow screen."""
    body = (element("tr", *row) for row in rows)
    content = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return join(element("p", caption, cls="caption"), element("div", content, cls="scroll"))


def column_head(name: str) -> Html:
    """Return the head of a predictor's column."""
    info = predictor_info(name)
    return element("th", info.label, cls="quiet" if info.is_floor else "")


def estimate_cell(text: str, interval: str, *, is_best: bool = False, is_quiet: bool = False) -> Html:
    """Return the table cell of an estimate with its interval below; `is_quiet` shows it in grey."""
    cls = " ".join(name for name, is_on in (("best", is_best), ("quiet", is_quiet)) if is_on)
    return element("td", element("b" if is_best else "span", text), element("small", interval), cls=cls)


def figure(plot: Plot, caption: str) -> Html:
    """Return a figure: its legend, inline SVG panels that wrap to the width of the screen, and its caption."""
    label = html.escape(", ".join(panel.title for panel in plot.panels))
    panels = (Html(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)) for svg in plot.svgs())
    legend = element("div", *(_legend_entry(mark) for mark in plot.legend), cls="legend")
    grid = element("div", *panels, cls="panels" if plot.columns < 4 else "panels matrix")
    link = Html(f'<a href="{plot.name}.png">{plot.name}.png</a>')
    return element("figure", legend, grid, element("figcaption", escape(caption), " ", link))


# SVG paths of matplotlib's markers, centred at (14, 6).
_MARKERS = {
    "o": "M14 2.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M11 3h6v6h-6z",
    "^": "M14 2l4 7.4h-8z",
    "v": "M14 10l4-7.4h-8z",
    "D": "M14 2l4 4-4 4-4-4z",
    "P": "M12.8 2h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "*": "M14 1.2l1.2 3.4 3.6.1-2.9 2.2 1.1 3.5-3-2.1-3 2.1 1.1-3.5-2.9-2.2 3.6-.1z",
    "X": "M11.5 2l2.5 2.5 2.5-2.5 1.5 1.5-2.5 2.5 2.5 2.5-1.5 1.5-2.5-2.5-2.5 2.5-1.5-1.5 2.5-2.5-2.5-2.5z",
}


def _legend_entry(mark: Mark) -> Html:
    """Return the mark's line, marker or both, with its label."""
    shape = ""
    if mark.width:
        dashes = " ".join(f"{mark.width * dash:g}" for dash in mark.dashes)
        shape += f'<path d="M1 6h26" stroke-width="{1.2 * mark.width:g}" stroke-dasharray="{dashes}"/>'
    if mark.marker:
        shape += f'<path d="{_MARKERS[mark.marker]}" stroke="none"/>'
    color = f'fill="var(--{mark.color})" stroke="var(--{mark.color})"'
    swatch = Html(f'<svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true" {color}>{shape}</svg>')
    return element("span", swatch, mark.label)


def document(title: str, body: str) -> bytes:
    """Return the whole page."""
    light, dark = (";".join(f"--{name}:{colors[i]}" for name, colors in THEME.items()) for i in (0, 1))
    themes = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{themes}{STYLE_SHEET}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    ).encode()


def fmt(value: float) -> str:
    """Return a number with three significant digits and a typographic minus sign; from 100 on, a whole number."""
    if math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = int(exponent)
    if power >= 2:
        text = f"{value:,.0f}"
    elif power >= -3:
        text = f"{value:.{2 - power}f}"
    else:
        superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa}{NBSP}{TIMES}{NBSP}10{superscript}"
    return text.replace("-", MINUS)


def fmt_percent(share: float) -> str:
    """Return 0.243 as "24 %"."""
    if math.isnan(share):
        return DASH
    return f"{100 * share:.0f}{NBSP}%".replace("-0", "0").replace("-", MINUS)


def fmt_interval(estimate: Estimate, *, as_percent: bool = False) -> str:
    """Return "[low, high]", or "" where there is no interval."""
    if not estimate.has_interval:
        return ""
    if as_percent:
        low, high = fmt_percent(estimate.low).removesuffix(f"{NBSP}%"), fmt_percent(estimate.high)
    else:
        low, high = fmt(estimate.low), fmt(estimate.high)
    return f"[{low}, {high}]"


def with_interval(estimate: Estimate) -> str:
    """Return a value and, where there is one, its interval."""
    return f"{fmt(estimate.value)} {fmt_interval(estimate)}".rstrip()


def listed(items: Iterable[str]) -> str:
    """Return "a, b and c"; there must be at least one item."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def fmt_seconds(seconds: float) -> str:
    """Return 99.6 as "1 min 40 s", 95.2 as "95 s"."""
    if seconds < 99.5:
        return f"{seconds:.2g}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {rest}{NBSP}s"


STYLE_SHEET = """
*{box-sizing:border-box}
:root{--tint:color-mix(in srgb,var(--ink) 7%,var(--surface));--page:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--page:#0d1117}}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:0 0 12px}
h3{font-size:1.02rem;margin:26px 0 8px}
p{max-width:76ch;margin:0 0 12px}
a{color:var(--persistence)}
small,figcaption,.caption,footer,.sub{color:var(--muted)}
.sub{margin:4px 0 18px}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--grid);margin:18px 0 0}
nav div{max-width:1160px;margin:0 auto;padding:9px 20px;display:flex;gap:20px;overflow-x:auto;
white-space:nowrap;font-size:.92rem}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--ink)}
section{background:var(--surface);border:1px solid var(--grid);border-radius:12px;
padding:24px;margin:20px 0;scroll-margin-top:52px}
.lead{font-size:1.22rem;line-height:1.45;font-weight:600;max-width:62ch}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:14px 24px;margin:0}
.facts dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(228px,1fr));gap:14px;margin:18px 0 6px}
.card{border:1px solid var(--grid);border-radius:10px;padding:14px 16px;font-size:.9rem;line-height:1.45}
.card h3{margin:0;font-size:.85rem;font-weight:600;color:var(--muted)}
.card .big{font-size:1.6rem;font-weight:700;line-height:1.25;margin:2px 0 6px;color:var(--ink)}
.card.good .big{color:var(--tipl)}
.card .unit{color:var(--muted);margin:-6px 0 9px}
.card p{margin:0 0 7px}
.card p:last-child{margin:0}
.scroll{overflow-x:auto;margin:0 0 14px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;min-width:100%}
.caption{font-size:.92rem;max-width:90ch;margin-bottom:8px}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap;vertical-align:top}
thead th{border-bottom:2px solid var(--faint);font-weight:600}
th:first-child,table.pairs td{text-align:left}
th:first-child{position:sticky;left:0;background:var(--surface);font-weight:600}
td small,th small{display:block;font-size:.78rem;font-weight:400}
td[colspan]{text-align:left;white-space:normal}
td.best{background:var(--tint)}
.quiet{color:var(--muted)}
figure{margin:8px 0 26px}
video{max-width:100%;height:auto;display:block;border-radius:8px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:10px 20px}
.matrix{grid-template-columns:repeat(4,1fr);gap:10px 12px}
@media (max-width:900px){.matrix{grid-template-columns:repeat(2,1fr)}}
@media (max-width:480px){.matrix{grid-template-columns:1fr}}
.panels svg{width:100%;max-width:620px;height:auto;display:block}
.panels svg *{stroke-linejoin:round}
.panels svg text{font-family:inherit!important}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 20px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 8px;font-size:.88rem}
.legend svg{vertical-align:-1px;margin-right:6px}
figcaption{font-size:.88rem;margin-top:8px;max-width:90ch}
dl.terms{display:grid;grid-template-columns:max-content 1fr;gap:6px 20px;margin:0 0 16px}
dl.terms dt{font-weight:600}
dl.terms dd{margin:0;max-width:72ch}
ul{padding-left:20px;max-width:78ch}
details{margin:10px 0}
summary{cursor:pointer;color:var(--muted)}
table.pairs{min-width:0}
details td{white-space:normal;overflow-wrap:anywhere}
footer{padding:4px 20px 40px;font-size:.88rem}
@media (max-width:640px){
header,main,footer{padding-left:12px;padding-right:12px}
section{padding:18px 14px}
h1{font-size:1.5rem}
.lead{font-size:1.08rem}
.facts{grid-template-columns:repeat(2,1fr)}
th,td{padding:7px 9px}
dl.terms{grid-template-columns:1fr;gap:2px}
dl.terms dd{margin:0 0 10px}
}
@media print{nav{display:none}section{break-inside:avoid;border:0}}
"""
