"""A server that answers as `vllm serve` does, with a tiny model, and with faults on request."""

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from star_dss_plugin.engines.local import LocalEngine

KEY = "sk-very-secret"
LABELS = [7, 240, 41]


class FakeServer(ThreadingHTTPServer):
    """Answer as `vllm serve` does, with a tiny model, after each fault of a list once."""

    daemon_threads = True

    def __init__(self, model, port=0):
        self.engine = LocalEngine(model)
        self.faults = []
        self.bodies = []
        self.keys = set()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class FakeHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body, status=200, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.keys.add(self.headers.get("Authorization"))
        self.answer({"data": [{"id": "tiny"}]})

    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.bodies.append(body)
            fault = fake.faults.pop(0) if fake.faults else None
        self.complete(fake, body, fault)

    def complete(self, fake, body, fault):
        assert body["max_tokens"] == 1
        if isinstance(fault, int):
            headers = [("Retry-After", "0")] if fault == 429 else []
            return self.answer({"error": f"no {self.headers['Authorization']}"}, fault, headers)
        if fault == "hang up":
            return self.connection.close()
        if fault == "too slow":
            time.sleep(5.0)
        if fault == "garbage":
            return self.answer(b'{"choices": [')
        prompts, ids = body["prompt"], body["logprob_token_ids"]
        with fake.lock:
            fake.busy += 1
            fake.busiest = max(fake.busiest, fake.busy)
        time.sleep(0.01)
        with fake.lock:
            fake.busy -= 1
            [rows] = fake.engine.label_logprobs([prompts], ids)
        choices = [
            {
                "index": i,
                "logprobs": {
                    "top_logprobs": [
                        {
                            "token_id:0": -9.0,
                            **{f"token_id:{t}": v for t, v in zip(ids, row.tolist())},
                        }
                    ]
                },
            }
            for i, row in enumerate(rows)
        ]
        random.Random(0).shuffle(choices)
        tokens = sum(map(len, prompts))
        if fault == "another tokenizer":
            tokens += 1
        elif fault == "old":
            choices[0]["logprobs"]["top_logprobs"] = [{"token_id:7": -1.0}]
        elif fault == "raw logits":
            choices[0]["logprobs"]["top_logprobs"] = [{f"token_id:{t}": 3.5 for t in ids}]
        elif fault == "no logprobs":
            choices[0]["logprobs"] = None
        elif fault == "one short":
            choices.pop()
        return self.answer({"choices": choices, "usage": {"prompt_tokens": tokens}})


def prompt_groups(count=6):
    """Return groups of prompts that share prefixes, an empty group, and one with equal prompts."""
    generator = random.Random(1)
    found = []
    for _ in range(count):
        trunk = [generator.randrange(250) for _ in range(40)]
        found.append([[*trunk[:n], 5, 6] for n in range(1, 40, 5)])
    return [*found, [], [found[0][0], found[0][0]]]
