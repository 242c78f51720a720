"""An OpenAI-compatible HTTP server over an `InferenceEngine`: `python -m fms_parallel.inference.server`, or `Server`.

options.py    where it listens, what clients may ask for
failure.py    a request that gets no answer: a status and a sentence
fields.py     JSON of a client -> what is wanted
chat.py       messages -> tokens
driver.py     the thread that runs the engine, and the queues to asyncio
answers.py    what came of it -> JSON, in the dialects of completions and chats
exchange.py   one request from ticket to answer
metrics.py    what is counted
app.py        the paths (needs starlette); run.py   sockets, signals, uvicorn
"""

from fms_parallel.inference.server.chat import ChatTemplate
from fms_parallel.inference.server.options import ServerOptions
from fms_parallel.inference.server.run import Server

__all__ = ["ChatTemplate", "Server", "ServerOptions"]
