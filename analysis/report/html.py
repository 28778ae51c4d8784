"""The frame of every HTML page: one file that needs no network, and prints well."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from traces.trace import atomic_file


def write_page(path: Path, title: str, headline: str, body: str) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the page.
        title: its heading, as text.
        headline: what it says in plain sentences, as text.
        body: the rest, as HTML.

    Raises:
        TandemError: the page cannot be written.
    """
    page = _FRAME.substitute(title=escape(title), headline=escape(headline), body=body)
    with atomic_file(path) as file:
        file.write(page.encode())


_FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; break-after: avoid; }
.headline { font-size: 1.05rem; max-width: 50rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; border-bottom: 1px solid #888; }
.label { text-align: left; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
figure { margin: 1rem 0; break-inside: avoid; }
figcaption, dd { color: #555; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; }
@media print { body { margin: 0; max-width: none; } .modebar { display: none; } tr { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
<p class="headline">$headline</p>
$body
</body>
</html>
""")
