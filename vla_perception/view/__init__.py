"""`vla-perception view` and `top`: what a tokenizer sees and how it does, in a browser and in a terminal.

Words:

- *feed*: where snapshots come from: a running system (`live.py`) or a recording (`recording.py`).
- *snapshot*: one token message with the camera images that belong to it (`snapshot.py`).
- *space*: vectors that tokens are compared in: the projected tokens, or what one encoder gave (`analysis.py`).
- *pin*: the place, a patch or a box of them, whose similarity to all others is painted (`analysis.py`).
- *health*: what `/diagnostics`, the log and `TokenSubscriber` say about a tokenizer (`health.py`).

`server.py` serves the page in `page/` and answers its web socket, with one `Session` (`session.py`) per open page;
`wire.py` is what goes through that socket. `top.py` prints health as text. Only `live.py` imports ROS.
"""
