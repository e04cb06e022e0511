"""Rows out of files, folders, databases and data sets. Begin with rows.py.

rows.py      what there is to read, and reading it
piece.py     a row, and what all readers share; paths.py finds files
chunks.py    sources cut into chunks that processes read apart; cuts.py cuts a file, record_ends.py finds where
the rest     one kind each
"""
