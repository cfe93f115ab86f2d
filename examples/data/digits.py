"""Writes digits.txt from scikit-learn's copy of the data set.

    pip download --no-deps scikit-learn==1.9.1 && python3 digits.py scikit_learn-1.9.1*.whl
"""
import gzip
import sys
import zipfile
from pathlib import Path

packed = zipfile.ZipFile(sys.argv[1]).read("sklearn/datasets/data/digits.csv.gz")
with open(Path(__file__).with_name("digits.txt"), "w", encoding="ascii") as out:
    for row in gzip.decompress(packed).decode("ascii").split():
        *pixels, label = map(int, row.split(","))
        assert len(pixels) == 64 and max(pixels) <= 16 and label <= 9
        print("".join(chr(ord("a") + pixel) for pixel in pixels), label, sep="", file=out)
