"""The engine behind OpenAI's HTTP interface.

    client ──HTTP──▶ app: parse, tokenize ──messages──▶ worker: LLM.submit, LLM.step     (a process each)
           ◀──SSE─── detokenize, stop texts ◀──tokens──

The first process never imports torch, the second never sees text: neither stalls the other.
"""
