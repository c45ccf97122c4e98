"""A server that answers observations with a policy's actions.

Where a request goes:

- `server.PolicyServer` reads it, within limits, by `messages.read_request`.
- `engine.Engine.encode` encodes its observations as in training. What doesn't fit is refused before it can harm others.
- `batcher.Batcher` joins what has arrived, for a moment at most, and runs it in one thread.
- `engine.Engine.act` runs one compiled program for each of a few batch sizes, and keeps the memories of sessions.
- `messages.write_answer` answers as JSON or as arrays.
"""
