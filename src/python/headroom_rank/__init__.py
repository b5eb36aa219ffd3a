"""A rank of Headroom in the user's interpreter: his model and data sets, Headroom's loop.

`__main__.py` starts a rank, `zygote.py` forks ranks, `session.py` is what the loop asks, `server.py` forks decode workers and
`worker.py` is one; `sample.py` takes samples apart, `optimizer.py` is an optimizer of his own, `failure.py` tells what went wrong in the user's code.
"""
