"""An OpenAI chat-completions server on the loopback, for judges that ask for the log-probs of one token.

``with JudgeServer(judge) as server:`` runs it in a thread; ``server.environment`` makes the openai client use it.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

OUTPUTS = re.compile(r'"output": """(.*?)"""\n', re.DOTALL)
"""The answers inside the prompt of alpaca_eval's default judge, in the order it shows them."""


class JudgeServer:
    """Answers ``POST /v1/chat/completions`` with the token ``m`` or ``M``, as the judge's probability says."""

    def __init__(self, judge: Callable[[str, str], float]) -> None:
        """
        Args:
            judge: (first answer, second answer) -> probability that the first is better.
        """
        self.requests: list[dict[str, Any]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.requests.append({"path": self.path, **request})
                first, second = OUTPUTS.findall(request["messages"][-1]["content"])
                body = json.dumps(completion(request["model"], judge(first, second))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(model: str, probability: float) -> dict[str, Any]:
    """One token and its log-probs, in the form of OpenAI's API."""
    logprobs = {"m": _log(probability), "M": _log(1 - probability)}
    chosen = "m" if probability >= 0.5 else "M"
    top = [{"token": token, "bytes": None, "logprob": value} for token, value in logprobs.items()]
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": chosen},
                "logprobs": {
                    "content": [
                        {"token": chosen, "bytes": None, "logprob": logprobs[chosen], "top_logprobs": top},
                    ]
                },
            }
        ],
        "usage": {"prompt_tokens": 99, "completion_tokens": 1, "total_tokens": 100},
    }


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-9))
