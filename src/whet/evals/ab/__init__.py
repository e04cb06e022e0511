"""Blind comparison of models' answers by people: a study in a folder, a local web page, and what the votes say.

answers   two files of answers in, paired by id
study     what is compared, and the secret that says in which order and on which side a grader sees it
votes     the append-only file of links, votes and the study's end
server    the web pages (`guard`: what a request must be; `markdown`: answers as a tree, never as HTML)
results   votes and secret together: win rates, agreement, sign test; `export` writes them out
"""
