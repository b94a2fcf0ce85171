"""A chat endpoint on this machine that answers as it is told, and remembers what it was asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, *, finish_reason="stop", tokens=100):
    """Return the body of a chat completion."""
    reply = {"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]}
    return reply if tokens is None else {**reply, "usage": {"total_tokens": tokens}}


def pairs(*questions):
    """Return a reply with a question and an answer for each name."""
    return json.dumps({"pairs": [{"question": f"{q}?", "answer": f"{q}!"} for q in questions]})


class ChatServer:
    """`answers` are (status, body, headers) by request, the last one for all that follow."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []
        self.headers = []

    def answer(self, path, headers, body):
        self.asked.append(json.loads(body))
        self.headers.append({"path": path, **{k.lower(): v for k, v in headers.items()}})
        number = len(self.asked) - 1
        found = self.answers[min(number, len(self.answers) - 1)]
        return found(self.asked[-1]) if callable(found) else found


@contextmanager
def chat_server(*answers):
    """Serve on a free port; yields (server, base URL)."""
    stub = ChatServer(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, reply, headers = stub.answer(self.path, self.headers, body)
            if status is None:  # the connection breaks
                self.connection.close()
                return
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
