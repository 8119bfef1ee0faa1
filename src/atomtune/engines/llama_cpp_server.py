"""llama.cpp's server as a command: python -m atomtune.engines.llama_cpp_server MODEL.gguf --port 8000."""

import argparse
import json
import os
import signal
import threading
from pathlib import Path


def main() -> None:
    """Serve until a signal arrives."""
    parser = argparse.ArgumentParser(prog="llama_cpp_server")
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--context", type=int, default=0, help="tokens; 0: as the model was trained")
    parser.add_argument("--variables", default="{}", help="of the chat template, as a JSON object")
    words = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = words.model
    params.hostnames = [words.host]
    params.port = words.port
    params.n_ctx = words.context
    params.n_parallel = 1
    params.model_alias = {Path(words.model).stem}
    params.default_template_kwargs = {name: json.dumps(value) for name, value in json.loads(words.variables).items()}
    params.fit_params = False  # an error if the context does not fit, instead of a smaller one
    params.cpuparams.poll = 0  # waiting threads sleep; on a busy machine, spinning threads slow each other down
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        params.cpuparams.n_threads = int(threads)
    if key := os.environ.get("ATOMTUNE_API_KEY"):
        params.api_keys = [key]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    stop.wait()
    os._exit(0)  # its threads would keep an interpreter from exiting normally


if __name__ == "__main__":
    main()
