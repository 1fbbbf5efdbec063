"""The report: one self-contained page, and pictures for a README.

rows.py       results, their means, gains and bests
describe.py   plain words for tasks, methods and figures
cases.py      which slices are shown, read from the stores
pictures.py   arrays to 8-bit views, error maps, labelled strips
page.py       all of it for the template page.html (style page.css, script page.js)
explained.py  film strips, maps of what was invented, figures of steadiness; template explain.html
write.py      write_report(results, path)
"""

from flows.report.pictures import figure_strip
from flows.report.write import write_report

__all__ = ["figure_strip", "write_report"]
