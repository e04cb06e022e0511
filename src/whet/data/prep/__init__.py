"""Raw records to a version of a data set. Begin with prep.py, the order of the steps.

steps.py      what is to be done
engine.py     on all cores of this machine, or on a Ray cluster
chunks.py     read, clean, redact: the one step that sees originals
signing.py    signatures of all rows, and the clusters that they make
gate.py       the leak gate over all rows
write.py      the files of a version
versions.py   versions, where they lie, and how two differ
"""
