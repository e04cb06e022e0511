"""GGUF files through a real llama.cpp: a long-lived node process that batches answers, told what to do line by line.

engine     a request becomes an order, tokens come back as pieces      asyncio
process    the node process: started, spoken to, started again         asyncio
schema     which JSON Schemas its grammars can hold an answer to
node.mjs   the model, and a sequence of llama.cpp's for each answer    node
"""
