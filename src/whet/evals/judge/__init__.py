"""A language model as judge: it grades answers by a rubric, or says which of two is better.

settings    the rubric and how the judge is asked
prompts     what it reads: the texts to be judged lie between marks that they cannot know
verdicts    what it must reply: JSON of a fixed form, and the strict reading of it
asking      questions to verdicts, with bounded retries; whatever is no verdict stays a failure with a reason
grading     a score an answer, from several repeats
pairwise    which of two answers is better, asked in both orders
labels      agreement with people
"""
