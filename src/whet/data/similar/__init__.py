"""Texts that say the same: among training rows, and between them and the evaluation.

words.py        texts as sequences of hashed words
duplicates.py   exact and near duplicates; clusters, and which row of each stays
leaks.py        training rows that hold evaluation text; leak_runs.py has the runs of words that it looks for
tasks.py        the texts of evaluation tasks
lookup.py       many hashes among many
"""
