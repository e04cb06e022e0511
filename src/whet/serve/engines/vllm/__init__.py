"""Models of a server elsewhere: a vLLM in its own environment, or another OpenAI-compatible one, asked over HTTP.

address    where it is, and the key it wants, as the operator gave them
server     HTTP: one client, and what statuses and lost connections mean
wire       what stands in its answers
asking     a request in its words
catalogue  which models it serves, and what each can do
engine     all of it, as the gateway sees an engine
"""
