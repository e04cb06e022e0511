"""HTML pages as Markdown: what a reader sees stays, the page's machinery goes, and no markup makes a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.read.html_files import html_to_text
from whet.data.read.rows import read_rows
from whet.errors import WhetError

PAGE = """<!DOCTYPE html>
<html lang="en"><head><title>Pump &amp; valve
   manual</title><style>p { color: red }</style><script>if (a < b) alert("<p>no</p>")</script></head>
<body><svg><title>logo</title></svg>
<nav><a href="/">Home</a> <a href="/products">Products</a></nav>
<h1>Pump</h1><p>Keep <b>dry</b>. See <a href="valve.html">the valve</a>.<br>Then go on.</p>
<form><h2>Steps</h2><ol><li>Open</li><li>Close<ul><li>slowly</li></ul></li></ol>
<input value="q"><button>Search</button></form>
<table><tr><th>Part</th><th>N</th></tr><tr><td>Seal</td><td>2</td></tr></table>
<pre><code class="language-python">def f(x):
    return x &lt; 1
</code></pre>
<img src="data:image/png;base64,AAAA" alt="A drawing"><noscript>Enable scripts</noscript><!-- note -->
</body></html>"""
TEXT = """# Pump

Keep **dry**. See [the valve](valve.html).\\
Then go on.

## Steps

1. Open
2. Close
   - slowly

| Part | N |
| --- | --- |
| Seal | 2 |

```python
def f(x):
    return x < 1
```

A drawing"""


def read(folder: Path, content: str | bytes, name: str = "a.html") -> dict[str, str]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    (row,) = read_rows(name, base=folder)
    assert (row.source, row.line) == (name, 1)
    return row.values


def test_a_page_as_a_reader_sees_it(tmp_path: Path):
    """Catches scripts, styles, navigation and fields in the text, and headings, lists, tables or code that melt."""
    assert read(tmp_path, PAGE) == {"text": TEXT, "title": "Pump & valve manual"}
    assert read(tmp_path, PAGE, "A.HTM")["text"] == TEXT


def test_the_title_may_be_a_heading_or_none(tmp_path: Path):
    assert read(tmp_path, "<h2>Only a <i>heading</i></h2><p>x")["title"] == "Only a *heading*"
    assert read(tmp_path, "<p>x")["title"] == ""
    assert read(tmp_path, "<body><svg><title>logo</title></svg><p>x")["title"] == ""


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("\ufeff<p>é".encode(), "é"),
        ('<meta charset="ISO-8859-1"><p>café “x”'.encode("cp1252"), "café “x”"),
        ("<meta http-equiv=Content-Type content='text/html; charset=koi8-r'><p>Привет".encode("koi8-r"), "Привет"),
        ('<?xml version="1.0"?><html><body><p>é</p></body></html>'.encode(), "é"),
        ("<p>é".encode("utf-16"), "é"),
    ],
)
def test_encodings_that_pages_declare(tmp_path: Path, raw: bytes, text: str):
    assert read(tmp_path, raw)["text"] == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<html><body><script>x</script></body></html>", "no rows"),
        (b"<p>caf\xe9", "not UTF-8"),
        (b"<meta charset=utf-8><p>caf\xe9", "not UTF-8"),
        (b"<meta charset=zlib><p>caf\xe9", "not UTF-8"),
        (b"<meta charset=euc-kr><p>caf\xff\xff", "not UTF-8"),
        (b"<div>" * 50_000 + b"x", "nested more deeply"),
        (b"<ul><li>" * 50_000 + b"x", "nested more deeply"),
    ],
)
def test_pages_that_cannot_be_read(tmp_path: Path, content: bytes, says: str):
    """Catches a converter that runs out of stack, and text that is left out without a word."""
    (tmp_path / "a.html").write_bytes(content)
    with pytest.raises(WhetError, match=says) as caught:
        list(read_rows("a.html", base=tmp_path))
    assert caught.value.fix
    assert str(caught.value.where).startswith("a.html")


PARTS = st.sampled_from(
    """<p>,</p>,<table>,<tr>,<td colspan=9999999>,</table>,<ul>,<li>,<pre>,<code>,<a href=',<b,>
<!--,-->,<![CDATA[,<html,<script>,</script>,<h1>,<ol start=-1>,<svg>,&#0;,&#x110000;,&amp,<br/>,text,é,😀,|,`,<template>
<q,",<img src=data:;base64,x>,\0, ,'""".replace("\n", ",\n,").split(",")
)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(PARTS | st.text(max_size=3), max_size=30))
def test_no_markup_makes_a_traceback(parts: list[str]):
    """The same text comes out each time: pages are converted in many processes."""
    page = "".join(parts)
    assert html_to_text(page) == html_to_text(page)
