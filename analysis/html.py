"""The report as one HTML file: no network, no second file, readable from a file system and in print.

Figures are data URIs (vector; as pixels where a vector would be too large). Every table cell that comes from runs
shows their ids when it is clicked or reached by keyboard, in a panel at the foot of the window.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.report_table import ReportTable, column_kinds

LARGEST_SVG = 1_500_000  # bytes


@dataclass(frozen=True)
class Section:
    """title, and parts in order: paragraphs, lists, tables, figures."""

    title: str
    parts: Sequence[str]

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower()).strip("-")


def page(title: str, lead: str, sections: Sequence[Section], registry: Registry) -> str:
    links = "".join(f'<a href="#{section.anchor}">{html.escape(section.title)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>{"".join(section.parts)}</section>'
        for section in sections
    )
    data = json.dumps(registry.lists).replace("</", "<\\/")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><header><h1>{html.escape(title)}</h1>'
        f"<p>{html.escape(lead)}</p><nav>{links}</nav></header><main>{body}</main>"
        '<aside id="runs" hidden role="status"><button type="button">close</button><strong></strong><p></p></aside>'
        f'<script type="application/json" id="registry">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )


class Registry:
    """Lists of run ids that table cells come from, each kept once."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self._known: dict[str, int] = {}

    def number(self, run_ids: str) -> int:
        if run_ids not in self._known:
            self._known[run_ids] = len(self.lists)
            self.lists.append(run_ids.split())
        return self._known[run_ids]


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def verdict(text: str, kind: str) -> str:
    """One line set off: kind is pass, fail or none."""
    return f'<p class="verdict {kind}">{html.escape(text)}</p>'


def figure(stem: Path, caption: str) -> str:
    """A saved figure; its vector form unless that is very large."""
    svg = stem.with_name(f"{stem.name}.svg")
    path, kind = (svg, "svg+xml") if svg.stat().st_size <= LARGEST_SVG else (stem.with_name(f"{stem.name}.png"), "png")
    data = base64.b64encode(path.read_bytes()).decode()
    described = html.escape(caption, quote=True)
    return (
        f'<figure><img alt="{described}" src="data:image/{kind};base64,{data}"><figcaption>{html.escape(caption)}'
        "</figcaption></figure>"
    )


def report_table(table: ReportTable, registry: Registry) -> str:
    return (
        f'<h3 id="{table.name}">{html.escape(table.title)}</h3>{_rows(table.text, table.sources, registry)}'
        f'<p class="caption">{html.escape(table.caption)}</p>'
    )


def plain_table(text: pd.DataFrame) -> str:
    return _rows(text, None, Registry())


def _rows(text: pd.DataFrame, sources: pd.DataFrame | None, registry: Registry) -> str:
    kinds = column_kinds(text)
    head = "".join(
        f'<th scope="col" class="{kind}">{html.escape(str(name)).replace(".", ".<wbr>")}</th>'
        for name, kind in zip(text.columns, kinds, strict=True)
    )
    rows = []
    for number, row in enumerate(text.itertuples(index=False)):
        cells = []
        for column, (value, kind) in enumerate(zip(row, kinds, strict=True)):
            ids = "" if sources is None else str(sources.iat[number, column])
            source = f' data-runs="{registry.number(ids)}" tabindex="0"' if ids else ""
            mark = f" {value}" if value in ("pass", "fail") else ""
            shown = html.escape(str(value))
            if kind == "number":  # gains on a line of their own, so that a wide table fits
                shown = shown.replace(" (", "<br>(")
            cells.append(f'<td class="{kind}{mark}"{source}>{shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,"DejaVu Sans",sans-serif;color:#1a1a1a;max-width:84rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.25rem;border-bottom:1px solid #ccc;margin-top:2.2rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}
a{color:#0b5a94}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;border-top:2px solid #222;border-bottom:2px solid #222}
th{border-bottom:1px solid #222;vertical-align:bottom;padding:.25rem .35rem}
th.number{text-align:right}
th.words,th.label{text-align:left}
td{padding:.2rem .35rem;vertical-align:top;text-align:left}
td.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.label{white-space:nowrap}
td.words{min-width:6.5rem;overflow-wrap:break-word}
tbody tr:nth-child(even){background:#f5f5f5}
td[data-runs]{cursor:pointer}
td[data-runs]:hover,td[data-runs]:focus{outline:2px solid #0b5a94;outline-offset:-2px}
td.pass{font-weight:600}
td.fail{font-weight:600;text-decoration:underline}
.caption,figcaption{color:#444;font-size:13px;max-width:60rem}
figure{margin:1rem 0}
figure img{max-width:100%;height:auto}
.verdict{border-left:6px solid #777;padding:.4rem .8rem;background:#f3f3f3;font-weight:600}
.verdict.pass{border-color:#0173b2}
.verdict.fail{border-color:#d55e00;border-left-style:double}
#runs{position:fixed;left:0;right:0;bottom:0;max-height:35vh;overflow:auto;background:#fff}
#runs{border-top:2px solid #0b5a94;padding:.6rem 1.5rem;font-size:13px}
#runs button{float:right}
#runs p{font-family:monospace;margin:.3rem 0;overflow-wrap:anywhere}
@page{size:A4 landscape;margin:12mm}
@media print{
nav,#runs{display:none}
body{max-width:none;padding:0;font-size:11px}
table{font-size:8.5px}
th,td{padding:.1rem .3rem}
td.words{min-width:0}
.scroll{overflow:visible}
h2,h3{break-after:avoid}
tr,figure,.verdict{break-inside:avoid}
}
""".strip()

SCRIPT = """
"use strict";
const lists = JSON.parse(document.getElementById("registry").textContent);
const panel = document.getElementById("runs");
function show(cell) {
  const ids = lists[Number(cell.dataset.runs)];
  const count = ids.length + (ids.length === 1 ? " run" : " runs");
  panel.querySelector("strong").textContent = count + " behind \\u201c" + cell.textContent + "\\u201d";
  panel.querySelector("p").textContent = ids.join("  ");
  panel.hidden = false;
}
document.addEventListener("click", (event) => {
  const cell = event.target.closest("td[data-runs]");
  if (cell) show(cell); else if (event.target.closest("#runs button")) panel.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") panel.hidden = true;
  if (event.key === "Enter" && document.activeElement.dataset.runs !== undefined) show(document.activeElement);
});
""".strip()
